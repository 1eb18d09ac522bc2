"""Images handed on in another order in memory: when, with the same result, and what happens where that fails."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from diffcam_fast.explain import Explainer
from diffcam_fast.explain.memory_format import FasterFormat, same_but_for_rounding
from tests.explain.test_side_effects import SURROUNDINGS, _unchanged


class Depthwise(nn.Module):
    """A small network with a depthwise separable convolution, which notes the order of what it gets."""

    def __init__(self, tail: Callable[[Depthwise, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.stem, self.wide = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.layer, self.head = nn.Conv2d(8, 16, 1), nn.Linear(16, 5)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.tail = tail or (lambda model, y: model.head(model.pool(y).flatten(1)))
        self.channels_last: list[bool] = []
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.channels_last.append(x.is_contiguous(memory_format=torch.channels_last))
        return self.tail(self, self.layer(functional.relu6(self.wide(self.stem(x)))))


def _images(count: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 3, 12, 10, generator=torch.Generator().manual_seed(5)).to(dtype)


@pytest.fixture(autouse=True)
def _measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on the processors that the rule was measured on, whatever this one is."""
    monkeypatch.setattr("diffcam_fast.explain.memory_format._is_measured_here", lambda: True)


class TestRule:
    def test_depthwise_separable_convolutions(self) -> None:
        rule = FasterFormat(Depthwise())
        assert rule(_images()) is rule(_images(1)) is torch.channels_last
        assert rule(_images().bfloat16()) is torch.channels_last

    @pytest.mark.parametrize(
        "convolutions",
        [
            [nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 1)],
            [nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 8, 1)],
            # As in ConvNeXt, with linear layers between.
            [nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 8, 2, stride=2)],
            [nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 8, 1, groups=2)],
            [nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 8, (1, 3))],
        ],
        ids=lambda convolutions: ", ".join(map(repr, convolutions)),
    )
    def test_other_convolutions(self, convolutions: list[nn.Module]) -> None:
        assert FasterFormat(nn.Sequential(*convolutions))(torch.zeros(64, 4, 64, 64)) is None

    @pytest.mark.parametrize(
        "images",
        [
            _images().contiguous(memory_format=torch.channels_last),
            _images()[:, :, ::2],
            _images()[:, :1],
            _images(0),
            _images().double(),
            _images().half(),
            _images().to("meta"),
            torch.randn(2, 3, 12),
            torch.randn(2, 3, 4, 4, 4),
        ],
        ids=lambda images: f"{tuple(images.shape)} {images.stride()} {images.dtype} {images.device}",
    )
    def test_images_that_stay_as_they_are(self, images: Tensor) -> None:
        assert FasterFormat(Depthwise())(images) is None

    def test_processors_that_nothing_is_known_of(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()
        monkeypatch.setattr("platform.machine", lambda: "aarch64")
        assert FasterFormat(Depthwise())(_images()) is None


@pytest.mark.parametrize("surroundings", SURROUNDINGS)
@pytest.mark.parametrize("method", ["gradcam", "layercam"])
def test_same_maps_in_both_orders(method: str, surroundings: str) -> None:
    model, images = Depthwise(), _images()
    expected = Explainer(model, "layer", method, memory_format=torch.preserve_format)
    explainer = Explainer(model, "layer", method)
    with SURROUNDINGS[surroundings]():
        wanted = expected(images, [[0, 1]] * 2)
        model.channels_last.clear()
        found = []
        for _ in range(3):
            with _unchanged(model):
                found.append(explainer(images, [[0, 1]] * 2))
    assert model.channels_last == [False, True, True, True]
    rounding = {"rtol": 0, "atol": 0.05 if "autocast" in surroundings else 1e-5}
    for explanation in found:
        torch.testing.assert_close(explanation.logits, wanted.logits, **rounding)
        torch.testing.assert_close(explanation.maps, wanted.maps, **rounding)
        # One order from the first result on: the same images give the same result.
        assert torch.equal(explanation.logits, found[0].logits)
    torch.testing.assert_close(found[1].maps, found[2].maps, rtol=0, atol=0)


def test_other_shapes_are_not_tried_again() -> None:
    model = Depthwise()
    explainer = Explainer(model, "layer")
    for count in (2, 3, 1):
        for _ in range(2):
            explainer(_images(count))
    assert model.channels_last == [False, *[True] * 6]


def _view(model: Depthwise, y: Tensor) -> Tensor:
    return model.head(y.view(len(y), -1).reshape(len(y), 16, -1).mean(2))


def _memory(model: Depthwise, y: Tensor) -> Tensor:
    # What a kernel does that takes every tensor for contiguous.
    return model.head(
        torch.as_strided(y, y.shape, (y.shape[1:].numel(), y.shape[2:].numel(), y.shape[3], 1)).amax((2, 3))
    )


@pytest.mark.parametrize("tail", [_view, _memory])
def test_models_that_depend_on_an_order(tail: Callable[[Depthwise, Tensor], Tensor]) -> None:
    model, images = Depthwise(tail), _images()
    expected = Explainer(model, "layer", memory_format=torch.preserve_format)(images)
    model.channels_last.clear()
    explainer = Explainer(model, "layer")
    for _ in range(3):
        found = explainer(images)
        assert torch.equal(found.logits, expected.logits)
        torch.testing.assert_close(found.maps, expected.maps)
    explainer(_images(3))
    assert model.channels_last == [False, True, False, False, False]


def test_an_error_is_not_hidden_by_another_order() -> None:
    def broken(model: Depthwise, y: Tensor) -> Tensor:
        raise ValueError("out of luck")

    model = Depthwise(broken)
    with pytest.raises(ValueError, match="out of luck"):
        Explainer(model, "layer")(_images())
    assert model.channels_last == [False]


def test_random_numbers_are_drawn_once() -> None:
    model = Depthwise(lambda m, y: m.head(functional.dropout(y.mean((2, 3)), 0.5)))
    explainer, images = Explainer(model, "layer"), _images()
    torch.manual_seed(7)
    found = explainer(images)
    after = torch.rand(1)
    assert model.channels_last == [False, True]
    torch.manual_seed(7)
    torch.testing.assert_close(found.logits, model(images))
    assert torch.equal(after, torch.rand(1))
    # Both passes drew the same numbers, or their results would not have agreed.
    explainer(images)
    assert model.channels_last[-1]


def test_random_numbers_are_drawn_once_although_the_other_order_fails() -> None:
    model = Depthwise(lambda m, y: functional.dropout(_view(m, y), 0.5))
    explainer, images = Explainer(model, "layer"), _images()
    torch.manual_seed(7)
    explainer(images, [[0]] * 2)
    after = torch.rand(1)
    assert model.channels_last == [False, True]
    torch.manual_seed(7)
    model(images)
    assert torch.equal(after, torch.rand(1))


def test_a_model_that_draws_nothing_sets_no_generator_back(monkeypatch: pytest.MonkeyPatch) -> None:
    set_back: list[Tensor] = []
    monkeypatch.setattr(torch, "set_rng_state", set_back.append)
    model = Depthwise()
    Explainer(model, "layer")(_images())
    assert model.channels_last == [False, True]
    assert set_back == []


@pytest.mark.parametrize("memory_format", ["auto", torch.preserve_format])
def test_explainers_can_be_copied_and_pickled(memory_format: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.Conv2d(6, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert FasterFormat(model)(_images()) is torch.channels_last
    explainer = Explainer(model, "1", memory_format=memory_format)
    expected = explainer(_images()).maps
    for other in (pickle.loads(pickle.dumps(explainer)), copy.deepcopy(explainer)):
        assert torch.equal(other(_images()).maps, expected)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format, torch.preserve_format])
@pytest.mark.parametrize("given", [torch.channels_last, torch.contiguous_format])
def test_an_order_of_ones_own(memory_format: torch.memory_format, given: torch.memory_format) -> None:
    model, images = Depthwise(), _images().contiguous(memory_format=given)
    expected = Explainer(model, "layer", memory_format=torch.preserve_format)(_images())
    model.channels_last.clear()
    explainer = Explainer(model, "layer", memory_format=memory_format)
    for _ in range(2):
        torch.testing.assert_close(explainer(images).maps, expected.maps)
    kept = given if memory_format == torch.preserve_format else memory_format
    assert model.channels_last == [kept == torch.channels_last] * 2


def test_volumes_in_an_order_of_ones_own() -> None:
    seen: list[bool] = []
    model = nn.Sequential(nn.Conv3d(2, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten())
    model.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last_3d))
    )
    images = torch.randn(2, 2, 6, 6, 6)
    found = Explainer(model, "1", memory_format=torch.channels_last_3d)(images)
    torch.testing.assert_close(found.maps, Explainer(model, "1")(images).maps)
    assert seen == [True, False]
    with pytest.raises(ValueError, match=r"memory_format: .*channels_last is for images of 4 dimensions; got shape"):
        Explainer(model, "1", memory_format=torch.channels_last)(images)


