"""Timing that can be trusted: checked values, alternating candidates, cold inputs, read bandwidth beside them."""

from __future__ import annotations

import gc
import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from diffcam_fast.benchmark.machine import last_level_cache, processors

#: Cold inputs come round again only after this many times the last-level cache was read.
COLD_CACHES = 4
#: Size of the buffer that the read ceiling is measured on, in last-level caches.
CEILING_CACHES = 8

MINIMUM_ROUNDS = 15
MAXIMUM_ROUNDS = 200

#: Candidates that take longer together than this are warm after one round.
LONG_ROUND_SECONDS = 1.0


class WrongResult(Exception):
    """A candidate computed something else; no speed is reported for it."""


@dataclass(frozen=True)
class Candidate:
    """Something to time, which has to be right first."""

    run: Callable[[int], Any]
    """Takes the number of a copy of the input."""

    error: Callable[[Any], float]
    """How far a result of copy 0 is from what is right."""

    tolerance: float

    rest: float = 0.0
    """Seconds that nobody is timed after each call, where it leaves something running."""


@dataclass(frozen=True)
class Timing:
    """Seconds a call, over all rounds."""

    median: float
    p20: float
    p80: float
    minimum: float
    rounds: int
    seconds: tuple[float, ...] = field(repr=False)
    """Of each round, in turn."""

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """Summary of the rounds' times."""
        return cls(*_spread(seconds), min(seconds), len(seconds), tuple(seconds))

    def milliseconds(self, prefix: str = "") -> dict[str, float]:
        """The summary as columns of a row."""
        values = {"ms": self.median, "ms_p20": self.p20, "ms_p80": self.p80, "ms_min": self.minimum}
        return {prefix + name: 1e3 * value for name, value in values.items()}

    def multiple(self, name: str, *others: Timing) -> dict[str, float]:
        """This time as a multiple of others' together, as columns of a row.

        A machine that is shared is not as fast in every minute. What shares a round shares that, so that it is single
        rounds whose times are compared.

        Args:
            name: of the column: the median of the quotients of single rounds. With `_p20` and `_p80` behind it, their
                spread.
            *others: from the same comparison.
        """
        median, low, high = _spread(self._quotients(others))
        return {name: median, f"{name}_p20": low, f"{name}_p80": high}

    def beyond(self, *others: Timing) -> float:
        """Seconds that this takes more than others together: the median over rounds."""
        rounds = zip(self.seconds, *(other.seconds for other in others), strict=True)
        return statistics.median(mine - sum(theirs) for mine, *theirs in rounds)

    def interval(self, name: str, *others: Timing) -> dict[str, float]:
        """Between what the median of the quotients of single rounds is, in 95 of 100 comparisons like this one.

        Args:
            name: of the multiple; the columns have `_low` and `_high` behind it.
            *others: from the same comparison.
        """
        low, high = median_interval(self._quotients(others))
        return {f"{name}_low": low, f"{name}_high": high}

    def _quotients(self, others: Sequence[Timing]) -> list[float]:
        rounds = zip(self.seconds, *(other.seconds for other in others), strict=True)
        return [mine / sum(theirs) for mine, *theirs in rounds]


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % confidence interval of a median, whatever the distribution, by order statistics.

    From five values down, the smallest and the largest: more cannot be said.
    """
    ordered = sorted(values)
    count = len(ordered)
    below, tail = 0, 1
    # Who cuts off as many values on either side as a fair coin seldom shows heads is wrong in 1 of 40 on each.
    while 40 * tail <= 2**count:
        below += 1
        tail += math.comb(count, below)
    cut = max(below - 1, 0)
    return ordered[cut], ordered[count - 1 - cut]


def _spread(values: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)]


@dataclass(frozen=True)
class Effort:
    """How long to measure: seconds for all candidates of a comparison together, within a number of rounds."""

    seconds: float = 0.35
    minimum_rounds: int = MINIMUM_ROUNDS
    maximum_rounds: int = MAXIMUM_ROUNDS


QUICK = Effort(seconds=0.0, minimum_rounds=3)


class Clock(Protocol):
    """Takes the time of one call."""

    def __call__(self, run: Callable[[int], Any], copy: int) -> float:
        """Seconds that `run(copy)` takes."""
        ...


class WallClock:
    """Seconds until the result is there, on a GPU as well."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._asynchronous = self._device.type == "cuda"

    def __call__(self, run: Callable[[int], Any], copy: int) -> float:
        """Run and wait; the result is freed outside the measured time."""
        start = time.perf_counter_ns()
        result = run(copy)
        if self._asynchronous:
            torch.cuda.synchronize(self._device)
        seconds = 1e-9 * (time.perf_counter_ns() - start)
        del result
        return seconds


