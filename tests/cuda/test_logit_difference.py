"""The CUDA kernels of `logit_difference`, run as host code, against the float64 reference."""

from __future__ import annotations

import ctypes

import pytest

from tests.cuda_host import load
from tests.cuda_host.__main__ import barriers, sweep
from tests.cuda_host.logit_difference_cases import logit_difference_cases

SEEDS = range(3)


@pytest.fixture(scope="module")
def library(builds) -> ctypes.CDLL:
    return load(builds["logit_difference", False].result())


def test_agrees_with_float64_reference(library):
    failures = sweep(library, logit_difference_cases(), SEEDS)
    assert not failures, "\n".join(failures)
    reached = set(library.shim_sites().decode().split())
    assert set(barriers("logit_difference")) <= reached, "a barrier that no case of the sweep reaches"
