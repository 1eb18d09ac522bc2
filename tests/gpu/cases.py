"""What the tests of this folder are written with, instead of pytest: cases, backends, collected failures.

A machine with a GPU need not have pytest. The decorator `each` lists the cases of a test; the runner of this folder
reads the list, and so does pytest through `conftest.py`. `unittest.SkipTest` means "skipped" to both.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest import SkipTest

import torch

from diffcam_fast.backends import absent_because, use_backend

Test = TypeVar("Test", bound=Callable[..., None])

#: "cpu" runs the same tests on the CPU, which tries the tests themselves where there is no GPU.
DEVICE = os.environ.get("DIFFCAM_TEST_DEVICE", "cuda")

#: What serves tensors on a GPU.
BACKENDS = ("cuda", "triton", "reference") if DEVICE == "cuda" else ("cpu", "reference")

#: Those with kernels of ours.
KERNELS = BACKENDS[:-1]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def each(**values: Iterable[Any]) -> Callable[[Test], Test]:
    """Run a test once for every combination of these values, given by keyword."""

    def decorate(test: Test) -> Test:
        test.cases = [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]
        return test

    return decorate


def case_name(case: dict[str, Any]) -> str:
    """A case for a person to read, such as "cuda, gradcam, float32"."""
    return ", ".join(str(value).removeprefix("torch.") for value in case.values())


@contextmanager
def forced(backend: str) -> Iterator[None]:
    """Force a backend; skip the test where it is absent."""
    reason = absent_because(backend)
    if reason is not None:
        raise SkipTest(f"no {backend} backend: {reason}")
    with use_backend(backend):
        yield


def need_gpu() -> None:
    """Skip a test of something that only GPUs have."""
    if DEVICE != "cuda":
        raise SkipTest("not on a GPU")


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill every newly allocated tensor with NaN, so that an output that is not written is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Raise where anything waits for the device."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def generator(seed: int = 0) -> torch.Generator:
    """A seeded source of random numbers on the CPU, so that every device gets the same inputs."""
    return torch.Generator().manual_seed(seed)


class Failures:
    """Mismatches of many small comparisons, so that one run on a rare machine shows all of them."""

    SHOWN = 12

    def __init__(self) -> None:
        self.found: list[str] = []
        self.compared = 0

    def at_most(self, error: float, allowed: float, what: str) -> None:
        """Compare an error, where NaN is one, with what is allowed."""
        self.compared += 1
        if not error <= allowed:
            self.found.append(f"{what}: error {error:.3g}, allowed {allowed:.3g}")

    def check(self, right: bool, what: str) -> None:
        """Note what is not right."""
        self.compared += 1
        if not right:
            self.found.append(what)

    def same(self, found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
        """Compare bit for bit, but for the sign of zero."""
        self.check(torch.equal(found.cpu(), expected.cpu()), f"{what}: not the same")

    def report(self) -> None:
        """Raise where something was found, or where nothing was compared."""
        assert self.compared > 0, "nothing was compared"
        if self.found:
            shown = "\n  ".join(self.found[: self.SHOWN])
            raise AssertionError(f"{len(self.found)} of {self.compared} comparisons failed:\n  {shown}")


def largest(values: torch.Tensor) -> float:
    """The largest magnitude; NaN where there is one, 0 where there is nothing."""
    if values.numel() == 0:
        return 0.0
    found = values.abs().max().item()
    return math.nan if values.isnan().any() else found