class GpuClock:
    """Seconds that a GPU works on a call, by its own clock.

    A buffer twice the size of its last-level cache is cleared first. So inputs are cold, and the call is enqueued while
    the GPU is still busy: what the processor needs to launch it is not in the time.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._flushed = torch.empty(2 * last_level_cache(device), dtype=torch.int8, device=device)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, run: Callable[[int], Any], copy: int) -> float:
        """Flush, run, wait."""
        with torch.cuda.device(self._flushed.device):
            self._flushed.zero_()
            self._start.record()
            result = run(copy)
            self._end.record()
            self._end.synchronize()
            seconds = 1e-3 * self._start.elapsed_time(self._end)
        del result
        return seconds


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
        _rest(candidate)
        if not error <= candidate.tolerance:
            raise WrongResult(
                f"{what}: {name}: error {error:.3g} where at most {candidate.tolerance:.3g} is allowed; not timed"
            )
    return errors


def _rest(candidate: Candidate) -> None:
    if candidate.rest:
        time.sleep(candidate.rest)


def compare(
    candidates: Mapping[str, Candidate],
    *,
    what: str,
    copies: int = 1,
    warm: bool = False,
    effort: Effort = Effort(),
    clock: Clock = WallClock(),  # noqa: B008 (without state)
) -> tuple[dict[str, Timing], dict[str, float]]:
    """Check all candidates, then time them in turns.

    Every round has an order of its own, so that none always runs in the caches that the same other one left.

    Args:
        candidates: by name.
        what: names the comparison where a result is wrong.
        copies: how many copies of the input there are; each call takes the next one.
        warm: take copy 0 every time, and run each candidate once right before it is timed.
        effort: how many rounds.
        clock: takes the time of each call.

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

    def run_round() -> float:
        nonlocal copy
        start = time.perf_counter()
        order.shuffle(names)
        for name in names:
            candidate = candidates[name]
            copy = 0 if warm else (copy + 1) % copies
            if warm:
                candidate.run(copy)
            seconds[name].append(clock(candidate.run, copy))
            _rest(candidate)
        return time.perf_counter() - start

    with _no_collection():
        expected = run_round()
        if expected < LONG_ROUND_SECONDS:
            expected = run_round()
        rounds = max(effort.minimum_rounds, min(effort.maximum_rounds, int(effort.seconds / expected)))
        for times in seconds.values():
            times.clear()
        for _ in range(rounds):
            run_round()
    return {name: Timing.of(times) for name, times in seconds.items()}, errors


def cold_copies(bytes_per_copy: int, device: torch.device | str = "cpu") -> int:
    """How many copies of an input it takes so that none is in a cache when its turn comes."""
    return max(2, math.ceil(COLD_CACHES * last_level_cache(device) / bytes_per_copy))


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


def in_words(count: int) -> str:
    """A number of threads."""
    return f"{count} thread{'s' if count > 1 else ''}"


class ReadCeiling:
    """The fastest way found to read memory in this process, for the number of threads it is made under.

    Several plain readers go through a buffer far larger than the last-level cache, a piece a call; the fastest is kept
    as a candidate, to be timed in turns with what is measured against it. A piece takes about as long as the larger
    inputs, so that interruptions meet both alike.

    Args:
        caches: size of the buffer, in last-level caches.
        effort: how many rounds choose the reader.
        device: whose memory is read.
        clock: takes the time of each call.
    """

    PIECES = 8

    def __init__(
        self,
        caches: float = CEILING_CACHES,
        effort: Effort = Effort(seconds=1.0),
        device: torch.device | str = "cpu",
        clock: Clock = WallClock(),  # noqa: B008 (without state)
    ) -> None:
        count = int(caches * last_level_cache(device)) // 4 // self.PIECES // 4096 * 4096
        self.threads = torch.get_num_threads()
        self.bytes_per_call = 4 * count
        buffer = torch.rand(self.PIECES, count, generator=torch.Generator().manual_seed(0)).add_(0.5)
        totals = [piece.sum(dtype=torch.float64).item() for piece in buffer]
        products = [(first.double() @ second.double()).item() for first, second in buffer.view(self.PIECES, 2, -1)]
        largest = buffer.amax(1).tolist()
        arrays = [piece.numpy() for piece in buffer]
        buffer = buffer.to(device)
        pieces = [(piece, *piece.view(2, -1)) for piece in buffer]
        readers: dict[str, tuple[Callable[[int], Any], list[float]]] = {
            "torch.sum": (lambda index: pieces[index][0].sum(), totals),
            "torch.amax": (lambda index: pieces[index][0].amax(), largest),
            "torch.dot of two halves": (lambda index: pieces[index][1].dot(pieces[index][2]), products),
        }
        if buffer.device.type == "cpu":
            readers["numpy.sum"] = (lambda index: arrays[index].sum(), totals)
        candidates = {name: self._candidate(read, right) for name, (read, right) in readers.items()}
        timings, _ = compare(candidates, what="read ceiling", effort=effort, clock=clock)
        self.gb_per_s = {name: 1e-9 * self.bytes_per_call / timing.median for name, timing in timings.items()}
        self.reader = max(self.gb_per_s, key=self.gb_per_s.__getitem__)
        self.candidate = candidates[self.reader]

    def _candidate(self, read: Callable[[int], Any], right: list[float]) -> Candidate:
        turn = itertools.cycle(range(self.PIECES))

        def run(copy: int) -> tuple[int, Any]:
            index = next(turn)
            return index, read(index)

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
