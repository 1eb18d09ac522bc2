"""The region-shift study: networks as deep as they are called, the numbers of the library, claims that are computed."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import diffcam_fast as dcf
from benchmarks.studies import region_shift, region_shift_sets
from benchmarks.studies.networks_fit import fit, fit_probe
from benchmarks.studies.region_shift_measure import (
    DIFFERENCE,
    MAIN,
    RANDOM,
    SEEN,
    STRENGTHS,
    TRANSFERRED,
    TRUE,
    WHITE_BOX,
    attacked,
    directions,
    layer_maps,
    watch,
)
from benchmarks.studies.region_shift_networks import FITTED, Fit, Subject, fit_subject
from benchmarks.studies.region_shift_sets import RESNET, Watched
from benchmarks.studies.study import Settings
from diffcam_fast.robustness.adversarial import fgsm
from diffcam_fast.robustness.region_shift import nissim, psnr


def settings(**changed):
    values = dict(
        quick=True, seed=0, device=torch.device("cpu"), network=None, cache=Path("unused"), progress=False, **changed
    )
    return Settings(**values)


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, 1, 1), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()


def watched(count=7, **subjects):
    generator = torch.Generator().manual_seed(1)
    subjects = subjects or {RESNET: network(0), "other": network(1)}
    found = [Subject(name, "deep", "seeded", model, "3") for name, model in subjects.items()]
    images = torch.rand(count, 3, 16, 16, generator=generator)
    images[0, :, :4] = 0.0
    images[0, :, 4:8] = 1.0
    return Watched("seeded", images, torch.randint(4, (count,), generator=generator), found)


def weight_layers(model):
    """On the longest way through: shortcuts are not counted, and depthwise and pointwise convolution are one."""
    return sum(
        isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
        for name, module in model.named_modules()
        if "shortcut" not in name
    )


@pytest.mark.parametrize(("name", "count"), [("VGG-like 16", 16), ("ResNet-50-like", 50), ("ResNet-101-like", 101)])
def test_networks_are_as_deep_as_they_are_called(name, count):
    assert weight_layers(FITTED[name][1](32, 10)) == count


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("name", FITTED)
def test_networks_explain_four_by_four_positions(name, size):
    model = FITTED[name][1](size, 7).eval()
    with torch.inference_mode():
        features = model.features(torch.rand(1, 3, size, size))
        assert features.shape[2:] == (4, 4)
        assert model(torch.rand(1, 3, size, size)).shape == (1, 7)


def bright(epochs):
    """Two classes that differ in brightness."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    images = 0.2 * torch.rand(40, 3, 16, 16, generator=generator) + 0.6 * labels.view(-1, 1, 1, 1)
    return Fit("bright", images, labels, 4, epochs, 0, {"batch": 20, "rate": 1e-2})


def test_fitting_learns_and_is_repeatable():
    how = bright(15)
    models = network(), network()
    for model in models:
        generator = torch.Generator().manual_seed(0)
        fit(model, how.images, how.labels, epochs=15, batch=20, rate=3e-2, generator=generator, progress=False)
    with torch.inference_mode():
        assert (models[0](how.images).argmax(1) == how.labels).float().mean() == 1
        assert torch.equal(models[0](how.images), models[1](how.images))
    assert not any(module.training for module in models[0].modules())


def test_a_probe_is_the_best_linear_layer():
    """On a trunk whose one feature is the brightness, it finds the threshold between the classes."""
    how = bright(1)
    trunk = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    head = fit_probe(trunk, how.images, how.labels, 2, progress=False)
    with torch.inference_mode():
        assert (head(trunk(how.images)).argmax(1) == how.labels).all()
        low, high = head(torch.full((1, 3), 0.3))[0], head(torch.full((1, 3), 0.5))[0]
    assert low.argmax() == 0
    assert high.argmax() == 1


def test_a_network_is_fitted_once(tmp_path):
    how = bright(1)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    subject = fit_subject("Xception-like", how, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    logits = subject.model(how.images)
    assert torch.equal(fit_subject("Xception-like", how, tmp_path).model(how.images), logits)
    assert len(list(tmp_path.glob("*.npz"))) == 1
    other = fit_subject("Xception-like", dataclasses.replace(how, seed=1), tmp_path)
    assert not torch.equal(other.model(how.images), logits)
    assert not any(parameter.requires_grad for parameter in subject.model.parameters())
    assert (subject.kind, subject.weights) == ("wide", "fitted here")


def test_one_gradient_gives_the_attacks_of_all_strengths():
    given = watched()
    subject = given.subjects[0]
    steps = directions(subject, given, settings())
    for strength, images in zip(STRENGTHS, attacked(given.images, steps), strict=True):
        expected = fgsm(subject.model, given.images, given.labels, strength).images
        torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)
    assert torch.equal(attacked(given.images, steps)[0], given.images)


