"""Where pytorch-grad-cam is wrong: ours is right, and ``strict=True`` does as it does. The table is in the docs."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffcam_fast.compat import pytorch_grad_cam as ours
from diffcam_fast.compat.originals import original
from tests.compat.networks import Flat, Tokens, images, make
from tests.tolerances import COMPAT_SHARE_OF_RANGE

pytest.importorskip("tests.helpers.torchvision_cpu")
pytest.importorskip("pytorch_grad_cam")
theirs = original("pytorch_grad_cam")
Target = ours.utils.model_targets.ClassifierOutputTarget


def off(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference; maps span 0 to 1."""
    assert found.shape == expected.shape and np.ptp(expected) > 0.5
    return float(np.abs(found - expected).max())


def test_in_place_operation_after_the_layer() -> None:
    working_in_place, right = make(Flat, in_place=True), make(Flat)
    right.load_state_dict(working_in_place.state_dict())
    x, targets = images(Flat), [Target(4)] * 3
    expected = theirs.GradCAM(right, [right.late])(x, targets)
    wrong = theirs.GradCAM(working_in_place, [working_in_place.late])(x, targets)
    assert off(wrong, expected) > 0.1
    found = ours.GradCAM(working_in_place, [working_in_place.late])(x, targets)
    assert off(found, expected) <= COMPAT_SHARE_OF_RANGE
    strict = ours.GradCAM(working_in_place, [working_in_place.late], strict=True)
    assert off(strict(x, targets), wrong) <= COMPAT_SHARE_OF_RANGE


def test_in_place_operation_without_gradients() -> None:
    working_in_place, right = make(Flat, in_place=True), make(Flat)
    right.load_state_dict(working_in_place.state_dict())
    x = images(Flat)
    expected = theirs.EigenCAM(right, [right.late])(x, None)
    wrong = theirs.EigenCAM(working_in_place, [working_in_place.late])(x, None)
    assert off(wrong, expected) > 0.1
    assert off(ours.EigenCAM(working_in_place, [working_in_place.late])(x), expected) <= COMPAT_SHARE_OF_RANGE
    strict = ours.EigenCAM(working_in_place, [working_in_place.late], strict=True)
    assert off(strict(x), wrong) <= COMPAT_SHARE_OF_RANGE


class _WorkingInPlace(Tokens):
    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = self.late(self.block(torch.cat([self.token.expand(len(x), -1, -1), x], 1)))
        return self.head(self.last(x.mul_(-1))[:, 0])


@pytest.mark.parametrize("copying", (False, True))
def test_in_place_operation_and_a_reshape_transform(copying: bool) -> None:
    def transform(tokens: Tensor) -> Tensor:
        found = ours.utils.reshape_transforms.vit_reshape_transform(tokens, 4, 4)
        return found.clone() if copying else found

    model = make(_WorkingInPlace)
    x = images(Tokens)
    expected = theirs.HiResCAM(model, [model.late], transform)(x, [Target(1)] * 3)
    strict = ours.HiResCAM(model, [model.late], transform, strict=True)
    assert off(strict(x, [Target(1)] * 3), expected) <= COMPAT_SHARE_OF_RANGE
    found = ours.HiResCAM(model, [model.late], transform)(x, [Target(1)] * 3)
    assert (off(found, expected) > 0.1) is not copying


def test_fewer_targets_than_images() -> None:
    model, x = make(Flat), images(Flat)
    for several in (Target(4), lambda output: output[4]):
        wrong = theirs.GradCAM(model, [model.late])(x, [several])
        assert wrong[0].any() and not wrong[1:].any()
        expected = theirs.GradCAM(model, [model.late])(x, [several] * 3)
        cam = ours.GradCAM(model, [model.late])
        assert off(cam(x, [several]), expected) <= COMPAT_SHARE_OF_RANGE
        with pytest.raises(ValueError, match="one for each of 3 images, or one for all; got 2"):
            cam(x, [several] * 2)
        assert off(ours.GradCAM(model, [model.late], strict=True)(x, [several]), wrong) <= COMPAT_SHARE_OF_RANGE
    # More of them are left out, here as there.
    assert off(cam(x, [Target(4)] * 5), expected) <= COMPAT_SHARE_OF_RANGE


