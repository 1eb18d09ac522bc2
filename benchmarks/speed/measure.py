"""Timing that can be trusted: checked values, alternating candidates, cold inputs, read bandwidth beside them."""

from __future__ import annotations

import gc
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch._inductor.config

from benchmarks.environment import last_level_cache, processors
from diffcam_fast.backends import absent_because, forced_backend, serving
from diffcam_fast.backends.library import NAMESPACE

#: Cold inputs come round again only after this many times the last-level cache was read.
COLD_CACHES = 4
#: Size of the buffer that the read ceiling is measured on, in last-level caches.
CEILING_CACHES = 8

MINIMUM_ROUNDS = 15
MAXIMUM_ROUNDS = 200


class WrongResult(Exception):
    """A candidate computed something else; no speed is reported for it."""


class NotCompiled(Exception):
    """The compiled kernels do not serve, so there is nothing to compare."""


@dataclass(frozen=True)
class Candidate:
    """Something to time, which has to be right first."""

    run: Callable[[int], Any]
    """Takes the number of a copy of the input."""

    error: Callable[[Any], float]
    """How far a result of copy 0 is from what is right."""

    tolerance: float


@dataclass(frozen=True)
class Timing:
    """Seconds a call, over all rounds."""

    median: float
    p20: float
    p80: float
    minimum: float
    rounds: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """Summary of the rounds' times."""
        ordered = sorted(seconds)
        last = len(ordered) - 1
        return cls(
            statistics.median(ordered),
            ordered[round(0.2 * last)],
            ordered[round(0.8 * last)],
            ordered[0],
            len(ordered),
        )

    def milliseconds(self, prefix: str = "") -> dict[str, float]:
        """The summary as columns of a row."""
        values = {"ms": self.median, "ms_p20": self.p20, "ms_p80": self.p80, "ms_min": self.minimum}
        return {prefix + name: 1e3 * value for name, value in values.items()}


@dataclass(frozen=True)
class Effort:
    """How long to measure: seconds for all candidates of a comparison together, within a number of rounds."""

    seconds: float = 0.35
    minimum_rounds: int = MINIMUM_ROUNDS
    maximum_rounds: int = MAXIMUM_ROUNDS


QUICK = Effort(seconds=0.0, minimum_rounds=3)


def check(candidates: Mapping[str, Candidate], what: str) -> dict[str, float]:
    """Run each candidate once and compare with what is right.

    Args:
        candidates: by name.
        what: names the comparison where a result is wrong.

    Returns:
        The errors found.

    Raises:
        WrongResult: an error above the candidate's tolerance, or not a number.
    """
    errors = {}
    for name, candidate in candidates.items():
        errors[name] = error = float(candidate.error(candidate.run(0)))
        if not error <= candidate.tolerance:
            raise WrongResult(
                f"{what}: {name}: error {error:.3g} where at most {candidate.tolerance:.3g} is allowed; not timed"
            )
    return errors


def compare(
    candidates: Mapping[str, Candidate],
    *,
    what: str,
    copies: int = 1,
    warm: bool = False,
    effort: Effort = Effort(),
) -> tuple[dict[str, Timing], dict[str, float]]:
    """Check all candidates, then time them in turns.

    Every round has an order of its own, so that none always runs in the caches that the same other one left.

    Args:
        candidates: by name.
        what: names the comparison where a result is wrong.
        copies: how many copies of the input there are; each call takes the next one.
        warm: take copy 0 every time, and run each candidate once right before it is timed.
        effort: how many rounds.

    Returns:
        Timings and errors, by name.

    Raises:
        WrongResult: a candidate's result is wrong; nothing is timed then.
    """
    errors = check(candidates, what)
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    copy = 0

    def run_round() -> None:
        nonlocal copy
        order.shuffle(names)
        for name in names:
            run = candidates[name].run
            copy = 0 if warm else (copy + 1) % copies
            if warm:
                run(copy)
            start = time.perf_counter_ns()
            result = run(copy)
            seconds[name].append(1e-9 * (time.perf_counter_ns() - start))
            del result

    with _no_collection():
        run_round()
        start = time.perf_counter()
        run_round()
        expected = effort.seconds / (time.perf_counter() - start)
        rounds = max(effort.minimum_rounds, min(effort.maximum_rounds, int(expected)))
        for times in seconds.values():
            times.clear()
        for _ in range(rounds):
            run_round()
    return {name: Timing.of(times) for name, times in seconds.items()}, errors


