"""The study of contrastive saliency: its statistics and its curve against what is known, and a small run of it all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'diffcam_fast[studies]'")
pytest.importorskip("scipy", reason="SciPy is not installed: pip install 'diffcam_fast[studies]'")
pytest.importorskip("foolbox", reason="Foolbox is not installed: pip install 'diffcam_fast[robustness]'")
pytest.importorskip("captum", reason="captum is not installed: pip install 'diffcam_fast[saliency]'")

from benchmarks.studies import contrastive_saliency as study
from benchmarks.studies import networks
from benchmarks.studies.contrastive_saliency_recovery import CONTROLS, perturbed, recover
from benchmarks.studies.networks import Network
from benchmarks.studies.statistics import Interval, mean_interval
from benchmarks.studies.study import Settings, write
from diffcam_fast.saliency.gradients import gradient
from diffcam_fast.saliency.guided import guided_backpropagation
from tests.studies.fetched import CACHE, fetched

STRONG = {"steps": 60, "search_steps": 2, "initial_constant": 100.0, "step_size": 0.1}
SETTINGS = Settings(True, 0, torch.device("cpu"), None, CACHE, progress=False)


class Small(nn.Module):
    """Some convolutions with ReLU and four classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU())
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return 30 * self.head(self.body(x).mean((2, 3)))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def network(images: Tensor) -> Network:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = Small().eval()
        # Every class is as likely as the others: decisions can be changed.
        model.head.bias -= model(images).mean(0) / 30
    return Network("small", model, 16, ("ant", "bee", "cat", "dog"), "body")


def test_perturbing_takes_the_first_pixels_and_no_others(images: Tensor) -> None:
    scores = torch.zeros(6, 16, 16)
    scores[:, 4, 5], scores[:, 0, 0] = 2.0, 1.0
    found = perturbed(images, scores, 2 / 256)
    changed = (found != images).any(1)
    assert changed.sum() == 12 and changed[:, 4, 5].all() and changed[:, 0, 0].all()
    assert torch.allclose(found[:, :, 4, 5], images[:, :, 3:6, 4:7].mean((2, 3)))
    assert torch.equal(perturbed(images, scores, 0.0), images)
    assert (perturbed(images, scores, 1.0) != images).all(1).all()


def test_recovery_of_a_network_that_looks_at_one_pixel() -> None:
    """Smoothing the pixel that was attacked brings the decision back; a ranking that finds it does so at once."""

    class OnePixel(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            bright = 40 * (x[:, :, 3, 3].mean(1) - 0.5)
            return torch.stack([torch.relu(-bright), torch.relu(bright)], 1)

    pictures = torch.full((4, 3, 8, 8), 0.45)
    attack = {"steps": 60, "search_steps": 2, "initial_constant": 1.0, "step_size": 0.05}
    found = recover(
        OnePixel(), pictures, torch.zeros(4).long(), {"gradient": gradient}, (0.0, 1 / 64), attack, SETTINGS
    )
    assert found.images == 4
    assert found.right["gradient"].tolist() == [[0, 1]] * 4
    assert found.right["the attack's perturbation"].tolist() == [[0, 1]] * 4
    assert found.right["random"][:, 0].tolist() == [0] * 4
    assert found.mean("gradient").tolist() == [1] * 4


def test_recovery_leaves_out_what_was_wrong_before(network: Network, images: Tensor) -> None:
    with torch.no_grad():
        labels = network.model(images).argmax(1)
    labels[:2] = (labels[:2] + 1) % 4
    methods = {"guided back-propagation": guided_backpropagation}
    found = recover(network.model, images, labels, methods, (0.0, 0.5), STRONG, SETTINGS)
    assert 1 <= found.images <= 4
    assert not any(right[:, 0].any() for right in found.right.values())
    assert set(found.right) == {*CONTROLS, *methods, "contrast of guided back-propagation"}
    assert found.norm > 0


def test_class_pairs_of_every_kind(network: Network, images: Tensor) -> None:
    size = replace(study.QUICK, rivals=2, batch=4)
    pairs = {(pair.method, pair.is_contrast): pair for pair in study.class_pairs(network, images, size, SETTINGS)}
    assert set(pairs) == {
        (name, is_contrast) for name in ("gradient", "guided back-propagation") for is_contrast in (0, 1)
    }
    for (_, is_contrast), pair in pairs.items():
        assert pair.similarity.shape == pair.difference.shape == pair.cosine.shape == (6,)
        assert (pair.similarity >= 0).all() and (pair.similarity <= 1).all()
        if is_contrast:
            # Both directions are nowhere positive together.
            assert pair.cosine.abs().amax() < 1e-6
    claim = study._pair_claim(list(pairs.values()))
    alike = pairs["guided back-propagation", False].similarity - pairs["gradient", False].similarity
    assert "small" in claim.found and f"above the gradient's by {mean_interval(alike)}" in claim.found


def test_verdicts() -> None:
    above, below, around = Interval(1, 0.5, 1.5, 9), Interval(-1, -1.5, -0.5, 9), Interval(0.2, -0.1, 0.5, 9)
    alone = mean_interval([1.0])
    assert study._verdict([above, above]) is True
    assert study._verdict([above, around]) is None and study._verdict([above, alone]) is None
    assert study._verdict([around, below]) is False and study._verdict([below]) is False


def test_attacked_photos_count_only_what_the_attack_did(network: Network, images: Tensor) -> None:
    found = study.attacked_photos(network, images, replace(study.QUICK, attack=STRONG, batch=4, panels=2), SETTINGS)
    assert found.counts["photos"] == 6 and found.counts["successful"] > 0
    for condition in ("failed", "successful"):
        for (_, _, name), values in found.agreement.items():
            if name == condition:
                assert int((~values.isnan()).sum()) <= found.counts[condition]
    assert len(found.panels) <= 2
    for panel in found.panels:
        assert [row[0].split(":")[0] for row in panel.rows] == ["clean", "failed", "successful"]


def test_a_small_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On the real networks and photos, fewer than --quick takes."""
    pytest.importorskip("tests.helpers.torchvision_cpu")
    fetched(lambda: networks.load("cifar_resnet18", CACHE))
    attack = {**study.QUICK.attack, "steps": 3}
    smallest = replace(
        study.QUICK, photos=2, attack=attack, recovery_attack={**attack, "initial_constant": 50.0}, cifar_images=4
    )
    monkeypatch.setattr(study, "QUICK", replace(smallest, fractions=(0.0, 0.5), path_steps=2))
    found = fetched(lambda: study.run(replace(SETTINGS, network="efficientnet_lite0")))
    assert [table.name for table in found.tables] == ["pairs", "animals", "attacked", "recovery"]
    assert [figure.name for figure in found.figures] == ["animals", "maps", "recovery"]
    assert len(found.claims) == 6 and all(claim.found for claim in found.claims)
    (apart,) = [claim for claim in found.claims if "of two animals" in claim.says]
    assert apart.holds
    written = write(study, found, SETTINGS, {}, 1.0, tmp_path)
    assert {path.name for path in written} >= {"contrastive_saliency.json", "contrastive_saliency-recovery.png"}
