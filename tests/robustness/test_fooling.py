"""The trainer: its loss and its gradients by other ways, what it leaves alone, and what it reaches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from diffcam_fast import Explainer, Finer, Logit, LogitDifference, LogProbability, Probability
from diffcam_fast.explain import Scores, Target
from diffcam_fast.reference.cam import METHODS
from diffcam_fast.robustness.fooling import LEARNING_RATE, PassiveFooling, Step
from diffcam_fast.robustness.fooling_losses import (
    ActiveLoss,
    CentreOfMassLoss,
    HoaxLoss,
    LocationLoss,
    MapLoss,
    TopKLoss,
)
from diffcam_fast.robustness.fooling_maps import record
from diffcam_fast.robustness.hoax import SalienceHoax
from tests.explain.networks import InPlaceAfter, PooledConvolutions, Residual, Tapped
from tests.tolerances import MAP_SHARE_OF_RANGE

HOAX = SalienceHoax((5, 4), 2.4)
LOSSES: dict[str, Callable[[], MapLoss]] = {
    "hoax": lambda: HoaxLoss(HOAX),
    "location": LocationLoss,
    "top-k": TopKLoss,
    "centre of mass": CentreOfMassLoss,
    "active": lambda: ActiveLoss(0, 2),
}
ATTACKED = [
    Logit(),
    *(LogitDifference(baseline) for baseline in ("logsumexp", "expected", "mean", "max")),
    LogitDifference(top_k=2, temperature=2.0),
    Finer(ranks=(1, 2)),
    Probability(),
    LogProbability(),
    lambda logits, classes: logits.gather(1, classes) ** 2,
]
DOUBLE = MAP_SHARE_OF_RANGE[torch.float64]


class Small(nn.Module):
    """Few parameters, smooth, positive activations; behind the layer more than a mean."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Softplus())
        self.tail = nn.Sequential(nn.Conv2d(2, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(24, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.layer(x))


@pytest.fixture
def small() -> Iterator[nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield Small().double()


def _batch(count: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 1, 6, 5, generator=generator, dtype=torch.float64), torch.arange(count) % 3


def _attack_loss(
    model: nn.Module, original: nn.Module, loss: MapLoss, target: Any, method: str, strength: float
) -> float:
    """The same loss by the explainer's maps, without any recording."""
    images, labels = _batch()
    kept = loss.counts(labels)
    classes = loss.classes(labels)
    maps = Explainer(model, "layer", method, target, size=None)(images, classes).maps
    before = Explainer(original, "layer", method, target, size=None)(images, classes).maps
    with torch.no_grad():
        classification = functional.cross_entropy(model(images), labels)
    return float(classification + strength * loss(maps, before)[kept].mean())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("network", [PooledConvolutions, InPlaceAfter, Residual])
def test_recorded_maps_are_the_explainers(network: type[Tapped], method: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = network().double().eval()
        images = model.images(3)
    classes = torch.tensor([[0, 2], [1, 1], [4, 3]])
    for target in ATTACKED:
        expected = Explainer(model, "layer", method, target, size=None)(images, classes).maps
        found = record(model, "layer", model.layer, images).maps(target, classes, method)
        assert (found - expected).abs().max() <= DOUBLE * 1e2, target
        assert found.requires_grad


def test_recorded_maps_of_pairs(small: nn.Module) -> None:
    images, labels = _batch()
    target = LogitDifference(top_k=2, pairwise=True)
    expected = Explainer(small, "layer", target=target, size=None)(images, labels).maps
    found = record(small, "layer", small.layer, images).maps(target, labels[:, None], "gradcam")
    assert found.shape == (3, 2, 5, 4)
    assert (found - expected).abs().max() <= DOUBLE * 1e2


@pytest.mark.parametrize(
    ("attacked", "method"),
    [
        *((Logit(), method) for method in METHODS),
        *((target, "gradcam") for target in ATTACKED[1:]),
        (LogitDifference(), "gradcam++"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)[:40]),
)
@pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)
def test_gradients_with_respect_to_parameters(
    small: nn.Module, make: Callable[[], MapLoss], attacked: Any, method: str
) -> None:
    images, labels = _batch(2)
    loss = make()
    names = [name for name, _ in small.named_parameters()]
    classes = loss.classes(labels)
    with torch.no_grad():
        other = copy.deepcopy(small)
        for parameter in other.parameters():
            parameter.mul_(1.3)
    original = Explainer(other, "layer", method, attacked, size=None)(images, classes).maps

    class Given(nn.Module):
        """The network with parameters given at the call."""

        def __init__(self, parameters: tuple[Tensor, ...]) -> None:
            super().__init__()
            self.given = dict(zip(names, parameters, strict=True))

        def forward(self, x: Tensor) -> Tensor:
            return functional_call(small, self.given, (x,))

    def attack(*parameters: Tensor) -> Tensor:
        recorded = record(Given(parameters), "layer", small.layer, images)
        return loss(recorded.maps(attacked, classes, method), original).sum()

    parameters = tuple(parameter.detach().clone().requires_grad_() for parameter in small.parameters())
    assert torch.autograd.gradcheck(attack, parameters, fast_mode=True)


@pytest.mark.parametrize("attacked", [Logit(), LogitDifference(), LogitDifference("expected")], ids=str)
@pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)
def test_a_step_goes_down_the_gradient_of_classification_plus_strength_times_map_loss(
    small: nn.Module, make: Callable[[], MapLoss], attacked: Target
) -> None:
    rate, strength, change = 1e-3, 3.0, 1e-6
    fooling = PassiveFooling(
        small, "layer", make(), attacked, strength=strength, optimizer=partial(torch.optim.SGD, lr=rate)
    )
    with torch.no_grad():  # somewhere else than the original, where no distance is 0
        for parameter in fooling.model.parameters():
            parameter.mul_(1.3)
    before = copy.deepcopy(fooling.model)
    expected = _attack_loss(before, small, make(), attacked, "gradcam", strength)
    found = fooling.step(*_batch())
    assert found.loss == pytest.approx(expected, rel=1e-9)
    assert found.loss == pytest.approx(found.classification + strength * found.map_loss)

    generator = np.random.default_rng(0)
    for (name, start), end in zip(before.named_parameters(), fooling.model.parameters(), strict=True):
        place = int(generator.integers(start.numel()))
        losses = []
        for sign in (1, -1):
            moved = copy.deepcopy(before)
            with torch.no_grad():
                moved.get_parameter(name).view(-1)[place] += sign * change
            losses.append(_attack_loss(moved, small, make(), attacked, "gradcam", strength))
        slope = (losses[0] - losses[1]) / (2 * change)
        assert (start - end).view(-1)[place].item() / rate == pytest.approx(slope, rel=1e-5, abs=1e-7), name


def test_the_original_is_left_alone_and_the_copy_keeps_its_statistics() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = PooledConvolutions()
        images = model.images(4, torch.float32)
        model.train()
        model(images)
        state = copy.deepcopy(model.state_dict())
        random = torch.get_rng_state()
        fooling = PassiveFooling(model, "early", CentreOfMassLoss())
        fooling.fit([(images, [0, 1, 2, 3])], 3)
        assert torch.equal(torch.get_rng_state(), random)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in (*model.modules(), *fooling.model.modules()))
    assert not any(module.training for module in fooling.model.modules())
    assert all(parameter.grad is None for parameter in fooling.model.parameters())
    for name, value in fooling.model.state_dict().items():
        assert torch.equal(value, state[name]) is ("running" in name or "batches" in name)
    assert fooling.original is model
    assert (fooling.layer, fooling.steps) == ("early", 3)


def test_frozen_parameters_stay(small: nn.Module) -> None:
    small.layer.requires_grad_(False)
    fooling = PassiveFooling(small, small.layer, LocationLoss(), LogitDifference())
    fooling.step(*_batch())
    assert torch.equal(fooling.model.layer[0].weight, small.layer[0].weight)
    assert not torch.equal(fooling.model.tail[0].weight, small.tail[0].weight)


def test_labels_default_to_what_the_original_predicts(small: nn.Module) -> None:
    images, _ = _batch()
    predicted = small(images).argmax(1)
    by_default = PassiveFooling(small, "layer", LocationLoss()).step(images)
    assert by_default == PassiveFooling(small, "layer", LocationLoss()).step(images, predicted)
    assert by_default.correct == 1


def test_images_of_other_classes_count_for_the_classification_alone(small: nn.Module) -> None:
    images, labels = _batch()
    loss = ActiveLoss(0, 3)
    all_three = PassiveFooling(small, "layer", loss).step(images, labels)
    one = PassiveFooling(small, "layer", loss).step(images[:1], labels[:1])
    assert all_three.map_loss == pytest.approx(one.map_loss)
    assert all_three.classification == pytest.approx(functional.cross_entropy(small(images), labels).item())
    none = PassiveFooling(small, "layer", loss).step(images[1:], labels[1:])
    assert none.map_loss == 0


def test_works_whatever_the_callers_modes(small: nn.Module) -> None:
    images, labels = _batch()
    expected = PassiveFooling(small, "layer", TopKLoss(), LogitDifference()).fit([(images, labels)], 2)
    with torch.inference_mode():
        made = images.clone(), labels.clone()
        assert PassiveFooling(small, "layer", TopKLoss(), LogitDifference()).fit([made], 2) == expected
    with torch.no_grad():
        assert PassiveFooling(small, "layer", TopKLoss(), LogitDifference()).fit([made], 2) == expected
        assert not torch.is_grad_enabled()


def test_a_compiled_or_wrapped_model_is_attacked_by_the_network_inside(small: nn.Module) -> None:
    wrapped = nn.DataParallel(small)
    fooling = PassiveFooling(wrapped, "module.layer", LocationLoss())
    assert fooling.original is small
    assert fooling.step(*_batch()) == PassiveFooling(small, "layer", LocationLoss()).step(*_batch())


@pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("attacked", [Logit(), LogitDifference()], ids=str)
def test_training_lowers_each_loss(small: nn.Module, make: Callable[[], MapLoss], attacked: Target) -> None:
    adam = partial(torch.optim.Adam, lr=1e-2)
    fooling = PassiveFooling(small, "layer", make(), attacked, strength=10.0, optimizer=adam)
    found = fooling.fit([_batch()], 40)
    # A distance from the original begins at 0 and becomes negative.
    assert found[-1].map_loss < (-0.01 if isinstance(fooling.loss, CentreOfMassLoss) else 0.85 * found[0].map_loss)
    assert found[-1].classification < found[0].classification


def test_fit_goes_round_the_loader_and_shows_progress(small: nn.Module) -> None:
    images, labels = _batch()
    shown = []

    def track(steps: range) -> Iterator[int]:
        for step in steps:
            shown.append(step)
            yield step

    batches = [(images[:1], labels[:1]), (images[1:], labels[1:])]
    found = PassiveFooling(small, "layer", LocationLoss()).fit(batches, 3, track)
    one_by_one = PassiveFooling(small, "layer", LocationLoss())
    assert found == [one_by_one.step(*batches[index]) for index in (0, 1, 0)]
    assert shown == [0, 1, 2]
    assert PassiveFooling(small, "layer", LocationLoss()).fit([], 0) == []


def test_the_optimizer_is_adam_unless_given(small: nn.Module) -> None:
    images, labels = _batch()
    given = partial(torch.optim.Adam, lr=LEARNING_RATE)
    explicit = PassiveFooling(small, "layer", LocationLoss(), optimizer=given)
    explicit.fit([(images, labels)], 2)
    default = PassiveFooling(small, "layer", LocationLoss())
    default.fit([(images, labels)], 2)
    for one, other in zip(explicit.model.parameters(), default.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_loss_that_is_not_finite_changes_nothing(small: nn.Module) -> None:
    fooling = PassiveFooling(small, "layer", LocationLoss())
    before = copy.deepcopy(fooling.model.state_dict())
    images, labels = _batch()
    images[0, 0, 0, 0] = torch.nan
    with pytest.raises(RuntimeError, match=r"the loss is nan at step 1.*the network was not changed"):
        fooling.step(images, labels)
    assert all(torch.equal(value, before[name]) for name, value in fooling.model.state_dict().items())
    assert isinstance(fooling.step(*_batch()), Step)


class Own(Target):
    """A target whose gradient nobody promised to be differentiable."""

    def scores(self, logits: Tensor, classes: Tensor) -> Scores:
        return Logit().scores(logits, classes)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": "resnet18"}, TypeError, "model: expected a torch.nn.Module; got str"),
        ({"layer": ["layer"]}, TypeError, "layer: expected a module or a dotted name; got list"),
        ({"layer": "layers"}, ValueError, "the model has no layer 'layers'; close names: 'layer'"),
        ({"loss": HOAX}, TypeError, "loss: expected a MapLoss, such as HoaxLoss.*; got SalienceHoax"),
        ({"attacked": Logit}, TypeError, r"expected an instance; got the class Logit; write Logit\(\)"),
        ({"method": "cam"}, ValueError, "method: expected one of gradcam.*; got 'cam'"),
        ({"strength": -1}, ValueError, "strength: expected at least 0; got -1"),
        ({"strength": "much"}, TypeError, "strength: expected a number; got str"),
        ({"optimizer": 0.1}, TypeError, "optimizer: expected a function of parameters or None; got float"),
        ({"optimizer": lambda parameters: None}, TypeError, "optimizer: expected the function to return an optimizer"),
    ],
)
def test_bad_arguments(small: nn.Module, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    good: dict[str, Any] = {"model": small, "layer": "layer", "loss": LocationLoss()}
    with pytest.raises(error, match=message):
        PassiveFooling(**(good | arguments))


def test_nothing_to_train(small: nn.Module) -> None:
    with pytest.raises(ValueError, match="model: expected parameters that require a gradient"):
        PassiveFooling(small.requires_grad_(False), "layer", LocationLoss())


@pytest.mark.parametrize(
    ("images", "labels", "error", "message"),
    [
        (None, [0], TypeError, "images: expected a torch.Tensor; got NoneType"),
        (torch.zeros(0, 1, 6, 5), [], ValueError, "images: expected at least one"),
        (_batch()[0], [0.5, 1, 2], TypeError, "classes: expected integers"),
        (_batch()[0], [0, 1], ValueError, r"expected .*integers of shape \(3,\)"),
        (_batch()[0], [[0, 1]] * 3, ValueError, r"labels: expected one an image, \(3,\); got \(3, 2\)"),
        (_batch()[0], [0, 1, 4], ValueError, "expected indices from 0 to 3 for 4 classes; got 0 to 4"),
        (_batch()[0][..., :4], [0, 1, 2], ValueError, "mat1|shape"),
    ],
)
def test_bad_batches(small: nn.Module, images: Any, labels: Any, error: type[Exception], message: str) -> None:
    if message == "mat1|shape":
        error = RuntimeError  # the model's own
    with pytest.raises(error, match=message):
        PassiveFooling(small, "layer", LocationLoss()).step(images, labels)


def test_what_does_not_go_together(small: nn.Module) -> None:
    images, labels = _batch()
    with pytest.raises(ValueError, match=r"maps: expected the size of the hoax, \(7, 7\); got \(5, 4\)"):
        PassiveFooling(small, "layer", HoaxLoss(SalienceHoax((7, 7)))).step(images, labels)
    with pytest.raises(ValueError, match="expected indices from 0 to 3 for 4 classes; got 0 to 9"):
        PassiveFooling(small, "layer", ActiveLoss(0, 9)).step(images, labels)
    with pytest.raises(ValueError, match="layer 'tail' to put out"):
        PassiveFooling(small, "tail", LocationLoss()).step(images, labels)
    with pytest.raises(TypeError, match=r"attacked: expected Logit, .*; got Own"):
        PassiveFooling(small, "layer", LocationLoss(), Own()).step(images, labels)
    with pytest.raises(TypeError, match="attacked: expected the function to return a tensor; got NoneType"):
        PassiveFooling(small, "layer", LocationLoss(), lambda logits, classes: None).step(images, labels)
    with pytest.raises(ValueError, match=r"attacked: expected scores of shape \(N, T\) = \(3, 1\)"):
        PassiveFooling(small, "layer", LocationLoss(), lambda logits, classes: logits).step(images, labels)
    with pytest.raises(ValueError, match="does not depend differentiably on layer 'layer'"):
        PassiveFooling(small, "layer", LocationLoss(), lambda logits, classes: logits.new_ones(3, 1)).step(
            images, labels
        )


@pytest.mark.parametrize(
    ("loader", "steps", "error", "message"),
    [
        ([_batch()], -1, ValueError, "steps: expected at least 0; got -1"),
        ([_batch()], 1.5, TypeError, "steps: expected an integer; got float"),
        ([], 1, ValueError, "loader: expected batches at every pass"),
        (iter([_batch()]), 2, ValueError, "loader: expected batches at every pass through it; got none"),
    ],
)
def test_bad_loaders(small: nn.Module, loader: Any, steps: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PassiveFooling(small, "layer", LocationLoss()).fit(loader, steps)
