"""Summaries of times, and the clocks that take them."""

from __future__ import annotations

import pytest
import torch

from diffcam_fast.benchmark.machine import last_level_cache
from diffcam_fast.benchmark.measure import QUICK, Candidate, GpuClock, ReadCeiling, Timing, WallClock, check, compare


def test_multiples_are_quotients_of_medians_with_the_spread_of_rounds() -> None:
    mine, inference, bare = (Timing.of(seconds) for seconds in ([2.0, 9.0, 4.0], [1.0, 3.0, 2.0], [1.0, 1.5, 2.0]))
    assert mine.multiple("multiple", inference) == {"multiple": 2.0, "multiple_p20": 2.0, "multiple_p80": 3.0}
    spread = mine.multiple("vs", inference, bare)
    assert spread["vs"] == pytest.approx(4.0 / 3.5)
    assert spread["vs_p20"] == pytest.approx(1.0)  # the rounds: 2 / 2, 9 / 4.5, 4 / 4
    assert Timing.of([1.0, 2.0, 3.0, 4.0, 10.0]).p80 == 4.0


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
