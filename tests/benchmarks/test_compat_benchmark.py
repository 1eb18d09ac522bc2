"""Drop-ins beside the originals: what is measured, what is refused, and which limit is for which row."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import environment, report, run, tables
from benchmarks.speed import bench_compat
from benchmarks.speed.bench_compat import LIBRARIES, Case, Library, Scene
from benchmarks.speed.measure import QUICK, WrongResult
from diffcam_fast.benchmark import peers
from diffcam_fast.benchmark.explanations import images

EVERY_BATCH, FEW_BATCHES = (1, 8, 32), (1, 8)


def result_row(library: str, method: str, network: str, batch: int, **values: float) -> dict[str, Any]:
    found = {"library": LIBRARIES[library].title, "class": method, "network": network, "batch": batch, "threads": 2}
    found |= {"rounds": 5, "error": 1e-6, "faster": 3.1, "faster_p20": 3.0, "faster_p80": 3.2}
    found |= {"faster_low": 3.05, "faster_high": values.get("faster", 3.1) + 0.05}
    for prefix in ("", "original_"):
        found |= {f"{prefix}{name}": 10.0 for name in ("ms", "ms_p20", "ms_p80", "ms_min")}
    return {**found, **values}


def test_every_class_is_measured() -> None:
    found: dict[tuple[str, str, str], list[int]] = {}
    for case in bench_compat.cases(quick=False):
        found.setdefault((case.library, case.method, case.network.name), []).append(case.batch)
    expected = {
        "pytorch_grad_cam": {
            **dict.fromkeys(("GradCAM", "HiResCAM", "GradCAMElementWise", "GradCAMPlusPlus", "XGradCAM"), EVERY_BATCH),
            **dict.fromkeys(("LayerCAM", "FinerCAM"), EVERY_BATCH),
            **dict.fromkeys(("EigenCAM", "EigenGradCAM"), FEW_BATCHES),
        },
        "torchcam": {
            **dict.fromkeys(("GradCAM", "GradCAMpp", "XGradCAM", "LayerCAM", "FinerCAM", "CAM"), EVERY_BATCH),
            "SmoothGradCAMpp": FEW_BATCHES,
        },
        "captum": {"LayerGradCam": EVERY_BATCH},
    }
    assert {key: tuple(batches) for key, batches in found.items()} == {
        (library, method, network): batches
        for library, methods in expected.items()
        for method, batches in methods.items()
        for network in ("resnet50", "mobilenet_v2")
    }


class Mean:
    """A library's class: the mean over channels of the layer's output, times a factor."""

    factor = 1.0

    def __init__(self, model: nn.Module, again: float = 1.0) -> None:
        self.model = model
        self.again = again

    def __call__(self, images: Tensor) -> Tensor:
        return self.again * self.factor * self.model(images).mean(1)


def libraries(monkeypatch: pytest.MonkeyPatch, original: float, ours: float, **options: Any) -> Library:
    """A library and its drop-in, whose maps are those of `Mean` times a factor each."""
    modules = {
        name: SimpleNamespace(Mean=type("Mean", (Mean,), {"factor": factor}))
        for name, factor in (("theirs", original), ("ours", ours))
    }
    monkeypatch.setattr(bench_compat.importlib, "import_module", modules.__getitem__)

    def set_up(library: ModuleType, name: str, model: nn.Module, scene: Scene, **options: float) -> bench_compat.Call:
        method = getattr(library, name)(model, **options)
        return lambda: method(scene.images).detach()

    return Library("example", "theirs", "ours", ("Mean",), set_up, options=options)


def measured(library: Library, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setitem(bench_compat.LIBRARIES, "example", library)
    torch.manual_seed(0)
    scene = Scene(nn.Conv2d(3, 4, 3), "", images(4, (16, 16)), [0] * 4)
    return bench_compat.measure(Case("example", "Mean", bench_compat.NETWORKS[1], 2), scene, QUICK)


def test_the_same_maps_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    row = measured(libraries(monkeypatch, 1.0, 1.000001), monkeypatch)
    assert row["batch"] == 2 and 0 < row["error"] < 1e-5
    assert row["faster"] == pytest.approx(row["original_ms"] / row["ms"])
    assert row["faster_p20"] <= row["faster_p80"] and row["faster_low"] <= row["faster_high"]


def test_options_are_for_ours_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured(libraries(monkeypatch, 1.0, 0.25, Mean={"again": 4.0}), monkeypatch)["error"] == 0


@pytest.mark.parametrize("wrong", (1.001, float("nan"), 0.0))
def test_other_maps_than_the_originals_are_not_timed(wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WrongResult, match=r"example Mean, mobilenet_v2, batch 2: ours: error .* not timed"):
        measured(libraries(monkeypatch, 1.0, wrong), monkeypatch)


@pytest.mark.parametrize("empty", (0.0, float("nan")))
def test_empty_maps_prove_nothing(empty: float, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WrongResult, match="original: error inf"):
        measured(libraries(monkeypatch, empty, empty), monkeypatch)


def test_maps_of_another_shape_or_dtype_are_not_the_same() -> None:
    maps = torch.rand(2, 3, 4)
    assert bench_compat.difference(maps, maps) == 0
    assert bench_compat.difference(maps[:1], maps) == bench_compat.difference(maps.double(), maps) == float("inf")
    # Each image counts by its own range.
    small = torch.stack([maps[0], 1e-3 * maps[1]])
    moved = small + torch.tensor([0.0, 1e-4]).view(2, 1, 1)
    assert bench_compat.difference(moved, small) > 0.05


@pytest.mark.parametrize(
    ("row", "missed"),
    (
        (result_row("pytorch_grad_cam", "GradCAM", "resnet50", 1, faster=3.0), []),
        (result_row("pytorch_grad_cam", "GradCAM", "resnet50", 1, faster=2.99), ["3 times"]),
        (result_row("pytorch_grad_cam", "EigenCAM", "resnet50", 1, faster=0.9), ["never slower", "3 times"]),
        (result_row("torchcam", "CAM", "resnet50", 32, faster=1.0), []),
        (result_row("torchcam", "CAM", "resnet50", 32, faster=0.99), ["never slower"]),
        (result_row("captum", "LayerGradCam", "mobilenet_v2", 8, faster=1.3), []),
    ),
)
def test_each_limit_is_for_its_rows(row: dict[str, Any], missed: list[str]) -> None:
    found = [bar.text for bar in bench_compat.bars([row]) if bar.missed(row)]
    assert len(found) == len(missed)
    assert all(text in bar for text, bar in zip(missed, found, strict=True))


def test_who_is_even_misses_the_limit_and_is_said_to_be() -> None:
    rows = [
        result_row("torchcam", "CAM", "resnet50", 1, faster=0.99, faster_high=1.0),
        result_row("torchcam", "CAM", "resnet50", 8, faster=0.95, faster_high=0.97),
    ]
    (bar,) = [bar for bar in bench_compat.bars(rows) if bar.text == "never slower than the original"]
    assert all(bar.missed(row) for row in rows)
    assert bar.reason.startswith("in 1 of 2 the two cannot be told apart")


def test_a_missed_limit_stands_beside_the_floor() -> None:
    rows = [
        result_row("pytorch_grad_cam", "GradCAM", "resnet50", 1, floor_faster=2.9, faster=2.8),
        result_row("pytorch_grad_cam", "GradCAM", "resnet50", 8, floor_faster=3.456),
    ]
    for row in rows:
        row |= {"vs_floor": 1.02, "vs_floor_p20": 1.01, "vs_floor_p80": 1.03, "inference_ms": 3.3, "bare_ms": 0.1}
    rows[0]["original_ms"] = 10.0
    text = report.as_markdown(bench_compat.report(rows, {"captum": "not here"}), environment.describe("a test"))
    assert "| GradCAM | resnet50 | 1 | **2.80 missed** |" in text
    assert "why: a third of the original's time is 1.01 to 1.01 times plain inference in these rows" in text
    assert "Not to be had here: captum (not here)." in text


def test_originals_that_are_not_there_are_left_out(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(peers, "absent_because", lambda name: f"no {name}")
    assert run.main(["compat", "--quick"]) == 1
    assert "compat: no results: no original to compare with" in capsys.readouterr().err


def test_the_table_of_the_migration_page(tmp_path: Path) -> None:
    rows = [
        result_row("pytorch_grad_cam", "EigenCAM", "resnet50", 1, faster=30.04),
        result_row("pytorch_grad_cam", "FinerCAM", "resnet50", 1, faster=2.94),
        result_row("pytorch_grad_cam", "FinerCAM", "mobilenet_v2", 32),
    ]
    report.write(bench_compat.report(rows, {}), environment.describe("a test"), tmp_path)
    text = tables.render("<!-- results: compat -->\n<!-- end -->", tmp_path)
    assert "| class | resnet50, 1 | mobilenet_v2, 32 |\n" in text
    assert "| pytorch-grad-cam `EigenCAM` | 30.04 | - |\n" in text
    assert "| pytorch-grad-cam `FinerCAM` | **2.94, missed** | 3.10 |\n" in text
