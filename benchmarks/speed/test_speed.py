"""Times of our ops and of explained inference by themselves, for tracking regressions with pytest-benchmark.

    pytest benchmarks/speed --benchmark-only --benchmark-autosave
    pytest benchmarks/speed --benchmark-only --benchmark-compare

The comparison with other implementations is not made here: it needs candidates that alternate, see the modules
`bench_*.py`.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from benchmarks.speed import bench_cam, bench_end_to_end, bench_logit_difference, bench_overlay, bench_saliency_contrast
from benchmarks.speed.measure import check
from benchmarks.speed.networks import SIZE
from diffcam_fast.benchmark import explanations
from diffcam_fast.reference.cam import METHODS

#: pytest-benchmark's fixture.
Benchmark = Any


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


@pytest.mark.parametrize(
    "case",
    bench_overlay.cases(quick=False),
    ids=lambda case: "-".join(str(value) for value in case.columns().values()),
)
def test_overlay(benchmark: Benchmark, case: bench_overlay.Case) -> None:
    ours = bench_overlay.ours(bench_overlay.Inputs(case))
    check({"ours": ours}, "overlay")
    benchmark(ours.run, 0)


@pytest.mark.parametrize(
    "case",
    bench_saliency_contrast.cases(quick=False),
    ids=lambda case: "-".join(str(value) for value in case.columns().values()),
)
def test_saliency_contrast(benchmark: Benchmark, case: bench_saliency_contrast.Case) -> None:
    ours = bench_saliency_contrast.ours(bench_saliency_contrast.Inputs(case))
    check({"ours": ours}, "saliency_contrast")
    benchmark(ours.run, 0)


@pytest.mark.parametrize("explained", [False, True], ids=["inference", "explained"])
@pytest.mark.parametrize("case", bench_end_to_end.cases(quick=False), ids=lambda case: case.what.replace(", ", "-"))
def test_end_to_end(benchmark: Benchmark, case: bench_end_to_end.Case, explained: bool) -> None:
    pytest.importorskip("tests.helpers.torchvision_cpu")
    work = bench_end_to_end.work_of(case, case.network.build(), SIZE)
    ours, inference = explanations.ours(work), explanations.inference(work)
    check({"ours": ours, "inference": inference}, case.what)
    benchmark.pedantic((ours if explained else inference).run, args=(0,), rounds=15, warmup_rounds=1)
