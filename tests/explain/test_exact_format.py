"""Channels-last images where that changes no bit: found, kept to, and left alone where it cannot be had."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from diffcam_fast.compat.pytorch_grad_cam import (
    EigenCAM,
    EigenGradCAM,
    FinerCAM,
    GradCAM,
    GradCAMElementWise,
    GradCAMPlusPlus,
    HiResCAM,
    LayerCAM,
    XGradCAM,
)
from diffcam_fast.explain import exact_format as room
from diffcam_fast.explain.exact_format import Restored, Restoring, exact_format
from diffcam_fast.explain.habits import SETTLING
from tests.explain.test_side_effects import _unchanged

#: So many that it was tried.
PASSES = SETTLING + 3

METHODS = [
    EigenCAM,
    EigenGradCAM,
    FinerCAM,
    GradCAM,
    GradCAMElementWise,
    GradCAMPlusPlus,
    HiResCAM,
    LayerCAM,
    XGradCAM,
]


def _as_it_is(x: Tensor) -> Tensor:
    return x


class Separable(nn.Module):
    """Depthwise separable convolutions, the last of which add up many channels over few positions.

    It notes the order of the images, and of what `narrow` puts out.
    """

    def __init__(self, change: Callable[[Tensor], Tensor] = _as_it_is) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.stem = nn.Conv2d(3, 32, 3, 2, padding=1)
        self.wide = nn.Conv2d(32, 32, 3, 2, padding=1, groups=32)
        self.point = nn.Conv2d(32, 256, 1)
        self.narrow = nn.Conv2d(256, 64, 1)
        self.layer = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, groups=64), nn.ReLU())
        self.head = nn.Linear(64, 7)
        self.change = change
        self.orders: dict[str, list[bool]] = {"images": [], "narrow": []}
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self._note("images", x)
        x = self.point(functional.relu6(self.wide(self.stem(self.change(x)))))
        x = self.narrow(x)
        self._note("narrow", x)
        x = self.layer(x)
        return self.head(x.mean((2, 3)))

    def _note(self, name: str, x: Tensor) -> None:
        self.orders[name].append(not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last))


class Excited(nn.Module):
    """Channels scaled by a mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.pool(x).sigmoid()


def _images(count: int = 2, side: int = 56) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def _measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on the processors that the rule was measured on, whatever this one is."""
    monkeypatch.setattr("diffcam_fast.explain.memory_format._is_measured_here", lambda: True)


@pytest.fixture(autouse=True)
def _gradients_off() -> Iterator[None]:
    with torch.no_grad():
        yield


def _claims(monkeypatch: pytest.MonkeyPatch, *rounding: nn.Module) -> None:
    """These modules round otherwise and no others do, on whatever processor."""
    monkeypatch.setattr(room, "_are_same", lambda *pair: True)
    monkeypatch.setattr(room, "_rounds_otherwise", lambda module, images: any(module is one for one in rounding))


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("side", [28, 56, 61])
def test_the_same_bits(count: int, side: int) -> None:
    """What is found for some images holds for others, and for all that the model puts out."""
    model = Separable()
    where = exact_format(model, [model.layer], _images(count, side))
    assert where is not None
    for seed in range(3):
        images = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))
        expected = model(images)
        with Restoring(where):
            assert torch.equal(model(images.contiguous(memory_format=torch.channels_last)), expected)


def test_contiguous_from_where_bits_would_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Separable()
    _claims(monkeypatch, model.narrow, model.layer[0])
    # The second never gets channels-last images.
    assert exact_format(model, [model.layer], _images()) == Restored((model.narrow,), ())
    assert model.orders == {"images": [False, True], "narrow": [False, False]}


def test_contiguous_after_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Separable()
    _claims(monkeypatch)
    assert exact_format(model, [model.layer], _images()) == Restored((), (model.layer,))
    assert model.orders == {"images": [False, True], "narrow": [False, True]}


def test_means_over_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in squeeze-and-excitation: the mean gets a copy, and what it is of stays as it is."""
    model = Separable()
    model.narrow = nn.Sequential(Excited(), model.narrow)
    _claims(monkeypatch, model.narrow[0].pool)
    assert exact_format(model, [model.layer], _images()) == Restored((model.narrow[0].pool,), (model.layer,))
    assert model.orders["narrow"] == [False, True]


def test_coarser_rounding_tells_nothing() -> None:
    model = Separable()
    with torch.autocast("cpu", torch.bfloat16):
        assert exact_format(model, [model.layer], _images()) is None
    assert exact_format(model.bfloat16(), [model.layer], _images().bfloat16()) is None
    assert model.orders["images"] == []


def test_zeros_tell_as_much() -> None:
    model = Separable()
    assert exact_format(model, [model.layer], torch.zeros(2, 3, 56, 56)) == exact_format(
        model, [model.layer], _images()
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.view(-1).view(x.shape) if not x.is_contiguous() else x,
        lambda x: x + torch.rand(()),
        lambda x: x * (1 + 1e-6 * x.is_contiguous()),
        lambda x: x.as_strided(x.shape, x.contiguous().stride()),
    ],
    ids=["fails", "draws", "asks", "reads memory"],
)
def test_models_that_do_not_work_so(change: Callable[[Tensor], Tensor]) -> None:
    model, images = Separable(change), _images()
    cam = GradCAM(model, [model.layer])
    for _ in range(PASSES):
        cam(images)
    assert model.orders["images"].count(True) <= 1
    assert len(model.orders["images"]) > PASSES
    assert not model.orders["images"][-1]


