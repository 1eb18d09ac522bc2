"""Runs the checks of `interpreted/` in processes of their own.

Triton decides at import whether its interpreter runs the kernels, so these checks cannot share a process with
`torch.compile`, nor with anything else that imports triton.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

ROOT = Path(__file__).resolve().parents[3]
CHECKS = Path(__file__).resolve().parent / "interpreted"


def _run(op: str, *options: str) -> subprocess.CompletedProcess[str]:
    # The interpreter computes in NumPy, which warns of the infinities and NaN that some checks ask for.
    quiet = ["-q", "-W", "ignore::RuntimeWarning", "-p", "no:cacheprovider"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *quiet, *options, str(CHECKS / f"check_{op}.py")],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )


OPS = ("cam", "cam_backward", "logit_difference", "overlay", "saliency_contrast")
#: What fails first where the op's kernels are broken.
FAILING = {
    "cam": "every_kernel",
    "cam_backward": "several_blocks",
    "logit_difference": "thousand",
    "overlay": "several_parts",
    "saliency_contrast": "several_pieces",
}


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[tuple[str, str], Future[subprocess.CompletedProcess[str]]]]:
    """All of them, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        whole = {(op, "whole"): pool.submit(_run, op) for op in OPS}
        plugin = ("-p", "tests.backends.triton.interpreted.broken")
        yield whole | {(op, "broken"): pool.submit(_run, op, "-x", "-k", FAILING[op], *plugin) for op in OPS}


@pytest.mark.parametrize("op", OPS)
def test_kernels_agree_with_the_reference(op: str, runs: dict[tuple[str, str], Future[Any]]) -> None:
    run = runs[op, "whole"].result()
    if run.returncode != 0:
        pytest.fail(f"check_{op}.py in Triton's interpreter:\n{run.stdout}\n{run.stderr}", pytrace=False)


@pytest.mark.parametrize("op", OPS)
def test_a_broken_kernel_is_caught(op: str, runs: dict[tuple[str, str], Future[Any]]) -> None:
    run = runs[op, "broken"].result()
    assert run.returncode == 1, run.stdout + run.stderr
    assert "1 failed" in run.stdout, run.stdout
