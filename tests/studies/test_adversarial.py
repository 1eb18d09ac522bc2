"""The study of adversarial images: how regions are compared, and all of it on a network that takes no time."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.studies import adversarial, adversarial_maps, data, networks, study
from benchmarks.studies.adversarial_maps import METHODS, TARGETS, Attacked, Sizes, Subject, heat, overlap
from diffcam_fast.explain import Explainer
from diffcam_fast.robustness.adversarial import Adversarial, bim, carlini_wagner, fgsm
from diffcam_fast.saliency.integrated_gradients import integrated_gradients
from tests.studies.fetched import CACHE, fetched


class Small(nn.Module):
    """Decides by the mean of each colour in each half, which a small change turns."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU())
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d((1, 2)), nn.Flatten(), nn.Linear(24, 4))

    def forward(self, images: Tensor) -> Tensor:
        return 20 * self.head(self.layer(images))


def _network() -> networks.Network:
    torch.manual_seed(6)
    model = nn.Sequential(OrderedDict(network=Small())).eval()
    return networks.Network("mobilenet_v2_cifar", model, 12, ("ant", "bee", "cat", "dog"), "network.layer")


def _images(count: int = 6) -> Tensor:
    return torch.rand(count, 3, 12, 12, generator=torch.Generator().manual_seed(2))


def test_overlap_by_hand() -> None:
    one = torch.arange(20.0).reshape(1, 4, 5)
    other = one.clone()
    other[0, 3, 4] = -1  # the most important pixel of the first is the least of the second
    assert overlap(one, one, 0.1).tolist() == [1.0]
    assert overlap(one, other, 0.1).tolist() == [0.5]
    assert overlap(one, other, 0.2).tolist() == [0.75]
    assert overlap(one, -one, 0.2).tolist() == [0.0]
    assert overlap(torch.zeros(1, 4, 5), one, 0.2).isnan().all()
    assert overlap(one[:0], one[:0], 0.1).shape == (0,)


def test_overlap_of_unrelated_maps_is_the_share() -> None:
    one, other = torch.randn(2, 50, 40, 40, generator=torch.Generator().manual_seed(0))
    for share in (0.1, 0.2):
        assert abs(float(overlap(one, other, share).mean()) - share) < 0.01


@pytest.mark.parametrize("target", TARGETS)
def test_heat(target: str) -> None:
    network, images = _network(), _images()
    classes = torch.tensor([0, 1, 2, 3, 0, 1])
    found, errors = heat(network, METHODS[0], target, images, classes, 4)
    expected = Explainer(network.model, network.layer, target=TARGETS[target], normalize=None, relu=False)(
        images, classes
    )
    torch.testing.assert_close(found, expected.maps[:, 0])
    assert errors == []
    found, errors = heat(network, METHODS[1], target, images, classes, 4)
    direct = integrated_gradients(network.model, images, classes, target=TARGETS[target], steps=4)
    torch.testing.assert_close(found, direct.attributions.sum(1))
    assert len(errors) == 6
    torch.testing.assert_close(torch.tensor(errors)[:, 0], direct.completeness_error, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(torch.tensor(errors)[:, 1], direct.scores - direct.baseline_scores, rtol=1e-3, atol=1e-5)
    assert heat(network, METHODS[1], target, images[:0], classes[:0], 4)[0].shape == (0, 12, 12)


def test_an_image_counts_once_however_many_attacks_succeed() -> None:
    images, nothing = torch.zeros(3, 3, 2, 2), torch.zeros(3)
    result = Adversarial(images, nothing.bool(), nothing.long(), nothing, nothing)
    attacks = [
        Attacked(name, result, torch.tensor(kept), torch.zeros(len(kept), 2), torch.zeros(len(kept), 2, 2))
        for name, kept in (("FGSM", [0, 1]), ("BIM", [0]))
    ]
    subject = Subject(_network(), images, nothing.long(), attacks, {}, {})
    values = {"FGSM": torch.tensor([1.0, 4.0]), "BIM": torch.tensor([3.0])}
    found = adversarial.pooled([subject], lambda subject, one: values[one.name])
    assert found.count == 2  # the third was never attacked successfully
    assert found.mean == pytest.approx((2.0 + 4.0) / 2)


def test_the_whole_study_of_a_small_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    network, images = _network(), _images(12)
    labels = network.model(images).argmax(1)
    given = data.Images((images * 255).to(torch.uint8), labels, network.labels)
    monkeypatch.setattr(adversarial.networks, "load", lambda name, cache: network)
    monkeypatch.setattr(adversarial.data, "cifar10", lambda split, cache: given)
    sizes = Sizes(4, adversarial.ATTACKS, 0.1, 4, 30, 3)
    monkeypatch.setattr(adversarial, "QUICK", {"photos": sizes, "cifar": sizes})
    settings = study.Settings(True, 0, torch.device("cpu"), "mobilenet_v2_cifar", tmp_path, progress=False)
    findings = adversarial.run(settings)
    tables = {table.name: table.rows for table in findings.tables}
    assert [row["attack"] for row in tables["attacks"]] == list(adversarial.ATTACKS)
    assert all(row["succeeded"] > 0 for row in tables["attacks"])
    for row in tables["confidences"]:
        higher, lower = (
            ("original image", "adversarial image")
            if row["class"] == "true class"
            else ("adversarial image", "original image")
        )
        assert row[higher] > row[lower]
    assert len(tables["regions"]) == 3 * len(METHODS) * len(TARGETS) * 2
    same = [row for row in tables["softmax"] if row["method"] == METHODS[0]]
    assert all(row["probability and difference"] > 0.95 for row in same)
    assert all(row["error, median"] >= 0 for row in tables["completeness"])
    written = study.write(adversarial, findings, settings, {}, 1.0, tmp_path / "results")
    assert "adversarial-panel-mobilenet_v2_cifar-1.png" in {path.name for path in written}


def test_attacks_on_a_real_network() -> None:
    """CIFAR-10's ResNet-18: every attack succeeds, and Carlini-Wagner moves the images least."""
    network = fetched(lambda: networks.load("cifar_resnet18", CACHE))
    test = fetched(lambda: data.cifar10("test", CACHE))
    images, labels = test.images[:4].float() / 255, test.labels[:4]
    strength = 8 / 255
    signed = fgsm(network.model, images, labels, strength)
    iterated = bim(network.model, images, labels, strength, steps=5)
    smallest = carlini_wagner(network.model, images, labels, steps=20, search_steps=2, initial_constant=1.0)
    assert iterated.succeeded.all()
    assert smallest.succeeded.all()
    assert signed.succeeded.float().mean() >= 0.5
    for found in (signed, iterated):
        assert found.linf.max() <= strength + 1e-6
        assert (smallest.l2 < found.l2).all()
    assert torch.equal(network.model(smallest.images).argmax(1), smallest.predicted)
    again = adversarial_maps.attack("BIM", network, images, labels, Sizes(4, ("BIM",), strength, 2, 1, 1))
    assert again.succeeded.all()
