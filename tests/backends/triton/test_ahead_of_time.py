"""Every Triton kernel compiled for GPUs that are not here, in a process without the interpreter."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

ROOT = Path(__file__).resolve().parents[3]
KERNELS = {
    *("_pool", "_weigh", "_finish"),
    *("_sum_up", "_spread"),
    *("_take", "_contrast"),
    *("_span", "_brightest", "_draw"),
    *("_sum_squares", "_subtract"),
}
#: Those that read little but their input; of the aligned cases' loads, most are wide there.
WIDE = {"_pool", "_contrast", "_sum_squares"}
TARGETS = {"sm_80", "sm_90", "sm_100", "gfx942"}


def _compile(cache: Path, *options: str) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.backends.triton.ahead_of_time", *options],
        cwd=ROOT,
        # Triton keeps what it compiled, by default in the user's home.
        env={**environment, "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    if run.returncode != 0:
        pytest.fail(f"the Triton kernels do not compile:\n{run.stdout}\n{run.stderr}", pytrace=False)
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return _compile(tmp_path_factory.mktemp("triton"))


def _line(kernel: dict[str, Any]) -> str:
    return (
        f"{kernel['kernel']:10} {kernel['target']:7} {kernel['label']}: {kernel['registers']} registers, "
        f"{kernel['spills']} spilled, {kernel['wide']} of {kernel['loads']} loads of 16 bytes"
    )


def test_every_kernel_compiles_for_every_target(compiled: list[dict[str, Any]]) -> None:
    print("\n".join(map(_line, compiled)))
    assert {(kernel["kernel"], kernel["target"]) for kernel in compiled} == {
        (kernel, target) for kernel in KERNELS for target in TARGETS
    }


def test_nothing_spills(compiled: list[dict[str, Any]]) -> None:
    spilling = [_line(kernel) for kernel in compiled if kernel["spills"] > 0]
    assert not spilling, "\n".join(spilling)


def test_aligned_inputs_are_read_16_bytes_at_a_time(compiled: list[dict[str, Any]]) -> None:
    aligned = [kernel for kernel in compiled if kernel["aligned"] and kernel["kernel"] in WIDE]
    assert {kernel["kernel"] for kernel in aligned} == WIDE
    narrow = [_line(kernel) for kernel in aligned if 2 * kernel["wide"] < kernel["loads"]]
    assert not narrow, "\n".join(narrow)


def test_a_spill_is_seen(tmp_path: Path) -> None:
    squeezed = _compile(tmp_path, "--squeezed")
    assert {kernel["target"] for kernel in squeezed} == TARGETS
    assert all(kernel["spills"] > 0 for kernel in squeezed), "\n".join(map(_line, squeezed))
