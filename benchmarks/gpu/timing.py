"""Times on a GPU: events, candidates in turns, cold inputs, graphs of many launches, and the copy ceiling."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.speed.measure import Candidate, Timing, check

Run = Callable[[int], Any]

#: Inputs come round again only after this many times the last-level cache was read.
COLD_CACHES = 4

#: Calls that are timed together where one by one would time the clock.
CALLS_AT_A_TIME = 200

#: Upper bound of the clock rate of a GPU, to turn seconds into cycles.
CYCLES_PER_SECOND = 2e9

#: The longest that a round is held back.
LONGEST_HEAD_START = 0.05


@dataclass(frozen=True)
class Settings:
    """Where and how long to measure."""

    device: str = "cuda"
    """"cpu": a smoke run of everything but the numbers."""

    quick: bool = False
    """Smallest inputs, three rounds."""

    deadline: float = math.inf
    """On the monotonic clock; nothing is begun that does not fit."""

    seconds: float = 0.15
    """For the rounds of one comparison."""

    @property
    def on_gpu(self) -> bool:
        """Whether this is a measurement."""
        return self.device == "cuda"

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def rounds(self, seconds_a_round: float) -> int:
        """How many rounds to time."""
        if self.quick:
            return 3
        return max(15, min(100, int(self.seconds / max(seconds_a_round, 1e-9))))

    def cold_copies(self, bytes_per_copy: int) -> int:
        """How many copies of an input it takes so that none is in a cache when its turn comes."""
        if self.quick:
            return 2
        return max(2, math.ceil(COLD_CACHES * last_level_cache() / bytes_per_copy))


def last_level_cache() -> int:
    """Bytes of the GPU's L2 cache."""
    return int(torch.cuda.get_device_properties("cuda").L2_cache_size)


class CopyCeiling:
    """The bandwidth of this GPU's memory: a plain copy from one large buffer to another, bytes read plus written."""

    def __init__(self, settings: Settings) -> None:
        count = 1 << 16 if settings.quick else 1 << 28
        source = torch.rand(count, generator=torch.Generator(settings.device).manual_seed(0), device=settings.device)
        target = torch.zeros_like(source)
        self.bytes_per_call = 2 * source.numel() * source.element_size()
        self.candidate = Candidate(
            lambda copy: target.copy_(source), lambda found: float(not torch.equal(found, source)), 0.0
        )

    def gb_per_s(self, timing: Timing) -> float:
        """Bandwidth of a timed copy."""
        return 1e-9 * self.bytes_per_call / timing.median


def compare(
    candidates: Mapping[str, Candidate], what: str, copies: int, settings: Settings
) -> tuple[dict[str, Timing], dict[str, float]]:
    """Check all candidates, then time them in turns with events; timings and errors by name.

    Raises:
        WrongResult: a candidate's result is wrong; nothing is timed then.
    """
    errors = check(candidates, what)
    return in_turns({name: candidate.run for name, candidate in candidates.items()}, copies, settings), errors


def in_turns(runs: Mapping[str, Run], copies: int, settings: Settings, launches: int = 1) -> dict[str, Timing]:
    """Seconds that the device works on a call, candidates in turns and in an order of its own every round.

    A round is queued behind a pause, so that the device finds each call waiting: what the processor needs to launch it
    is in nobody's time.

    Args:
        runs: by name; each takes the number of a copy of the input.
        copies: how many copies there are; each call takes the next one.
        settings: how long.
        launches: how many calls one run stands for.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names, order, copy = list(runs), random.Random(0), 0
    head_start = 0.0

    def run_round() -> tuple[float, float]:
        nonlocal copy
        order.shuffle(names)
        took: dict[str, Callable[[], float]] = {}
        if settings.on_gpu and head_start:
            torch.cuda._sleep(int(head_start * CYCLES_PER_SECOND))
        began = time.perf_counter()
        for name in names:
            copy = (copy + 1) % copies
            took[name] = _timed(runs[name], copy, settings)
        queued = time.perf_counter() - began
        for name, read in took.items():
            seconds[name].append(read() / launches)
        return queued, time.perf_counter() - began

    for _ in range(3):
        # Set up by what comes first; the pause is for what takes its time every time.
        queued, spent = run_round()
    head_start = min(1.5 * queued, LONGEST_HEAD_START)
    for times in seconds.values():
        times.clear()
    for _ in range(settings.rounds(spent + head_start)):
        run_round()
    return {name: Timing.of(times) for name, times in seconds.items()}


def _timed(run: Run, copy: int, settings: Settings) -> Callable[[], float]:
    """Queue a call; what is returned waits for it and gives its seconds."""
    if not settings.on_gpu:
        start_time = time.perf_counter()
        run(copy)
        took = time.perf_counter() - start_time
        return lambda: took
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run(copy)
    end.record()

    def read() -> float:
        end.synchronize()
        return 1e-3 * start.elapsed_time(end)

    return read


def captured(run: Run, copies: int, launches: int, settings: Settings) -> Run:
    """A graph of many calls, as a function that replays it. Each call's results have memory of their own."""
    if not settings.on_gpu:
        return lambda copy: [run(index % copies) for index in range(launches)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(0)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [run(index % copies) for index in range(launches)]

    def replay(copy: int, kept: Any = kept) -> None:
        graph.replay()

    return replay


def whole_calls(runs: Mapping[str, Callable[[], Any]], settings: Settings) -> dict[str, Timing]:
    """Seconds a call by the processor's clock, many calls at a time, from the first to when the device is done."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names, order = list(runs), random.Random(0)
    calls = 3 if settings.quick else CALLS_AT_A_TIME
    for turn in range(3 if settings.quick else 40):
        order.shuffle(names)
        for name in names:
            run = runs[name]
            began = time.perf_counter()
            for _ in range(calls):
                run()
            synchronize(settings)
            if turn >= 2 or settings.quick:
                seconds[name].append((time.perf_counter() - began) / calls)
    return {name: Timing.of(times) for name, times in seconds.items()}


def latencies(runs: Mapping[str, Run], settings: Settings) -> dict[str, Timing]:
    """Seconds until a result is there, by the processor's clock, candidates in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names, order = list(runs), random.Random(0)

    def run_round() -> float:
        order.shuffle(names)
        started = time.perf_counter()
        for name in names:
            began = time.perf_counter()
            result = runs[name](0)
            synchronize(settings)
            seconds[name].append(time.perf_counter() - began)
            del result
        return time.perf_counter() - started

    run_round()
    spent = run_round()
    for times in seconds.values():
        times.clear()
    for _ in range(settings.rounds(spent)):
        run_round()
    return {name: Timing.of(times) for name, times in seconds.items()}


def synchronize(settings: Settings) -> None:
    """Wait for the device."""
    if settings.on_gpu:
        torch.cuda.synchronize()
