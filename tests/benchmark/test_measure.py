"""Summaries of times, and the clocks that take them."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time

import pytest
import torch

from diffcam_fast.benchmark.machine import last_level_cache
from diffcam_fast.benchmark.measure import (
    QUICK,
    Candidate,
    GpuClock,
    ReadCeiling,
    Timing,
    WallClock,
    check,
    compare,
    median_interval,
)


def test_multiples_are_those_of_single_rounds() -> None:
    mine, inference, bare = (Timing.of(seconds) for seconds in ([2.0, 9.0, 4.0], [1.0, 3.0, 2.0], [1.0, 1.5, 2.0]))
    assert mine.multiple("multiple", inference) == {"multiple": 2.0, "multiple_p20": 2.0, "multiple_p80": 3.0}
    spread = mine.multiple("vs", inference, bare)  # 2 / 2, 9 / 4.5, 4 / 4
    assert spread == {"vs": 1.0, "vs_p20": 1.0, "vs_p80": 2.0}
    assert mine.beyond(inference) == 2.0  # 1, 6, 2
    assert mine.beyond(inference, bare) == 0.0  # 0, 4.5, 0
    # All that a round has in common with itself cancels.
    slow = [Timing.of([7.0 * seconds for seconds in timing.seconds]) for timing in (mine, inference)]
    assert slow[0].multiple("multiple", slow[1])["multiple"] == 2.0
    assert Timing.of([1.0, 2.0, 3.0, 4.0, 10.0]).p80 == 4.0


def test_interval_of_a_median() -> None:
    # Tables of the sign test: with 15 values the fourth from either end, with 6 the first, with fewer there is none.
    assert median_interval(range(15, 0, -1)) == (4, 12)
    assert median_interval([3.0, 1.0, 2.0, 6.0, 5.0, 4.0]) == (1.0, 6.0)
    assert median_interval([2.0, 1.0]) == (1.0, 2.0) and median_interval([7.0]) == (7.0, 7.0)
    generator = torch.Generator().manual_seed(0)
    for count in (9, 20, 61):
        samples = torch.rand(4000, count, generator=generator).tolist()
        found = [median_interval(sample) for sample in samples]
        assert 0.94 < sum(low <= 0.5 <= high for low, high in found) / len(found) < 0.985


def test_a_slower_one_is_told_from_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = (1 + 0.02 * torch.randn(3, 60, generator=generator)).tolist()
    one, other = Timing.of(noise[0]), Timing.of(noise[1])
    slower = Timing.of([1.03 * seconds for seconds in noise[2]])
    even = one.interval("faster", other)
    assert even["faster_low"] < 1 < even["faster_high"]
    assert one.interval("faster", slower)["faster_high"] < 1


def test_nobody_is_timed_while_a_candidate_rests() -> None:
    called: list[float] = []

    def run(copy: int) -> None:
        called.append(time.perf_counter())

    timings, _ = compare({"one": Candidate(run, lambda found: 0.0, 0.0, rest=0.02)}, what="example", effort=QUICK)
    assert min(later - sooner for sooner, later in itertools.pairwise(called)) >= 0.02
    assert timings["one"].median < 0.02


def test_freed_memory_stays_with_the_process() -> None:
    # In a process of its own, for which it cannot be undone.
    program = """
import json, resource, sys, torch
from diffcam_fast.benchmark import machine
kept = "keep" in sys.argv and machine.keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    [torch.ones(40 << 20, dtype=torch.uint8) for _ in range(4)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(json.dumps([kept, machine.describe("a test")["machine"]["keeps_freed_memory"], sum(faults() for _ in range(4))]))
"""
    (given, _, often), (kept, recorded, seldom) = (
        json.loads(subprocess.run([sys.executable, "-c", program, *more], capture_output=True, check=True).stdout)
        for more in ([], ["keep"])
    )
    if not kept:
        pytest.skip("another C library than glibc")
    assert not given and recorded
    assert seldom < 0.5 * often


def test_long_rounds_are_not_repeated_for_warmth() -> None:
    calls = 0

    def run(copy: int) -> None:
        nonlocal calls
        calls += 1

    compare(
        {"one": Candidate(run, lambda found: 0.0, 0.0)},
        what="example",
        effort=QUICK,
        clock=lambda run, copy: (run(copy), 1.0)[1],
    )
    assert calls == 1 + 2 + 3  # a check, two short rounds for warmth, three that count


def test_read_ceiling_reads_everything() -> None:
    ceiling = ReadCeiling(caches=1, effort=QUICK)
    record = ceiling.record()
    assert set(record["median_gb_per_s"]) == {"torch.sum", "torch.amax", "torch.dot of two halves", "numpy.sum"}
    assert record["buffer_bytes"] == pytest.approx(last_level_cache(), rel=0.01)
    assert check({"ceiling": ceiling.candidate}, "ceiling")["ceiling"] < 1e-2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_clock_of_a_gpu_takes_the_work_and_not_the_launch() -> None:
    device = torch.device("cuda")
    values = torch.ones(64 << 20, device=device)
    clock = GpuClock(device)
    small, large = (
        min(clock(lambda copy, part=part: part.sum(), 0) for _ in range(5)) for part in (values[:8], values)
    )
    assert 0 < small < large < WallClock(device)(lambda copy: values.double().sum(), 0)