@pytest.mark.parametrize("batch", [3, 50])
def test_what_is_watched_is_what_the_library_says(monkeypatch, batch):
    monkeypatch.setattr("benchmarks.studies.region_shift_measure._BATCH", batch)
    given = watched()
    subject = given.subjects[0]
    steps = directions(subject, given, settings())
    (found,) = watch(given, subject, {WHITE_BOX: steps}, settings())
    changed = attacked(given.images, steps)[3]
    with torch.inference_mode():
        before, after = subject.model(given.images).argmax(1), subject.model(changed).argmax(1)
    assert torch.equal(found.correct[3], after == given.labels)
    torch.testing.assert_close(found.decibels[3], psnr(given.images, changed))
    for name, target in ((MAIN, dcf.Logit()), (DIFFERENCE, dcf.LogitDifference())):
        explainer = dcf.Explainer(subject.model, "3", target=target)
        for kind, classes in ((TRUE, (given.labels, given.labels)), (SEEN, (before, after))):
            maps = [
                explainer(images, each).maps[:, 0]
                for images, each in zip((given.images, changed), classes, strict=True)
            ]
            torch.testing.assert_close(found.dissimilarity[name, kind][3], nissim(*maps), rtol=0, atol=1e-4)
            assert torch.equal(found.blank[name, kind][3], maps[1].amax((1, 2)) == 0)
            shift = found.shift[name, kind]
            torch.testing.assert_close(shift.mod, found.dissimilarity[name, kind][1:].double().mean(1))
            assert shift.count == 7
            assert found.dissimilarity[name, kind][0].eq(0).all()


def test_maps_of_all_layers():
    given = watched()
    found = layer_maps(given.subjects[0], given.images, given.labels, settings())
    assert list(found) == ["0", "1", "2", "3"]
    assert {maps.shape for maps in found.values()} == {(7, 16, 16)}
    one = dcf.Explainer(given.subjects[0].model, "2", target=dcf.Logit(), size=None)(given.images, given.labels).maps
    expected = torch.nn.functional.interpolate(one, (16, 16), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(found["2"], expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def findings():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(region_shift_sets, "faces", lambda settings: watched())
        patch.setattr(region_shift_sets, "cifar10", lambda settings: dataclasses.replace(watched(), name="again"))
        return region_shift.run(settings())


def test_tables_have_every_network_and_attack(findings):
    outcome, shift = findings.tables
    attacks = [(row["images"], row["network"], row["attack"]) for row in outcome.rows]
    own = [(RESNET, WHITE_BOX), (RESNET, RANDOM), ("other", WHITE_BOX), ("other", TRANSFERRED), ("other", RANDOM)]
    assert attacks == [(name, *pair) for name in ("seeded", "again") for pair in own]
    assert len(shift.rows) == 4 * len(outcome.rows)
    for row in outcome.rows:
        assert row["PSNR at 0.01, dB"] == pytest.approx(40, abs=1)
        assert row["PSNR at 0.1, dB"] == pytest.approx(20, abs=1)
    for row in shift.rows:
        means = [row[f"MOD at {strength:g}"] for strength in STRENGTHS[1:]]
        mean = sum(means) / 4
        assert row["VID of the set"] == pytest.approx(math.sqrt(sum((each - mean) ** 2 for each in means) / 4))


def test_figures_are_drawn(findings, tmp_path):
    names = [figure.name for figure in findings.figures]
    assert names == ["mod", "distribution-seeded", "distribution-again", "strip-seeded", "strip-again", "layers"]
    for figure in findings.figures:
        figure.figure.savefig(tmp_path / f"{figure.name}.png", dpi=40)
        assert (tmp_path / f"{figure.name}.png").stat().st_size > 1000


def test_claims_are_computed(findings):
    zero, *_ = findings.claims
    assert zero.holds is True
    assert len(findings.claims) == 5
    given = watched()
    found = region_shift._watch_all(given, settings())
    found[0].dissimilarity[MAIN, SEEN][0, 2] = 0.25
    assert region_shift._claims(found)[0].holds is False
    assert "0.25" in region_shift._claims(found)[0].found
    for each in found:
        if each.attack == RANDOM:
            for key in each.dissimilarity:
                each.dissimilarity[key][-1] = 0.9
    noise = region_shift._claims(found)[1]
    assert noise.holds is False
    assert "of 2 networks: " in noise.found
    assert "0 at 0.1." in noise.found
    for each in found:
        steps = torch.linspace(0, 0.4, 5)[:, None].expand(5, 7).clone()
        for key in each.dissimilarity:
            each.dissimilarity[key] = steps if each.attack == WHITE_BOX else steps / 4
    _, noise, _, difference, own = region_shift._claims(found)
    assert noise.holds is True
    assert "2 at 0.01, 2 at 0.05, 2 at 0.075, 2 at 0.1. The difference at 0.1: " in noise.found
    assert "other on seeded +0.300 [+0.300, +0.300]" in noise.found
    assert own.holds is True
    assert difference.holds is False


def test_another_network_is_watched_on_photos(monkeypatch):
    asked = []
    monkeypatch.setattr(
        region_shift_sets, "photos", lambda name, settings: asked.append(name) or watched(given=network())
    )
    found = region_shift.run(dataclasses.replace(settings(), network="torchvision:resnet18"))
    assert asked == ["torchvision:resnet18"]
    assert {row["network"] for row in found.tables[0].rows} == {"given"}
    assert len(found.claims) == 4  # nothing is transferred
