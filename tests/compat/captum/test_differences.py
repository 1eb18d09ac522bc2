"""Where captum is wrong or refuses: ours is right, and ``strict=True`` does as it does. The table is in the docs."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffcam_fast.compat.captum import LayerGradCam
from diffcam_fast.compat.originals import original
from tests.compat.networks import Flat, Pooled, images, make
from tests.tolerances import COMPAT_SHARE_OF_RANGE

pytest.importorskip("captum")
Original = original("captum", "attr").LayerGradCam


def off(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the range."""
    assert found.shape == expected.shape
    extent = expected.detach().max() - expected.detach().min()
    assert extent > 0
    return float((found - expected).detach().abs().max() / extent)


class _HandingOn(nn.Module):
    """The layer hands on its input, which goes on to change."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.first, self.layer, self.in_place = nn.Conv2d(3, 6, 3), nn.Identity(), in_place
        self.head = nn.Linear(6 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.layer(x)
        x = x.relu_() if self.in_place else x.relu()
        return self.head((y * y + x).flatten(1))


class _Sum(_HandingOn):
    """A residual sum in place, of which the layer is given one part."""

    def __init__(self, in_place: bool) -> None:
        super().__init__(in_place)
        self.layer = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.layer(x)
        x = x.add_(y) if self.in_place else x + y
        return self.head((x * x).flatten(1))


@pytest.mark.parametrize(("kind", "of_input"), ((_HandingOn, False), (_HandingOn, True), (_Sum, True)))
def test_in_place_operation_by_another_name(kind: Any, of_input: bool) -> None:
    torch.manual_seed(0)
    working_in_place, right, x = kind(True), kind(False), torch.randn(2, 3, 8, 8)
    right.load_state_dict(working_in_place.state_dict())
    options = {"attribute_to_layer_input": of_input}
    expected = Original(right, right.layer).attribute(x, 1, **options)
    wrong = Original(working_in_place, working_in_place.layer).attribute(x, 1, **options)
    assert off(wrong, expected) > 0.1
    found = LayerGradCam(working_in_place, working_in_place.layer).attribute(x, 1, **options)
    assert off(found, expected) <= COMPAT_SHARE_OF_RANGE
    strict = LayerGradCam(working_in_place, working_in_place.layer, strict=True)
    assert off(strict.attribute(x, 1, **options), wrong) <= COMPAT_SHARE_OF_RANGE


class _Keeping(nn.Module):
    """A layer that keeps what it puts out, for the model to change."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept = x.sin()
        return self.kept


def test_in_place_operation_on_what_a_layer_keeps() -> None:
    torch.manual_seed(0)
    first, layer, head, x = nn.Conv2d(3, 6, 3), _Keeping(), nn.Linear(6 * 36, 5), torch.randn(2, 3, 8, 8)

    def model(x: Tensor, in_place: bool) -> Tensor:
        y = layer(first(x))
        kept = layer.kept.abs_() if in_place else layer.kept.abs()
        return head((y * y + kept.detach()).flatten(1))

    expected = Original(model, layer).attribute(x, 1, False)
    with pytest.raises(RuntimeError):
        Original(model, layer).attribute(x, 1, True)
    assert off(LayerGradCam(model, layer).attribute(x, 1, True), expected) <= COMPAT_SHARE_OF_RANGE


def test_half_precision_adds_up_wider() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1, bias=False), nn.Flatten(), nn.Linear(3 * 4, 2, bias=False)).half()
    with torch.no_grad():
        model[0].weight.fill_(300.0)
        model[2].weight.copy_(torch.tensor([150.0, 150.0, -250.0]).repeat_interleave(4).expand(2, 12))
    x = torch.ones(1, 2, 2, 2).half()
    # (150 + 150 - 250) times 600 fits into half precision; 150 times 600 does not.
    assert not Original(model, model[0]).attribute(x, 1).isfinite().any()
    assert (LayerGradCam(model, model[0]).attribute(x, 1) == 30000).all()
    assert not LayerGradCam(model, model[0], strict=True).attribute(x, 1).isfinite().any()


def test_history() -> None:
    model, x = make(Flat), images(Flat)
    weight = model.early[0].weight
    theirs = Original(model, model.late).attribute(x, 4)
    # It holds on to all that lies before the layer, and cannot become an array.
    (expected,) = torch.autograd.grad(theirs.sum(), weight)
    assert expected.any()
    found = LayerGradCam(model, model.late).attribute(x, 4)
    assert found.grad_fn is None and isinstance(found.numpy(), np.ndarray)
    strict = LayerGradCam(model, model.late, strict=True)
    assert torch.allclose(torch.autograd.grad(strict.attribute(x, 4).sum(), weight)[0], expected)
    with torch.no_grad():
        assert not strict.attribute(x, 4).requires_grad


@pytest.mark.parametrize("method", (False, True))
def test_statistics_of_training_mode(method: bool) -> None:
    model, x = make(Pooled).train(), images(Pooled)
    function = model.forward if method else model
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def moved() -> bool:
        return any(not torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())

    LayerGradCam(function, model.late).attribute(x, 4)
    LayerGradCam(function, model.late).attribute(x, 4, attribute_to_layer_input=True)
    assert not moved() and model.training
    LayerGradCam(function, model.late, strict=True).attribute(x, 4)
    assert moved()
    model.load_state_dict(before, strict=False)
    Original(function, model.late).attribute(x, 4)
    assert moved()


def test_flags_of_inputs() -> None:
    model, x = make(Flat), images(Flat)
    options = {"attribute_to_layer_input": True}
    LayerGradCam(model, model.early[0]).attribute(x, 4, **options)
    LayerGradCam(model, model.early[0]).attribute(x, 4, grad_kwargs={"create_graph": True}, **options)
    assert not x.requires_grad
    for cam in (Original(model, model.early[0]), LayerGradCam(model, model.early[0], strict=True)):
        x = images(Flat)
        cam.attribute(x, 4, **options)
        assert x.requires_grad


