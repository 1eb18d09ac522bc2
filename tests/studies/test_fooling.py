"""The study of passive fooling on a toy: its maps by another way, its verdicts, its tables and its pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.studies import fooling, fooling_tasks, study
from benchmarks.studies.fooling import ATTACKS, DIFFERENCE, LOGIT, ON_DIFFERENCE, ON_LOGIT, Attack, Result
from benchmarks.studies.fooling_measures import EXPLAINED, Explained, Outcome, explain, similarities
from benchmarks.studies.fooling_tasks import Task, Training
from benchmarks.studies.study import Settings
from diffcam_fast import Explainer
from diffcam_fast.reference.cam import METHODS
from diffcam_fast.robustness.fooling import Step
from diffcam_fast.robustness.hoax import SalienceHoax
from tests.tolerances import MAP_SHARE_OF_RANGE

CPU = torch.device("cpu")
CLASSES = 5


@pytest.fixture
def task() -> Iterator[Task]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential()
        model.add_module("layer", nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU()))
        model.add_module("head", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES)))
        images = torch.randint(0, 256, (40, 3, 13, 13), dtype=torch.uint8)
    labels = torch.arange(40) % CLASSES
    names = tuple(f"class {number}" for number in range(CLASSES))
    training = Training(steps=3, batch=8, rate=1e-3, strength=5.0)
    yield Task(
        "toy, small network",
        model.eval(),
        "layer",
        images[:25],
        labels[:25],
        images[25:],
        labels[25:],
        names,
        True,
        (0, 1),
        training,
    )


def _settings(quick: bool = True, network: str | None = None) -> Settings:
    return Settings(quick, 0, CPU, network, Path("unused"), progress=False)


def test_all_explanations_are_the_explainers(task: Task) -> None:
    classes = torch.stack([task.test_labels, (task.test_labels + 1) % CLASSES], 1)
    found = explain(task.model, "layer", task.test, classes, CPU)
    images = task.test.float() / 255
    assert set(found.maps) == {(name, method) for name in EXPLAINED for method in METHODS}
    for (name, method), maps in found.maps.items():
        expected = Explainer(task.model, "layer", method, EXPLAINED[name], size=None)(images, classes).maps
        assert (maps - expected).abs().max() <= MAP_SHARE_OF_RANGE[torch.float32] * 10, (name, method)
    torch.testing.assert_close(found.probabilities, task.model(images).softmax(1).detach())
    assert all(parameter.grad is None for parameter in task.model.parameters())


def test_the_hoax_has_the_entropy_of_the_networks_own_maps(task: Task) -> None:
    hoax = task.hoax(CPU)
    maps = explain(task.model, "layer", task.train, task.train_labels.unsqueeze(1), CPU).maps[LOGIT, "gradcam"]
    assert hoax == hoax and hoax.size == (6, 6)
    assert hoax.count == SalienceHoax.like(maps).count


def test_batches_are_of_the_seed_and_half_of_them_of_a_pair(task: Task) -> None:
    first, second, other = (next(task.batches(CPU, torch.Generator().manual_seed(seed))) for seed in (0, 0, 1))
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[0], other[0])
    assert first[0].shape == (8, 3, 13, 13)
    assert first[0].max() <= 1
    _, labels = next(task.batches(CPU, torch.Generator().manual_seed(0), pair=(0, 1)))
    assert bool((labels[4:] < 2).all())


@pytest.mark.parametrize("quick", [True, False], ids=["quick", "full"])
def test_the_whole_study_of_a_toy(task: Task, quick: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fooling, "load_tasks", lambda settings: [task])
    settings = _settings(quick)
    findings = fooling.run(settings)
    attacks = fooling.attacks_on(task, settings)
    rows = {table.name: table.rows for table in findings.tables}
    assert [row["attack"] for row in rows["outputs"]] == [attack.name for attack in attacks]
    assert len(rows["all-maps"]) == len(attacks) * len(EXPLAINED) * len(METHODS)
    assert len(rows["clean"]) == (len(EXPLAINED) - 1) * len(METHODS)
    assert {row["seeds"] for row in rows["all-maps"]} == {1 if quick else 3}
    assert {row["images"] for row in rows["outputs"]} == {15}
    assert len(findings.claims) == 5
    assert {figure.name for figure in findings.figures} == {"maps-toy-small-network", "steered", "clean"}
    study.write(fooling, findings, settings, {}, 1.0, tmp_path)
    assert (tmp_path / "fooling-steered.png").stat().st_size > 10_000


def test_which_attacks_are_tried_where(task: Task) -> None:
    cifar, photos = (Task(**{**vars(task), "name": name}) for name in ("CIFAR-10, ResNet-18", "photos, some"))
    assert fooling.attacks_on(cifar, _settings()) == (ON_LOGIT,)
    assert fooling.attacks_on(cifar, _settings(quick=False)) == ATTACKS
    assert fooling.attacks_on(photos, _settings(quick=False)) == (ON_LOGIT, ON_DIFFERENCE)
    assert len(fooling.attacks_on(task, _settings(quick=False))) == len(ATTACKS) + 2


def _result(task: Task, shown: dict[str, Tensor], attack: Attack = ON_LOGIT, lost: int = 0) -> Result:
    """A result in which each clean map is a ramp with some noise, and fooled ones are as given by explanation."""
    count = len(task.test)
    hoax = SalienceHoax((6, 6))
    generator = torch.Generator().manual_seed(0)
    ramp = torch.arange(36.0).reshape(6, 6) / 35
    clean_maps = {
        (name, method): (0.9 * ramp + 0.1 * torch.rand(count, 1, 6, 6, generator=generator)).clamp(0, 1)
        for name in EXPLAINED
        for method in METHODS
    }
    probabilities = torch.nn.functional.one_hot(task.test_labels, CLASSES).float()
    clean = Explained(probabilities, clean_maps)
    fooled = {key: shown[key[0]].expand_as(maps) if key[0] in shown else maps for key, maps in clean_maps.items()}
    correct = torch.ones(1, count, dtype=torch.float64)
    correct[0, :lost] = 0
    outcome = Outcome(
        correct,
        correct,
        1 - correct,
        {
            key: {name: values[None] for name, values in found.items()}
            for key, found in similarities(fooled, clean_maps, hoax.map).items()
        },
        {key: torch.zeros(1, count) for key in fooled},
        {key: torch.zeros(count) for key in fooled},
        fooled,
        [(Step(1.0, 0.5, 0.5, 1.0), Step(0.5, 0.3, 0.2, 1.0))],
    )
    return Result(task, hoax, clean, {ON_LOGIT: outcome, attack: outcome})


def test_verdicts_follow_from_the_maps(task: Task) -> None:
    hoax = SalienceHoax((6, 6)).map
    unmoved, less, *rest = fooling.steering(_result(task, {LOGIT: hoax}))
    assert (unmoved.holds, less.holds, rest) == (True, True, [])
    both = _result(task, {LOGIT: hoax, DIFFERENCE: hoax}, ON_DIFFERENCE)
    unmoved, less, adaptive = fooling.steering(both)
    assert (unmoved.holds, less.holds, adaptive.holds) == (False, False, False)
    _, _, adaptive = fooling.steering(_result(task, {LOGIT: hoax}, ON_DIFFERENCE))
    assert adaptive.holds


@pytest.mark.parametrize(("lost", "shown", "expected"), [(0, True, (True, True)), (1, False, (False, False))])
def test_the_bars(task: Task, lost: int, shown: bool, expected: tuple[bool, bool]) -> None:
    hoax = SalienceHoax((6, 6)).map
    accuracy, similarity = fooling.bars(_result(task, {LOGIT: hoax} if shown else {}, lost=lost))
    assert (accuracy.holds, similarity.holds) == expected
    assert ("stopped after 3 steps of 8 images" in similarity.found) is not shown


def test_matching_is_measured_on_clean_maps(task: Task) -> None:
    result = _result(task, {})
    assert fooling.matching([result], "gradcam").holds
    other: dict[Any, Tensor] = {(DIFFERENCE, "gradcam"): result.clean.maps[DIFFERENCE, "gradcam"].flip(3)}
    turned = Result(task, result.hoax, Explained(result.clean.probabilities, result.clean.maps | other), {})
    assert fooling.matching([turned], "gradcam").holds is False
    assert fooling.matching([turned], "gradcam++").holds


def test_the_small_network_explains_seven_by_seven_positions() -> None:
    model = fooling_tasks._faces_network(40)
    assert model(torch.rand(2, 3, 56, 56)).shape == (2, 40)
    assert model.layer(model.trunk(torch.rand(2, 3, 56, 56))).shape[2:] == (7, 7)


def test_a_network_of_ones_own_is_studied_on_photos(monkeypatch: pytest.MonkeyPatch, task: Task) -> None:
    asked = []
    monkeypatch.setattr(fooling_tasks, "_photos", lambda settings, name: asked.append(name) or task)
    assert fooling_tasks.load_tasks(_settings(network="torchvision:resnet50")) == [task]
    assert asked == ["torchvision:resnet50"]
