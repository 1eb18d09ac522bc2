"""The study of shifted logits: its maps are an explainer's, its measures those of its tables' notes."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.studies import logit_shift, networks, study
from benchmarks.studies.data import Images
from benchmarks.studies.logit_shift import DIFFERENCES, MAP_BAR, TARGETS
from benchmarks.studies.logit_shift_maps import (
    Sharper,
    change,
    correlation,
    evidence,
    likeness_of_classes,
    peaks_at_corner,
    shown,
)
from diffcam_fast.explain import Explainer, Logit, LogitDifference, Probability
from diffcam_fast.explain.targets import score
from diffcam_fast.reference.cam import METHODS
from tests.tolerances import MAP_SHARE_OF_RANGE


class Small(nn.Module):
    """A network that the study can explain in no time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU())
        self.head = nn.Linear(8, 12)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layer(images).mean((2, 3)))


def _model() -> nn.Module:
    torch.manual_seed(4)
    small = Small()
    with torch.no_grad():
        small.head.weight *= 8
    return nn.Sequential(OrderedDict(network=small)).eval()


def _images(count: int = 5) -> Tensor:
    return torch.rand(count, 3, 15, 15, generator=torch.Generator().manual_seed(0))


def test_evidence_is_what_explainers_make() -> None:
    model, images = _model(), _images()
    classes = model(images).topk(2, 1).indices
    found = evidence(model, "network.layer", images, classes, TARGETS)
    torch.testing.assert_close(found.logits, model(images).detach())
    for method in METHODS:
        for number, target in enumerate(TARGETS.values()):
            expected = Explainer(model, "network.layer", method, target, None, None, relu=False)(images, classes).maps
            torch.testing.assert_close(found.maps[method][:, number], expected, rtol=1e-4, atol=1e-7)


def test_shown_is_what_an_explainer_shows() -> None:
    model, images = _model(), _images()
    classes = model(images).topk(2, 1).indices
    raw = evidence(model, "network.layer", images, classes, {"logit": Logit()}, ["gradcam"]).maps["gradcam"][:, 0]
    expected = Explainer(model, "network.layer", "gradcam", Logit(), size=None)(images, classes).maps
    torch.testing.assert_close(shown(raw), expected, rtol=0, atol=MAP_SHARE_OF_RANGE[torch.float32])


def test_measures_by_hand() -> None:
    one = torch.tensor([[[0.0, 1.0], [2.0, 4.0]], [[3.0, 0.0], [1.0, 1.0]]])
    other = one + torch.tensor([[[0.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, -1.5]]])
    torch.testing.assert_close(change(one, other), torch.tensor([0.25, 0.5]))
    assert change(torch.zeros(1, 2, 2), torch.ones(1, 2, 2)).isnan().all()
    expected = [np.corrcoef(a.flatten(), b.flatten())[0, 1] for a, b in zip(one.numpy(), other.numpy(), strict=True)]
    torch.testing.assert_close(correlation(one, other), torch.tensor(expected, dtype=torch.float64))
    assert correlation(one, torch.ones(2, 2, 2)).isnan().all()
    assert peaks_at_corner(one).tolist() == [False, True]
    assert peaks_at_corner(-one.abs()).tolist() == [False, False]
    same = torch.stack([one[:1], 2 * one[:1]], 1)
    torch.testing.assert_close(likeness_of_classes(same), torch.ones(1, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(likeness_of_classes(one[None]), correlation(shown(one[:1]), shown(one[1:])))


@pytest.mark.parametrize("factor", [1, 30])
def test_sharper_is_the_target_of_larger_logits(factor: float) -> None:
    logits = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    classes = torch.tensor([[0], [5], [2]])
    for inner in (Probability(), LogitDifference()):
        found = score(Sharper(inner, factor), logits, classes)
        leaf = logits.clone().requires_grad_()
        scaled = leaf * factor
        chosen = scaled.log_softmax(1).gather(1, classes)
        value = chosen.exp() if isinstance(inner, Probability) else chosen - torch.log(-torch.expm1(chosen))
        torch.testing.assert_close(
            found.cotangent[:, 0], torch.autograd.grad(value.sum(), leaf)[0], rtol=1e-6, atol=1e-9
        )


def _settings(tmp_path: Path) -> study.Settings:
    return study.Settings(True, 0, torch.device("cpu"), "small", tmp_path, progress=False)


def test_the_whole_study_of_a_small_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = _model()
    network = networks.Network("small", model, 15, tuple(f"class {number}" for number in range(12)), "network.layer")
    pixels = (_images() * 255).to(torch.uint8)
    photos = Images(pixels, torch.tensor([0, -1, 1, 2, 3]), tuple("abcde"))
    monkeypatch.setattr(logit_shift.networks, "load", lambda name, cache: network)
    monkeypatch.setattr(logit_shift.data, "photos", lambda cache, size: photos)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    findings = logit_shift.run(_settings(tmp_path))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert findings.details["photos"] == 3
    tables = {table.name: table.rows for table in findings.tables}
    assert len(tables["all-changes"]) == len(METHODS) * len(TARGETS) * 2
    for row in tables["all-changes"]:
        if row["precision"] == "float32":
            if row["target"] in DIFFERENCES or "probability" in str(row["target"]):
                assert row["largest change"] <= MAP_BAR
            elif row["target"] == "logit":
                assert row["change (share of range)"] > 0.01
    (studied,) = {row["K"] for row in tables["strengths"] if row["studied"]}
    assert all(row["float32: largest change of a probability"] <= 1e-5 for row in tables["strengths"])
    assert all(abs(float(row["float32: largest |t|"])) > 0 for row in tables["strengths"] if row["K"] == studied)
    sharp = [row for row in tables["saturation"] if row["factor"] == 100 and row["precision"] == "float32"]
    assert {row["target"]: row["empty"] for row in sharp}["difference, logsumexp"] == 0
    written = study.write(logit_shift, findings, _settings(tmp_path), {}, 1.0, tmp_path / "results")
    assert {"logit_shift.json", "logit_shift-methods.png", "logit_shift-photo-1.png"} <= {path.name for path in written}
    assert findings.claims[0].holds
    assert findings.claims[1].holds
