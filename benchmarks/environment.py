"""Where a committed result comes from: machine, versions, command, and the commit that was measured."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from diffcam_fast.benchmark import machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def describe(command: str) -> dict[str, Any]:
    """Machine, versions and commit, as JSON-ready values. Call it before results are written.

    Args:
        command: what was run, as a person would type it.
    """
    return {**machine.describe(command), **_commit()}


def _commit() -> dict[str, Any]:
    # The results themselves change with every run, and say nothing about the code that was measured.
    status = _git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    return {
        "commit": _git("rev-parse", "--verify", "--quiet", "HEAD") or None,
        "clean": None if status is None else status == "",
    }


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        # No git, or no repository: the record says that the commit is not known.
        return None
    return result.stdout.strip()
