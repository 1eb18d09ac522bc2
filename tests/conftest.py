"""Fixtures that every test may use."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from diffcam_fast.backends import absent_because, native, use_backend

# A backend is forced for a whole test: that its fixture is not set up anew for every example is what is wanted.
SUPPRESSED = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
settings.register_profile("quick", max_examples=50, deadline=None, derandomize=True, suppress_health_check=SUPPRESSED)
settings.register_profile("thorough", max_examples=400, deadline=None, suppress_health_check=SUPPRESSED)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

CPU_BACKENDS = ("reference", "cpu-default", "cpu-avx2", "cpu-avx512")


@pytest.fixture(params=CPU_BACKENDS)
def cpu_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Force each backend that serves CPU tensors, the compiled one in each of its instruction sets."""
    if request.param == "reference":
        with use_backend("reference"):
            yield request.param
        return
    reason = absent_because("cpu")
    if reason is not None:
        pytest.skip(f"no compiled kernels: {reason}")
    before = native.cpu_capability()
    assert before is not None
    try:
        native.set_cpu_capability(request.param.removeprefix("cpu-"))
    except ValueError as error:
        pytest.skip(str(error))
    with use_backend("cpu"):
        yield request.param
    native.set_cpu_capability(before)


@pytest.fixture(params=(1, 2), ids=("one thread", "two threads"))
def torch_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Run with one and with two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill every newly allocated tensor with NaN, so that an output that is not written is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]