def test_gradients_of_the_user_are_left_alone() -> None:
    model, x = make(Flat), images(Flat)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    images_with_grad = x.requires_grad_()
    for strict in (False, True):
        ours.GradCAM(model, [model.late], strict=strict)(images_with_grad, [Target(4)] * 3)
        assert all((parameter.grad == 7).all() for parameter in model.parameters())
    assert images_with_grad.grad is None
    theirs.GradCAM(model, [model.late])(x, [Target(4)] * 3)
    assert not any((parameter.grad == 7).any() for parameter in model.head.parameters())


def test_evaluation_mode_ends_with_the_call() -> None:
    model, x = make(Flat), images(Flat)
    expected = theirs.GradCAM(model, [model.late])(x, [Target(4)] * 3)
    state = copy.deepcopy(model.state_dict())
    model.train()
    model.head.eval()
    cam = ours.GradCAM(model, [model.late])
    assert off(cam(x, [Target(4)] * 3), expected) <= COMPAT_SHARE_OF_RANGE
    assert model.training and model.late.training and not model.head.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    strict = ours.GradCAM(model, [model.late], strict=True)
    assert not model.training and not model.late.training
    model.train()
    assert off(strict(x, [Target(4)] * 3), expected) <= COMPAT_SHARE_OF_RANGE
    assert model.training


def test_layers_in_another_order_than_the_model() -> None:
    model, x = make(Flat), images(Flat)
    told = []
    for module in (theirs, ours):

        class Noting(module.GradCAM):
            def get_cam_image(self, images: Any, layer: Any, targets: Any, activations: Any, *rest: Any) -> Any:
                told.append((layer is model.late, activations.shape[1] == 12))
                return super().get_cam_image(images, layer, targets, activations, *rest)

        cam = Noting(model, [model.late, model.early])
        cam(x, [Target(4)] * 3)
        shapes = [a.shape[1] for a in cam.activations_and_grads.activations]
        assert shapes == ([5, 12] if module is theirs else [12, 5])
    assert told == [(True, False), (False, True), (True, True), (False, False)]


class _Volume(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Conv3d(1, 3, (5, 2, 2), stride=(3, 2, 2))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 2 * 2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.late(x).sigmoid())


def test_far_faces_of_volumes() -> None:
    """26 positions out of 8: rounding takes the last one beyond the end, and SciPy's zoom puts zeros there."""
    torch.manual_seed(0)
    model = _Volume()
    x = torch.randn(2, 1, 26, 5, 5)
    wrong = theirs.GradCAMElementWise(model, [model.late])(x, [Target(1)] * 2)
    assert not wrong[:, -1].any()
    found = ours.GradCAMElementWise(model, [model.late])(x, [Target(1)] * 2)
    assert off(found[:, :-1], wrong[:, :-1]) <= COMPAT_SHARE_OF_RANGE
    assert found[:, -1].any()
    strict = ours.GradCAMElementWise(model, [model.late], strict=True)(x, [Target(1)] * 2)
    assert off(strict, wrong) <= COMPAT_SHARE_OF_RANGE


def test_index_error_in_a_with_block(capsys: Any) -> None:
    model, x = make(Flat), images(Flat)
    for module, options in ((theirs, {}), (ours, {"strict": True})):
        with module.GradCAM(model, [model.late], **options) as cam:
            cam(x, [Target(99)] * 3)
    assert "99" in capsys.readouterr().out
    with pytest.raises(IndexError, match="99"), ours.GradCAM(model, [model.late]) as cam:
        cam(x, [Target(99)] * 3)
    with pytest.raises(IndexError, match="99"), ours.FinerCAM(model, [model.late]) as cam:
        cam(x, [Target(99)] * 3)
    with ours.FinerCAM(model, [model.late], strict=True) as cam:
        cam(x, [Target(99)] * 3)


class _Twice(Flat):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.late(self.relu(self.early(x)))))


def test_layer_that_is_called_twice() -> None:
    """The original takes the first call, and with several layers takes one for the other."""
    model, x = make(_Twice), images(Flat)
    with pytest.raises(ValueError, match=r"call layer 'relu' once; it was called 2 times"):
        ours.GradCAM(model, [model.relu])(x, [Target(4)] * 3)
    with pytest.raises(ValueError, match=r"call layer 'relu' once; it did 2 times"):
        ours.EigenCAM(model, [model.relu])(x, [Target(4)] * 3)