def test_random_numbers_are_those_of_a_plain_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a pass fails after it has drawn some."""

    def failing(x: Tensor) -> Tensor:
        torch.rand(3)
        raise RuntimeError

    model, state = Separable(failing), torch.get_rng_state()
    assert exact_format(model, [model.layer], _images()) is None
    assert torch.equal(torch.get_rng_state(), state)
    images, found = _images(), []
    for measured in (True, False):
        monkeypatch.setattr("diffcam_fast.explain.memory_format._is_measured_here", lambda measured=measured: measured)
        model = Separable(lambda x: x + torch.rand(x.shape))
        cam = GradCAM(model, [model.layer])
        torch.manual_seed(0)
        found.append([cam(images) for _ in range(PASSES)])
        assert model.orders["images"].count(True) == 0
    assert np.array_equal(*found)


class EqualToAll(nn.Sequential):
    """Modules may define their own equality."""

    def __hash__(self) -> int:
        return 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, nn.Module)


def test_modules_that_are_equal_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Separable()
    model.narrow, model.layer = EqualToAll(model.narrow), EqualToAll(*model.layer)
    _claims(monkeypatch)
    found = exact_format(model, [model.narrow, model.layer], _images())
    assert found is not None
    assert found.after == (model.narrow,)
    assert found.after[0] is model.narrow


@pytest.mark.parametrize(("factor", "found"), [(0.0, True), (1e-6, False)])
def test_what_a_layer_puts_out_counts(factor: float, found: bool) -> None:
    """Logits alone need not show it."""
    model = Separable(lambda x: x * (1 + factor * x.is_contiguous()))
    model.head.weight.zero_()
    assert (exact_format(model, [model.layer], _images()) is not None) == found


def test_strides_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the caller gets of a layer is laid out as ever."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(2))
    monkeypatch.setattr(room, "_rounds_otherwise", lambda module, images: False)
    assert exact_format(model, [model[1]], _images()) is None


@pytest.mark.parametrize("method", METHODS)
def test_maps_of_drop_ins(method: type, monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = Separable(), _images(3)
    cam = method(model, [model.layer])
    with _unchanged(model):
        found = [cam(images) for _ in range(PASSES)]
    # The trial, and from then on.
    settling = len(model.orders["images"]) - 5
    assert model.orders["images"] == [False] * settling + [False, True] + [True] * 3
    assert settling == SETTLING
    monkeypatch.setattr("diffcam_fast.explain.memory_format._is_measured_here", lambda: False)
    plain = method(model, [model.layer])
    expected = plain(images)
    assert not model.orders["images"][-1]
    assert all(np.array_equal(one, expected) for one in found)
    assert np.ptp(expected) > 0
    if hasattr(cam, "activations_and_grads"):
        ((one,), (other,)) = cam.activations_and_grads.activations, plain.activations_and_grads.activations
        assert one.stride() == other.stride()
        assert torch.equal(one, other)


def test_strict_leaves_images_alone() -> None:
    model = Separable()
    cam = GradCAM(model, [model.layer], strict=True)
    for _ in range(PASSES):
        cam(_images())
    assert model.orders["images"] == [False] * PASSES


def test_images_that_do_not_come_again_are_not_tried() -> None:
    model = Separable()
    cam = GradCAM(model, [model.layer])
    for side in range(40, 60):
        cam(_images(1, side))
    assert model.orders["images"] == [False] * 20


def test_targets_are_asked_once() -> None:
    calls = []

    def target(output: Tensor) -> Tensor:
        calls.append(output.shape)
        return output[2]

    model = Separable()
    cam = GradCAM(model, [model.layer])
    for _ in range(PASSES):
        cam(_images(1), [target])
    assert model.orders["images"][-1]
    assert len(calls) == PASSES


def test_the_last_of_many_shapes_is_tried_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffcam_fast.explain.habits._SIGNATURES", 2)
    model = Separable()
    cam = GradCAM(model, [model.layer])
    for side in (40, 48, 56):
        for _ in range(PASSES if side == 56 else 1):
            cam(_images(1, side))
    assert model.orders["images"][-1]


def test_images_that_fail_are_not_kept_count_of() -> None:
    model = Separable()
    cam = GradCAM(model, [model.layer])
    for side in range(40, 50):
        with pytest.raises(RuntimeError, match="channels"):
            cam(torch.zeros(1, 4, side, side))
    assert not cam._engine._habits._passes


def test_other_numbers_of_threads_are_asked_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("diffcam_fast.compat.engine.exact_format", lambda *given: asked.append(torch.get_num_threads()))
    model, before = Separable(), torch.get_num_threads()
    cam = GradCAM(model, [model.layer])
    try:
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            for _ in range(PASSES):
                cam(_images())
    finally:
        torch.set_num_threads(before)
    assert asked == [1, 2]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cam: pickle.loads(pickle.dumps(cam))], ids=["copy", "pickle"])
def test_copies(copied: Callable[[GradCAM], GradCAM]) -> None:
    model, images = Separable(), _images()
    cam = GradCAM(model, [model.layer])
    expected = [cam(images) for _ in range(PASSES)][-1]
    other = copied(cam)
    assert np.array_equal(other(images), expected)
    assert other.model is not model
    assert other.model.orders["images"][-1]
