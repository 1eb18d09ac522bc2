"""Where torchcam is wrong: ours is right, and ``strict=True`` does as it does. The table is in the docs."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffcam_fast.compat.originals import original
from diffcam_fast.compat.torchcam import methods as ours
from diffcam_fast.compat.torchcam.utils import overlay_mask
from tests.compat.networks import Flat, Pooled, images, make
from tests.tolerances import COMPAT_SHARE_OF_RANGE, PIXEL

pytest.importorskip("torchcam")
theirs = original("torchcam", "methods")


def explain(cam: Any, x: Tensor, class_idx: Any = 4, **options: Any) -> Tensor:
    with cam:
        torch.manual_seed(0)
        (found,) = cam(class_idx, cam.model(x), **options)
    return found


def off(found: Tensor, expected: Tensor) -> float:
    """The largest difference; maps span 0 to 1."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert expected.max() - expected.min() > 0.5
    return float((found - expected).abs().max())


class _Squashing(Flat):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        x = self.late(self.early(x))
        return self.head(x.sigmoid_() if self.in_place else x.sigmoid())


GRADIENTS = ("GradCAM", "XGradCAM", "LayerCAM", "SmoothGradCAMpp", "FinerCAM")


@pytest.mark.parametrize("name", GRADIENTS)
def test_in_place_operation_after_the_layer(name: str) -> None:
    working_in_place = make(_Squashing, torch.float64, in_place=True)
    right = make(_Squashing, torch.float64, in_place=False)
    right.load_state_dict(working_in_place.state_dict())
    x = images(Flat, dtype=torch.float64)
    expected = explain(getattr(theirs, name)(right, "late"), x)
    wrong = explain(getattr(theirs, name)(working_in_place, "late"), x)
    assert off(wrong, expected) > 0.1
    assert off(explain(getattr(ours, name)(working_in_place, "late"), x), expected) <= COMPAT_SHARE_OF_RANGE
    strict = getattr(ours, name)(working_in_place, "late", strict=True)
    assert off(explain(strict, x), wrong) <= COMPAT_SHARE_OF_RANGE


def test_in_place_operation_without_gradients() -> None:
    class Averaging(Pooled):
        def __init__(self, in_place: bool) -> None:
            super().__init__()
            self.relu = nn.ReLU(in_place)

    torch.manual_seed(0)
    working_in_place, x = Averaging(True).eval(), images(Pooled)
    right = Averaging(False).eval()
    right.load_state_dict(working_in_place.state_dict())
    expected, wrong = explain(theirs.CAM(right, "late"), x), explain(theirs.CAM(working_in_place, "late"), x)
    assert off(wrong, expected) > 0.1
    assert off(explain(ours.CAM(working_in_place, "late"), x), expected) <= COMPAT_SHARE_OF_RANGE
    assert off(explain(ours.CAM(working_in_place, "late", strict=True), x), wrong) <= COMPAT_SHARE_OF_RANGE


