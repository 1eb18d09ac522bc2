"""Contrastive saliency against its parts put together by hand, with every method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffcam_fast.explain import Logit, Probability
from diffcam_fast.ops.saliency_contrast import saliency_contrast
from diffcam_fast.saliency.contrast import contrastive_saliency
from diffcam_fast.saliency.gradients import gradient, gradient_times_input
from diffcam_fast.saliency.guided import guided_backpropagation
from diffcam_fast.saliency.integrated_gradients import integrated_gradients
from tests.saliency.networks import CLASSES, Mixed, Plain, assert_same, images, make, state


@pytest.mark.parametrize("method", [gradient, gradient_times_input, guided_backpropagation])
@pytest.mark.parametrize("kind", [Plain, Mixed])
@pytest.mark.parametrize(("part", "per_channel"), [("positive", True), ("magnitude", True), ("all", False)])
def test_is_what_its_parts_make(method: Any, kind: type[nn.Module], part: str, per_channel: bool) -> None:
    model, given = make(kind), images()
    options = {"part": part, "per_channel": per_channel}
    found = contrastive_saliency(model, given, [1, 0, 4], rivals=3, method=method, **options)
    taken = {"positive": lambda maps: maps.clamp_min(0), "magnitude": torch.abs, "all": torch.clone}[part]
    logits = model.eval()(given.clone())
    for image, own in enumerate((1, 0, 4)):
        order = [each for each in logits[image].argsort(descending=True).tolist() if each != own]
        assert found.classes[image] == own and found.rivals[image].tolist() == order[:3]
        one = given[image : image + 1]
        mine = method(model, one, own).attributions
        assert torch.allclose(found.saliency[image], mine[0], rtol=0, atol=1e-13)
        for place, rival in enumerate(order[:3]):
            theirs = method(model, one, rival).attributions
            expected = saliency_contrast(taken(mine), taken(theirs), per_channel=per_channel)
            assert torch.allclose(found.rival_saliency[image, place], theirs[0], rtol=0, atol=1e-13)
            assert torch.allclose(found.contrast[image, place], expected[0], rtol=0, atol=1e-11)
    assert found.contrast.amin() == 0 and found.contrast.amax() > 0


def test_with_integrated_gradients() -> None:
    pytest.importorskip("captum.attr", reason="captum is not installed: pip install 'diffcam_fast[saliency]'")
    model, given = make(Plain), images()
    found = contrastive_saliency(model, given, rivals=2, method=integrated_gradients, steps=4)
    classes = torch.cat([found.classes[:, None], found.rivals], 1)
    # Of logits, and not of what the method explains by default.
    maps = integrated_gradients(model, given, classes, steps=4, target=Logit()).attributions
    assert torch.allclose(found.contrast, saliency_contrast(maps[:, 0].relu(), maps[:, 1:].relu()), atol=1e-12)


def test_by_default_the_predicted_class_against_the_next() -> None:
    model, given = make(Plain), images()
    found = contrastive_saliency(model, given)
    two = model.eval()(given.clone()).topk(2).indices
    assert torch.equal(found.classes, two[:, 0]) and torch.equal(found.rivals, two[:, 1:])
    named = contrastive_saliency(model, given, two[:, 0], rivals=two[:, 1:])
    assert torch.equal(found.contrast, named.contrast)
    listed = contrastive_saliency(model, given, two[:, 0].tolist(), rivals=two[:, 1:].numpy())
    assert torch.equal(found.contrast, listed.contrast)
    other = contrastive_saliency(model, given, target=Probability())
    assert not torch.equal(found.saliency, other.saliency)


def test_a_method_of_your_own() -> None:
    def own(model: nn.Module, given: Tensor, classes: Tensor, *, factor: float) -> Tensor:
        return factor * given.unsqueeze(1) * (1 + classes[:, :, None, None, None])

    given = images().abs()
    found = contrastive_saliency(make(Plain), given, 0, rivals=[[1, 2]] * 3, method=own, factor=2.0)
    assert torch.equal(found.saliency, 2 * given)
    # They differ by a factor: at energy 1 nothing is left.
    assert found.contrast.amax() < 1e-7


def test_model_and_random_numbers_stay_as_they_are() -> None:
    model, given = make(Mixed), images()
    before, pixels = state(model), given.clone()
    contrastive_saliency(model, given, rivals=2)
    assert_same(state(model), before)
    assert torch.equal(given, pixels)


@pytest.mark.parametrize(
    ("classes", "options", "error", "message"),
    [
        ([[0, 1]] * 3, {}, ValueError, r"classes: expected None, an integer, or \(3,\) integers; got \(3, 2\)"),
        (None, {"rivals": 0}, ValueError, f"rivals: expected 1 to {CLASSES - 1} of {CLASSES} classes; got 0"),
        (None, {"rivals": CLASSES}, ValueError, f"rivals: expected 1 to {CLASSES - 1}"),
        (None, {"rivals": True}, TypeError, "rivals: expected an integer or classes; got bool"),
        (None, {"rivals": [1, 2, 3]}, ValueError, r"rivals: expected an integer, or classes of shape \(3, R\)"),
        (0, {"rivals": [[1], [2], [0]]}, ValueError, "rivals: expected other classes than those explained"),
        (None, {"part": "negative"}, ValueError, "part: expected one of positive, magnitude, all; got 'negative'"),
        (None, {"method": "guided"}, TypeError, "method: expected a function; got str"),
        (None, {"method": lambda *_: None}, TypeError, "method: expected it to return a torch.Tensor"),
        (None, {"method": lambda model, given, classes: given}, ValueError, r"method: expected maps \(N, T, C, \*S\)"),
    ],
)
def test_wrong_arguments_are_named(classes: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        contrastive_saliency(make(Plain), images(), classes, **options)
