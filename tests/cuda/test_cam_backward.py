"""The CUDA kernels of `cam_backward`, run as host code, against the float64 reference."""

from __future__ import annotations

import ctypes

import pytest

from tests.cuda_host import load
from tests.cuda_host.__main__ import barriers, sweep
from tests.cuda_host.cam_cases import cam_backward_cases

SEEDS = range(3)


@pytest.fixture(scope="module")
def library(builds) -> ctypes.CDLL:
    return load(builds["cam_backward", False].result())


def test_agrees_with_float64_reference(library):
    failures = sweep(library, cam_backward_cases(), SEEDS)
    assert not failures, "\n".join(failures)
    reached = set(library.shim_sites().decode().split())
    assert set(barriers("cam_backward")) <= reached, "a barrier that no case of the sweep reaches"