class _View(nn.Module):
    """The layer puts out a view, and a sum in place changes it."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.convolution, self.late = nn.Conv2d(3, 12, 3, padding=1), nn.PixelShuffle(1)
        self.late.forward = lambda x: x.view(x.shape)  # type: ignore[method-assign]
        self.in_place = in_place
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(12 * 12 * 10, 7))

    def forward(self, x: Tensor) -> Tensor:
        x = self.late(self.convolution(x))
        return self.head(x.sigmoid_() if self.in_place else x.sigmoid())


@pytest.mark.parametrize("frozen", (False, True))
def test_in_place_operation_on_a_view(frozen: bool) -> None:
    torch.manual_seed(0)
    working_in_place = _View(True)
    right = _View(False)
    right.load_state_dict(working_in_place.state_dict())
    expected = explain(theirs.GradCAM(right, "late"), images(Flat))
    working_in_place.requires_grad_(not frozen)
    found = explain(ours.GradCAM(working_in_place, "late"), images(Flat))
    assert off(found, expected) <= COMPAT_SHARE_OF_RANGE


def test_grad_cam_plus_plus_is_divided() -> None:
    """The original divides a copy, and goes on with what was not divided."""
    model, x = make(Flat, torch.float64), images(Flat, dtype=torch.float64)
    a = model.late(model.early(x)).detach().requires_grad_()
    (g,) = torch.autograd.grad(model.head(model.relu(a))[:, 4].sum(), a)
    alpha = torch.where(g**2 > 0, g**2 / (2 * g**2 + (g**3 * a).sum((2, 3), keepdim=True) + 1e-8), 0)
    for weights, cam in (
        ((alpha * g.relu()).sum((2, 3)), ours.GradCAMpp(model, "late")),
        (g.relu().pow(3).sum((2, 3)), ours.GradCAMpp(model, "late", strict=True)),
        (g.relu().pow(3).sum((2, 3)), theirs.GradCAMpp(model, "late")),
    ):
        expected = (weights[:, :, None, None] * a).sum(1).relu().detach()
        found = explain(cam, x, normalized=False)
        assert expected.any() and (found - expected).abs().max() <= 1e-12 * expected.max()
    assert off(explain(ours.GradCAMpp(model, "late"), x), explain(theirs.GradCAMpp(model, "late"), x)) > 0.1


def test_values_that_are_no_numbers() -> None:
    model, x = make(Flat), images(Flat)
    with torch.no_grad():
        model.late[1].weight[0] = torch.nan
    model.head[1].weight.data[:, :30] = 0
    wrong = explain(theirs.LayerCAM(model, "late.1"), x)
    assert wrong.isfinite().all()
    assert explain(ours.LayerCAM(model, "late.1"), x).isnan().all()
    strict = explain(ours.LayerCAM(model, "late.1", strict=True), x)
    assert torch.equal(strict, wrong)


@pytest.mark.parametrize("name", ("GradCAM", "GradCAMpp"))
def test_half_precision(name: str) -> None:
    """Weights that vanish in half precision, and a constant map."""
    model, x = make(Flat), images(Flat)
    model.head[3].weight.data /= 2000
    expected = explain(getattr(ours, name)(model, "late"), x)
    half = copy.deepcopy(model).half()
    wrong = explain(getattr(theirs, name)(half, "late"), x.half())
    found = explain(getattr(ours, name)(half, "late"), x.half())
    assert found.dtype == wrong.dtype == torch.float16
    assert off(found.float(), expected) < 0.05
    strict = explain(getattr(ours, name)(half, "late", strict=True), x.half())
    if name == "GradCAMpp":
        assert wrong.isnan().any() and torch.equal(strict.isnan(), wrong.isnan())
    with torch.no_grad():
        half.head[3].weight.zero_()
    assert explain(getattr(theirs, name)(half, "late"), x.half()).isnan().all()
    assert not explain(getattr(ours, name)(half, "late"), x.half()).any()


def test_noise_does_not_reach_batch_statistics() -> None:
    model, x = make(Flat), images(Flat)
    found = {}
    for name, module, options in (("ours", ours, {}), ("strict", ours, {"strict": True}), ("theirs", theirs, {})):
        trained = copy.deepcopy(model).train()
        before = {}
        with module.SmoothGradCAMpp(trained, "late", **options) as cam:
            torch.manual_seed(0)
            scores = trained(x)
            before = copy.deepcopy(trained.state_dict())
            (found[name],) = cam(4, scores)
        assert trained.training and trained.late.training
        unmoved = all(torch.equal(value, before[key]) for key, value in trained.state_dict().items())
        assert unmoved is (name == "ours")
    assert off(found["strict"], found["theirs"]) <= COMPAT_SHARE_OF_RANGE
    assert off(found["ours"], found["theirs"]) > 0.01


def test_second_map_of_a_noisy_pass() -> None:
    """The original has put the noisy image's activations in the place of the image's."""
    model, x = make(Flat), images(Flat)
    for name, module, options in (("ours", ours, {}), ("strict", ours, {"strict": True}), ("theirs", theirs, {})):
        found = []
        with module.SmoothGradCAMpp(model, "late", **options) as cam:
            model(x)
            for _ in range(2):
                torch.manual_seed(0)
                found.append(cam(4)[0])
        assert (off(found[1], found[0]) == 0) is (name == "ours")
        if name == "strict":
            second = found[1]
    assert off(second, found[1]) <= COMPAT_SHARE_OF_RANGE


def test_class_that_is_not_there() -> None:
    model, x = make(Flat), images(Flat)
    with pytest.raises(RuntimeError, match="out of bounds"):
        explain(theirs.GradCAM(model, "late"), x, [1, 2, 99])
    for class_idx in (99, [1, 2, 99], [[1], [2], [99]]):
        with pytest.raises(IndexError, match="class_idx: expected classes below 7; got 99"):
            explain(ours.GradCAM(model, "late"), x, class_idx)
        with pytest.raises(ValueError, match="class_idx: expected classes below 7; got 99"):
            explain(ours.FinerCAM(model, "late"), x, class_idx)


def test_fusing_signals() -> None:
    maps = [torch.rand(2, 4), torch.rand(2, 8)]
    with pytest.raises(ValueError, match="align_corners"):
        theirs.GradCAM.fuse_cams(maps)
    fused = ours.GradCAM.fuse_cams(maps)
    assert fused.shape == (2, 8) and (fused >= maps[1]).all()


def test_overlay_of_bytes() -> None:
    """Squares of bytes start again at 0 behind 255."""
    image = pytest.importorskip("PIL.Image")
    their_overlay = original("torchcam", "utils").overlay_mask
    values = np.linspace(0, 255, 64, dtype=np.uint8).reshape(8, 8)
    picture = image.fromarray(np.zeros((8, 8, 3), np.uint8))
    expected = np.asarray(their_overlay(picture, image.fromarray(values / np.float32(255))), np.int64)
    wrong = np.asarray(their_overlay(picture, image.fromarray(values)), np.int64)
    assert np.abs(wrong - expected).max() > 50
    found = np.asarray(overlay_mask(picture, image.fromarray(values)), np.int64)
    assert np.abs(found - expected).max() <= PIXEL
    strict = np.asarray(overlay_mask(picture, image.fromarray(values), strict=True), np.int64)
    assert np.array_equal(strict, wrong)


class _Aliased(nn.Module):
    """The layer puts out what it is given, which then changes by its first name."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.late = nn.Conv2d(3, 12, 3, padding=1), nn.Identity()
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(12 * 12 * 10, 7))

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolution(x)
        late = self.late(x)
        x.sigmoid_()
        return self.head(late)


@pytest.mark.parametrize("frozen", (False, True))
def test_in_place_operation_by_another_name(frozen: bool) -> None:
    torch.manual_seed(0)
    model, x = _Aliased().requires_grad_(not frozen), images(Flat)
    with ours.GradCAM(model, "late") as cam:
        cam(1, model(x))
        assert torch.equal(cam.hook_a[0], model.convolution(x))
