"""Runs an op's sweep in a process of its own: a kernel that goes astray must not take the tests with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.cuda_host.build import ROOT


def run(*arguments: str | Path, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`python -m tests.cuda_host`, its output captured."""
    command = [sys.executable, "-m", "tests.cuda_host", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)} if environment is None else environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def verdicts_on_mutants(op: str) -> dict[str, str]:
    """How the sweep notices that a barrier or wait of an op's kernels is left out; "" where it does not."""
    done = run(op, "--mutants", "--every", "2")
    assert done.returncode == 0, done.stderr
    return {site.split(" (")[0]: verdict for site, verdict in json.loads(done.stdout).items()}