def test_an_order_of_ones_own_for_a_compiled_explainer() -> None:
    images = _images()
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    seen: list[tuple[int, ...]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        tensors = (value for value in inputs if isinstance(value, Tensor))
        seen.extend(value.stride() for value in tensors if value.shape == images.shape)
        return graph

    explainer = Explainer(model, "1", memory_format=torch.channels_last)
    torch.testing.assert_close(explainer.compile(backend=backend, dynamic=False)(images).maps, explainer(images).maps)
    assert seen == [images.contiguous(memory_format=torch.channels_last).stride()]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("channels_last", ValueError, "memory_format: expected 'auto' or a torch.memory_format; got 'channels_last'"),
        (None, TypeError, "memory_format: expected 'auto' or a torch.memory_format; got NoneType"),
        (np.zeros(2), TypeError, "memory_format: expected 'auto' or a torch.memory_format; got ndarray"),
        (torch.strided, TypeError, "memory_format: expected 'auto' or a torch.memory_format; got layout"),
    ],
)
def test_what_is_no_order(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Explainer(Depthwise(), memory_format=given)


class TestRounding:
    def test_what_rounding_does(self) -> None:
        values = torch.randn(4, 50)
        assert same_but_for_rounding(values.bfloat16(), (values * (1 + 1e-3)).bfloat16())
        assert not same_but_for_rounding(values, values.flip(1))
        assert not same_but_for_rounding(values, values[:2])

    def test_values_that_are_not_finite(self) -> None:
        values = torch.randn(4, 50)
        values[0, 0], values[1, 1] = torch.nan, torch.inf
        assert same_but_for_rounding(values, values.clone())
        assert not same_but_for_rounding(values, values.nan_to_num())
        assert not same_but_for_rounding(values.nan_to_num(), values)
        assert same_but_for_rounding(values[:1, :1], values[:1, :1])

    def test_constants(self) -> None:
        assert same_but_for_rounding(torch.zeros(3), torch.zeros(3))
        assert not same_but_for_rounding(torch.ones(3), torch.zeros(3))