def cold_copies(bytes_per_copy: int) -> int:
    """How many copies of an input it takes so that none is in a cache when its turn comes."""
    return max(2, math.ceil(COLD_CACHES * last_level_cache() / bytes_per_copy))


def thread_counts() -> list[int]:
    """One thread, and two where there are two processors."""
    return [count for count in (1, 2) if count <= processors()]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch's number of threads within."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def require_compiled(op: str) -> None:
    """Refuse to compare where the reference would be compared with itself.

    Raises:
        NotCompiled: and why the compiled kernel does not serve.
    """
    if serving("cpu") != "cpu":
        reason = absent_because("cpu") or f"backend {forced_backend()!r} is forced"
        raise NotCompiled(f"{op} is served by the {serving('cpu')} backend: {reason}")
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", "CPU"):
        raise NotCompiled(f"{op} is served by the reference backend: the compiled library has no kernel for it")


def compiled(function: Callable[..., Any], *example: Any) -> Callable[..., Any]:
    """`torch.compile` of a function for one shape, compiled here and now for the threads in use.

    Args:
        function: what is compiled, as one graph.
        example: the arguments of a first call.
    """
    # What was compiled for other shapes counts against a limit, beyond which the function would run uncompiled.
    torch._dynamo.reset()
    fast = torch.compile(function, fullgraph=True, dynamic=False)
    # In this process: no pool of compilers is left behind on the processors.
    with torch._inductor.config.patch(compile_threads=1):
        fast(*example)
    return fast


class ReadCeiling:
    """The fastest way found to read memory in this process, for the number of threads it is made under.

    Several plain readers go through a buffer far larger than the last-level cache, a piece a call; the fastest is kept
    as a candidate, to be timed in turns with what is measured against it. A piece takes about as long as the larger
    inputs, so that interruptions meet both alike.

    Args:
        caches: size of the buffer, in last-level caches.
        effort: how many rounds choose the reader.
    """

    PIECES = 8

    def __init__(self, caches: float = CEILING_CACHES, effort: Effort = Effort(seconds=1.0)) -> None:
        count = int(caches * last_level_cache()) // 4 // self.PIECES // 4096 * 4096
        self.threads = torch.get_num_threads()
        self.bytes_per_call = 4 * count
        buffer = torch.rand(self.PIECES, count, generator=torch.Generator().manual_seed(0)).add_(0.5)
        pieces = [(piece, *piece.view(2, -1), piece.numpy()) for piece in buffer]
        totals = [piece.sum(dtype=torch.float64).item() for piece in buffer]
        products = [(first.double() @ second.double()).item() for _, first, second, _ in pieces]
        readers: dict[str, tuple[Callable[..., Any], list[float]]] = {
            "torch.sum": (lambda piece, first, second, array: piece.sum(), totals),
            "torch.amax": (lambda piece, first, second, array: piece.amax(), buffer.amax(1).tolist()),
            "torch.dot of two halves": (lambda piece, first, second, array: first.dot(second), products),
            "numpy.sum": (lambda piece, first, second, array: array.sum(), totals),
        }
        candidates = {name: self._candidate(read, pieces, right) for name, (read, right) in readers.items()}
        timings, _ = compare(candidates, what="read ceiling", effort=effort)
        self.gb_per_s = {name: 1e-9 * self.bytes_per_call / timing.median for name, timing in timings.items()}
        self.reader = max(self.gb_per_s, key=self.gb_per_s.__getitem__)
        self.candidate = candidates[self.reader]

    def _candidate(self, read: Callable[..., Any], pieces: list[tuple[Any, ...]], right: list[float]) -> Candidate:
        turn = itertools.cycle(range(self.PIECES))

        def run(copy: int) -> tuple[int, Any]:
            index = next(turn)
            return index, read(*pieces[index])

        def error(found: tuple[int, Any]) -> float:
            index, value = found
            return abs(float(value) / right[index] - 1)

        # Sums of millions of numbers in float32 are not exact; that all of them were read is what matters.
        return Candidate(run, error, 1e-2)

    def record(self) -> dict[str, Any]:
        """How the ceiling was measured, JSON-ready."""
        return {
            "threads": self.threads,
            "buffer_bytes": self.PIECES * self.bytes_per_call,
            "bytes_per_call": self.bytes_per_call,
            "median_gb_per_s": self.gb_per_s,
            "fastest": self.reader,
        }


@contextmanager
def _no_collection() -> Iterator[None]:
    """No garbage collection within: it would fall into one candidate's time."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