Pair = namedtuple("Pair", ("one", "other"))


class _Named(nn.Module):
    def forward(self, x: Tensor) -> Pair:
        return Pair(x * 2, x.tanh())


class _TakingByName(nn.Module):
    def __init__(self, by_name: bool) -> None:
        super().__init__()
        self.first, self.layer, self.head = nn.Conv2d(3, 4, 3), _Named(), nn.Linear(4, 7)
        self.by_name = by_name

    def forward(self, x: Tensor) -> Tensor:
        pair = self.layer(self.first(x))
        one, other = (pair.one, pair.other) if self.by_name else pair
        return self.head((one * other).mean((2, 3)))


def test_named_tuples() -> None:
    torch.manual_seed(0)
    model, plain, x = _TakingByName(True), _TakingByName(False), images(Flat)
    plain.load_state_dict(model.state_dict())
    expected = Original(plain, plain.layer).attribute(x, 4)
    found = refused_by_original(lambda cam: cam(model, model.layer).attribute(x, 4))
    assert len(found) == len(expected) == 2
    for one, other in zip(found, expected, strict=True):
        assert off(one, other) <= COMPAT_SHARE_OF_RANGE


def refused_by_original(call: Callable[[Any], Any]) -> Any:
    """What ours makes of a call that the original refuses."""
    with pytest.raises((AssertionError, RuntimeError, IndexError, AttributeError)):
        call(Original)
    return call(LayerGradCam)


def test_inference_mode() -> None:
    model, x = make(Flat), images(Flat)
    expected = Original(model, model.late).attribute(x, 4)

    def within(cam: Any) -> Tensor:
        with torch.inference_mode():
            return cam(model, model.late).attribute(x, 4)

    assert off(refused_by_original(within), expected) <= COMPAT_SHARE_OF_RANGE
    with torch.inference_mode():
        made_there = x.clone()
    found = refused_by_original(lambda cam: cam(model, model.late).attribute(made_there, 4))
    assert off(found, expected) <= COMPAT_SHARE_OF_RANGE
    found = refused_by_original(lambda cam: cam(model, model.early[0]).attribute(made_there, 4, None, True))
    assert off(found, Original(model, model.early[0]).attribute(x, 4, None, True)) <= COMPAT_SHARE_OF_RANGE

    def switching_off(x: Tensor) -> Tensor:
        with torch.no_grad():
            return model(x)

    found = refused_by_original(lambda cam: cam(switching_off, model.late).attribute(x, 4))
    assert off(found, expected) <= COMPAT_SHARE_OF_RANGE


@pytest.mark.parametrize(
    ("target", "known"),
    (
        (np.int64(4), 4),
        (np.array([4, 0, 6]), [4, 0, 6]),
        ([np.int64(4), 0, torch.tensor(6)], [4, 0, 6]),
        (torch.tensor([-3, 0, -1]), [4, 0, 6]),
        ([-3, 0, -1], [4, 0, 6]),
    ),
    ids=str,
)
def test_targets_of_other_types(target: Any, known: Any) -> None:
    model, x = make(Flat), images(Flat)
    expected = Original(model, model.late).attribute(x, known)
    assert off(LayerGradCam(model, model.late).attribute(x, target), expected) <= COMPAT_SHARE_OF_RANGE
    assert_refused(model, x, target)


def assert_refused(model: nn.Module, x: Tensor, target: Any) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        Original(model, model.late).attribute(x, target)


@pytest.mark.parametrize("kind", (Flat, Pooled))
def test_several_targets(kind: Any) -> None:
    model, x = make(kind), images(kind, 2)
    classes = [[4, 0, 3], [1, 4, -1]]
    for options in ({}, {"attr_dim_summation": False}, {"attribute_to_layer_input": True}):
        each = [Original(model, model.late).attribute(x, [row[t] % 7 for row in classes], **options) for t in range(3)]
        expected = torch.stack(each, 1) if "attr_dim_summation" in options else torch.cat(each, 1)
        for target in (classes, torch.tensor(classes), np.array(classes)):
            assert_refused(model, x, target)
            found = LayerGradCam(model, model.late).attribute(x, target, **options)
            assert off(found, expected) <= COMPAT_SHARE_OF_RANGE
    single = LayerGradCam(model, model.late).attribute(x, [[4], [1]])
    assert off(single, Original(model, model.late).attribute(x, [4, 1])) <= COMPAT_SHARE_OF_RANGE
    with_history = LayerGradCam(model, model.late, strict=True).attribute(x, classes)
    assert with_history.shape == (2, 3, 6, 5) and with_history.requires_grad


def test_batches_without_images_and_sums_over_the_batch() -> None:
    model, x = make(Flat), images(Flat)
    found = refused_by_original(lambda cam: cam(model, model.late).attribute(x[:0], 4))
    assert found.shape == (0, 1, 6, 5)
    found = refused_by_original(lambda cam: cam(lambda x: model(x)[:, 4].sum(), model.late).attribute(x))
    assert off(found, Original(model, model.late).attribute(x, 4)) <= COMPAT_SHARE_OF_RANGE


def test_tensors_that_the_output_does_not_use() -> None:
    torch.manual_seed(0)
    model, x = _TakingByName(False), images(Flat)

    def function(x: Tensor) -> Tensor:
        return model.head(model.layer(model.first(x))[0].mean((2, 3)))

    options = {"allow_unused": True}
    found = refused_by_original(lambda cam: cam(function, model.layer).attribute(x, 4, grad_kwargs=options))
    assert found[0].any() and not found[1].any()
