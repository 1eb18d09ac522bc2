"""Times of our ops by themselves, for tracking regressions with pytest-benchmark.

    pytest benchmarks/speed --benchmark-only --benchmark-autosave
    pytest benchmarks/speed --benchmark-only --benchmark-compare

The comparison with other implementations is not made here: it needs candidates that alternate, see `bench_cam.py` and
`bench_logit_difference.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from benchmarks.speed import bench_cam, bench_logit_difference
from benchmarks.speed.measure import check
from diffcam_fast.reference.cam import METHODS

#: pytest-benchmark's fixture.
Benchmark = Callable[..., object]


@pytest.mark.parametrize("layout", bench_cam.LAYOUTS)
@pytest.mark.parametrize("shape", bench_cam.SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("method", METHODS)
def test_cam(benchmark: Benchmark, method: str, shape: bench_cam.Shape, layout: str) -> None:
    inputs = bench_cam.Inputs(shape, layout, torch.float32)
    ours = bench_cam.ours(method, inputs)
    check({"ours": ours}, "cam")
    turn = itertools.cycle(range(len(inputs.copies)))
    benchmark(lambda: ours.run(next(turn)))


@pytest.mark.parametrize(
    "case",
    bench_logit_difference.cases(quick=False),
    ids=lambda case: "-".join(str(value) for value in case.columns().values()),
)
def test_logit_difference(benchmark: Benchmark, case: bench_logit_difference.Case) -> None:
    ours = bench_logit_difference.ours(case)
    check({"ours": ours}, "logit_difference")
    benchmark(ours.run, 0)
