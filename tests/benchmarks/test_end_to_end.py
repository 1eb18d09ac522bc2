"""Explained inference: what is measured, and which limit is for which row."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.speed import bench_end_to_end, bench_growth
from benchmarks.speed.bench_end_to_end import ALL, BLOCKS, COMPILED, FIVE, ONE, OVERHEAD, Case
from benchmarks.speed.measure import QUICK, Effort, WrongResult
from diffcam_fast.benchmark import peers
from diffcam_fast.benchmark.explanations import images

PRESENT = list(peers.PEERS)


def result_row(work: str, network: str, batch: int, **values: float) -> dict[str, Any]:
    found = {"work": work, "network": network, "batch": batch, "classes": 1, "layers": 1, "threads": 2, "rounds": 15}
    found |= {"multiple": 1.0, "multiple_p20": 1.0, "multiple_p80": 1.0, "floor": 1.0, "vs_floor": 1.0}
    found |= {"inference_ms": 10.0}
    for name in PRESENT:
        found |= {name: 2.0, f"vs_{name}": 0.5}
    return {**found, **values}


def test_every_case_is_measured() -> None:
    cases = bench_end_to_end.cases(quick=False)
    networks = ("resnet50", "mobilenet_v2", "efficientnet_b0", "convnext_tiny", "vgg16", "densenet121", "vit_b_16")
    assert {(case.work, case.network.name, case.batch) for case in cases} == {
        *((ONE, name, batch) for name in networks for batch in (1, 8)),
        *((work, "resnet50", 8) for work in (FIVE, ALL, BLOCKS)),
        *((COMPILED, name, batch) for name in ("resnet50", "mobilenet_v2") for batch in (1, 8)),
    }
    assert all(not case.parts for case in cases if case.work in (ONE, FIVE))
    assert len(bench_end_to_end.RESIDUAL_BLOCKS) == 16
    grown = [(point.growing, point.value) for point in bench_growth.points(quick=False)]
    ends = {"batch": (1, 64), "classes": (1, 1000), "layers": (1, 19), "image": (224, 1024)}
    for growing, (least, most) in ends.items():
        values = [value for name, value in grown if name == growing]
        assert values == sorted(values) and (values[0], values[-1]) == (least, most)


@pytest.mark.parametrize(
    ("row", "missed"),
    [
        (result_row(ONE, "resnet50", 1, multiple=1.029), []),
        (result_row(ONE, "resnet50", 1, multiple=1.031), ["batch 1"]),
        (result_row(ONE, "convnext_tiny", 8, multiple=1.02), ["batch 8"]),
        (result_row(ONE, "vgg16", 8, multiple=1.2, vs_floor=1.01), []),
        (result_row(ONE, "vit_b_16", 1, vs_floor=1.03), ["other tails"]),
        (result_row(FIVE, "resnet50", 8, multiple=1.06), ["top 5"]),
        (result_row(ALL, "resnet50", 8, multiple=1.07), []),
        (result_row(ALL, "resnet50", 8, multiple=1.09), ["all 1000"]),
        (result_row(BLOCKS, "resnet50", 8, multiple=2.4, vs_floor=1.03), ["every residual block"]),
        (result_row(ONE, "resnet50", 1, vs_torchcam=1.01), ["less than torchcam"]),
        (result_row(BLOCKS, "resnet50", 8, vs_captum=1.01), ["less than captum"]),
        (result_row(OVERHEAD, "small network", 1, multiple=4.0, vs_torchcam=2.0), []),
        (result_row(COMPILED, "resnet50", 8, multiple=1.5, inference_vs_eager=0.8, vs_eager=0.99), []),
        (result_row(COMPILED, "resnet50", 8, inference_vs_eager=0.8, vs_eager=1.01), ["compiled"]),
        (result_row(COMPILED, "resnet50", 8, inference_vs_eager=1.1, vs_eager=1.2), []),
    ],
)
def test_each_limit_is_for_its_rows(row: dict[str, Any], missed: list[str]) -> None:
    found = [bar.text for bar in bench_end_to_end.bars(PRESENT, [row]) if bar.missed(row)]
    assert len(found) == len(missed)
    assert all(text in bar for text, bar in zip(missed, found, strict=True))


def test_reasons_for_missed_limits_are_measured() -> None:
    rows = [
        result_row(ONE, "resnet50", 1, multiple=1.2, beyond_floor_us=1500.0, vs_torchcam=1.01),
        result_row(OVERHEAD, "small network", 1, ours_overhead_us=250.0),
    ]
    reasons = {bar.text: bar.reason for bar in bench_end_to_end.bars(PRESENT, rows) if bar.reason}
    (cost,) = reasons.values()
    assert "1.000 to 1.000 times inference" in cost and "1500 to 1500 microseconds (250 on" in cost


@pytest.mark.parametrize(("inference_vs_eager", "expected"), [(0.995, "saves 0.5% to 0.5% of"), (0.8, "")])
def test_where_compiling_saves_next_to_nothing_it_is_said(inference_vs_eager: float, expected: str) -> None:
    rows = [result_row(COMPILED, "resnet50", 1, multiple=1.02, inference_vs_eager=inference_vs_eager, vs_eager=1.01)]
    (bar,) = [bar for bar in bench_end_to_end.bars(PRESENT, rows) if bar.missed(rows[0])]
    assert expected in bar.reason and bool(bar.reason) == bool(expected)


def test_who_is_even_is_said_to_be() -> None:
    even = result_row(ONE, "vit_b_16", 1, vs_torchcam=1.01, vs_torchcam_low=0.98, vs_torchcam_high=1.02)
    slower = result_row(ONE, "vit_b_16", 8, vs_torchcam=1.05, vs_torchcam_low=1.03, vs_torchcam_high=1.06)
    for rows, expected in (
        ([even], "cannot be told apart in this row: the 95 % interval of the quotient is 0.980 to 1.020"),
        ([even, slower], "cannot be told apart in 1 of 2: the 95 % interval of the quotient is 0.980 to 1.020"),
        ([slower], ""),
    ):
        (bar,) = [bar for bar in bench_end_to_end.bars(PRESENT, rows) if bar.text == "less than torchcam"]
        assert bar.reason.endswith(expected) and bool(bar.reason) == bool(expected)


def test_others_get_the_part_that_the_case_names() -> None:
    torch.manual_seed(0)
    convolution, head = nn.Conv2d(3, 8, 3, stride=2), nn.Linear(8, 1000)
    model = nn.Sequential(convolution, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).eval()
    network = bench_end_to_end.Network("example", "1")
    case = Case(ALL, network, 2, {"plain": (3, 1)})
    work = bench_end_to_end.work_of(case, model, 32)
    assert work.classes.shape == (2, 1000) and not work.at_input_size

    (maps,) = bench_end_to_end.others_of(case, work)["plain"].run(0)
    assert maps.shape == (2, 3, 15, 15)
    product = bench_end_to_end.floor_of(case, work).candidate.run(0)
    torch.testing.assert_close(product, head.weight @ model[:2](images(2, (32, 32))).flatten(2))


def test_compiled_explanations(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)]
    # No C++ compiler: seconds instead of minutes.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    case = Case(COMPILED, bench_end_to_end.Network("example", "1"), 2)
    once = Effort(minimum_rounds=1, maximum_rounds=1)
    found = bench_end_to_end.measure_compiled(case, nn.Sequential(*layers).eval(), once, 32)
    assert found["multiple"] == pytest.approx(found["ours_ms"] / found["inference_ms"])
    assert found["vs_eager"] == pytest.approx(found["ours_ms"] / found["eager_ms"])
    assert found["inference_vs_eager"] == pytest.approx(found["inference_ms"] / found["eager_ms"])
    assert 0 <= found["error"] < 1e-4
    found_report = bench_end_to_end.report([result_row(ONE, "resnet50", 8), found], {})
    assert "Compiled, one class, last layer" in [table.title for table in found_report.tables]


def test_compiled_explanations_that_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)]
    # Compiles the model into something else.
    compiled = partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(
        torch,
        "compile",
        lambda function, **options: (
            (lambda images: 2 * function(images)) if isinstance(function, nn.Module) else compiled(function, **options)
        ),
    )
    case = Case(COMPILED, bench_end_to_end.Network("example", "1"), 2)
    with pytest.raises(
        WrongResult, match="compiled, one class, last layer, example, batch 2: inference: error 1 where"
    ):
        bench_end_to_end.measure_compiled(case, nn.Sequential(*layers).eval(), QUICK, 32)


def test_a_part_is_said_to_be_one() -> None:
    rows = [
        result_row(ONE, "resnet50", 8),
        result_row(ALL, "resnet50", 8, classes=1000, torchcam_classes=50, torchcam_layers=1),
    ]
    found = bench_end_to_end.report(rows, {"captum": "No module named 'captum'"})
    assert "**for that part\nalone**: torchcam 50 of 1000 classes (all 1000 classes)." in found.introduction
    assert "not to be had here: captum (No module named 'captum')" in found.introduction


def test_overhead_of_a_call() -> None:
    found = bench_end_to_end.overhead(QUICK)
    least = found["inference_ms"] + found["bare_ms"]
    assert found["ours_overhead_us"] == pytest.approx(1e3 * (found["ours_ms"] - least))
    assert found["plain_overhead_us"] == pytest.approx(1e3 * (found["plain_ms"] - least))
