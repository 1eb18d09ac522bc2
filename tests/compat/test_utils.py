"""pytorch-grad-cam's helpers: images, targets, reshaping, principal components, interpolation of volumes."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from diffcam_fast.compat import eigen
from diffcam_fast.compat.eigen import first_component
from diffcam_fast.compat.engine import Chosen
from diffcam_fast.compat.formulas import channel_weights, weighted_activations, weighted_difference
from diffcam_fast.compat.originals import original
from diffcam_fast.compat.pytorch_grad_cam.scoring import NearestRivals, Targets
from diffcam_fast.compat.pytorch_grad_cam.utils import image, model_targets, reshape_transforms, svd_on_activations
from diffcam_fast.compat.resizing import resize
from diffcam_fast.reference.cam import raw_cam
from tests.tolerances import COMPAT_SHARE_OF_RANGE, LOGIT_DIFFERENCE, MAP_SHARE_OF_RANGE, PIXEL

pytest.importorskip("tests.helpers.torchvision_cpu")
pytest.importorskip("pytorch_grad_cam")
their_image = original("pytorch_grad_cam", "utils.image")
their_targets = original("pytorch_grad_cam", "utils.model_targets")
random = np.random.default_rng(0)


@pytest.mark.parametrize("use_rgb", (False, True))
@pytest.mark.parametrize("colormap", (2, 11))
@pytest.mark.parametrize("weight", (0.0, 0.5, 0.8))
def test_show_cam_on_image(use_rgb: bool, colormap: int, weight: float) -> None:
    picture, mask = random.random((40, 30, 3), np.float32), random.random((40, 30), np.float32)
    mask[0, :2] = 0, 1
    found = image.show_cam_on_image(picture, mask, use_rgb, colormap, weight)
    expected = their_image.show_cam_on_image(picture, mask, use_rgb, colormap, weight)
    assert found.dtype == np.uint8 and found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= PIXEL and (found == expected).mean() > 0.99


def test_show_cam_on_image_refuses() -> None:
    mask = np.zeros((2, 2), np.float32)
    with pytest.raises(ValueError, match="img: expected values from 0 to 1; got up to 255"):
        image.show_cam_on_image(np.full((2, 2, 3), 255.0), mask)
    with pytest.raises(ValueError, match="image_weight"):
        image.show_cam_on_image(np.ones((2, 2, 3)), mask, image_weight=2)


def test_only_other_colormaps_need_opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    picture, mask = np.ones((2, 2, 3)), np.zeros((2, 2))
    assert image.show_cam_on_image(picture, mask).shape == (2, 2, 3)
    with pytest.raises(ImportError, match="pip install opencv-python-headless"):
        image.show_cam_on_image(picture, mask, colormap=11)


@pytest.mark.parametrize("dtype", (np.uint8, np.float32, np.float64))
def test_preprocess_and_deprocess(dtype: Any) -> None:
    picture = (random.random((5, 4, 3)) * (255 if dtype == np.uint8 else 1)).astype(dtype)
    for options in ({}, {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.1]}):
        found, expected = image.preprocess_image(picture, **options), their_image.preprocess_image(picture, **options)
        assert found.dtype == expected.dtype and torch.allclose(found, expected)
    values = random.standard_normal((5, 4, 3)).astype(np.float32)
    found, expected = image.deprocess_image(values), their_image.deprocess_image(values)
    assert found.dtype == np.uint8 and np.abs(found.astype(int) - expected).max() <= PIXEL


@pytest.mark.parametrize("shape", ((6, 5), (3, 4, 5)))
def test_scale_cam_image(shape: tuple[int, ...]) -> None:
    maps = random.standard_normal((2, *shape)).astype(np.float32)
    for size in (None, (9, 14, 11)[: len(shape)], (3, 2, 4)[: len(shape)]):
        found, expected = image.scale_cam_image(maps, size), their_image.scale_cam_image(maps, size)
        assert found.dtype == np.float32
        assert np.abs(found - expected).max() <= COMPAT_SHARE_OF_RANGE
    channels = random.random((2, 3, 6, 5))
    found = image.scale_accross_batch_and_channels(channels, (7, 8))
    expected = their_image.scale_accross_batch_and_channels(channels, (7, 8))
    assert np.abs(found - expected).max() <= COMPAT_SHARE_OF_RANGE


@pytest.mark.parametrize("sizes", (((3, 4, 5), (6, 7, 8)), ((2, 1, 8), (5, 4, 26)), ((6, 5, 4), (3, 2, 1))))
def test_volumes_are_interpolated_as_by_scipy(sizes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    volume = random.random(sizes[0])
    expected = ndimage.zoom(volume, [wanted / given for given, wanted in zip(*sizes, strict=True)])
    found = resize(torch.from_numpy(volume)[None, None], sizes[1], zero_beyond=True)[0, 0]
    assert np.abs(found.numpy() - expected).max() < 1e-12
    with pytest.raises(ValueError, match="size: expected 3 lengths"):
        resize(torch.zeros(1, 1, 2, 2, 2), (3, 3))


@pytest.mark.parametrize(
    ("positions", "channels"), ((25, 100), (16, 24), (24, 16), (20, 20), (64, 40), (100, 6), (5, 3))
)
def test_first_component(positions: int, channels: int) -> None:
    """Signs, too, whichever way LAPACK takes to them."""
    expected_from = original("pytorch_grad_cam", "utils.svd_on_activations").get_2d_projection
    activations = random.standard_normal((4, channels, positions, 1)).astype(np.float32)
    activations[:2] += (
        3 * np.maximum(random.standard_normal((1, channels, 1, 1)), 0) * random.random((2, 1, positions, 1))
    )
    activations[1, 0, 0] = np.nan
    expected = expected_from(activations)
    found = svd_on_activations.get_2d_projection(activations)
    assert found.dtype == np.float32 and found.shape == expected.shape
    for one, other in zip(found, expected, strict=True):
        # float32 leaves the original's noise maps this much; where its singular values are apart, far less.
        assert np.abs(one - other).max() <= 1e-3 * np.ptp(other)
    wide = activations.astype(np.float64)
    found, expected = first_component(torch.from_numpy(wide)).numpy(), expected_from(wide)
    assert np.abs(found - expected).max() <= 1e-6 * np.ptp(expected)


def test_first_component_of_nothing() -> None:
    assert first_component(torch.zeros(0, 3, 2, 2)).shape == (0, 2, 2)
    assert not first_component(torch.ones(2, 3, 2, 2)).any()


def _blas_threads() -> set[int]:
    threadpoolctl = pytest.importorskip("threadpoolctl")
    return {library["num_threads"] for library in threadpoolctl.threadpool_info() if library["user_api"] == "blas"}


def test_first_component_leaves_the_threads_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    before = _blas_threads()
    within: list[set[int]] = []
    svd = np.linalg.svd
    monkeypatch.setattr(np.linalg, "svd", lambda *given, **more: within.append(_blas_threads()) or svd(*given, **more))
    activations = torch.from_numpy(random.standard_normal((2, 100, 5, 5)).astype(np.float32))
    found = first_component(activations)
    assert within == [{1}] and _blas_threads() == before
    monkeypatch.setattr(np.linalg, "svd", lambda *given, **more: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        first_component(activations)
    assert _blas_threads() == before
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    eigen._blas.cache_clear()
    assert torch.equal(first_component(activations), found)
    monkeypatch.undo()
    eigen._blas.cache_clear()


@pytest.mark.parametrize("name", ("vit_reshape_transform", "swinT_reshape_transform"))
def test_reshape_transforms(name: str) -> None:
    theirs = original("pytorch_grad_cam", "utils.reshape_transforms")
    for options, tokens in (({"height": 2, "width": 3}, 6), ({}, 196 if name.startswith("vit") else 49)):
        values = torch.randn(2, tokens + name.startswith("vit"), 5)
        assert torch.equal(
            getattr(reshape_transforms, name)(values, **options), getattr(theirs, name)(values, **options)
        )
    pyramid = {"0": torch.randn(1, 3, 8, 8), "pool": torch.randn(1, 3, 2, 2)}
    found = reshape_transforms.fasterrcnn_reshape_transform(pyramid)
    assert torch.equal(found, theirs.fasterrcnn_reshape_transform(pyramid))


TARGETS = {
    "ClassifierOutputTarget": (2,),
    "ClassifierOutputSoftmaxTarget": (2,),
    "ClassifierOutputReST": (2,),
    "FinerWeightedTarget": (2, [0, 3, 0], 0.7),
    "BinaryClassifierOutputTarget": (0,),
    "SoftmaxOutputTarget": (),
    "RawScoresOutputTarget": (),
}


@pytest.mark.parametrize("name", TARGETS)
def test_targets(name: str) -> None:
    logits = torch.randn(3, 5, dtype=torch.float64) * 3
    mine, other = getattr(model_targets, name)(*TARGETS[name]), getattr(their_targets, name)(*TARGETS[name])
    for output in (logits, logits[0]):
        assert torch.allclose(mine(output), other(output))


@pytest.mark.parametrize("name", [name for name, arguments in TARGETS.items() if arguments][:4])
def test_cotangents_are_the_gradients_of_targets(name: str) -> None:
    logits = (torch.randn(3, 5, dtype=torch.float64) * 3).requires_grad_()
    for module in (model_targets, their_targets):
        target = getattr(module, name)(*TARGETS[name])
        (expected,) = torch.autograd.grad(sum(target(output) for output in logits), logits)
        found = Targets([target] * 3, 3).score(logits)
        cotangent = found.written_down(logits) if isinstance(found, Chosen) else found.values
        assert (cotangent[:, 0] - expected).abs().max() < LOGIT_DIFFERENCE[torch.float64]


@pytest.mark.parametrize(("scale", "dtype"), ((1, torch.float32), (60, torch.float32), (1, torch.float64)))
def test_finer_targets_are_sums_of_few_logits_up_to_rounding(scale: float, dtype: torch.dtype) -> None:
    """Where the rivals' softmax vanishes beside the 1e-9, and in float64, all logits count."""
    logits = (scale * torch.randn(3, 40, generator=torch.Generator().manual_seed(0))).to(dtype)
    found = NearestRivals(0.8, None, None).score(logits)
    assert isinstance(found, Chosen) == (scale == 1 and dtype == torch.float32)
    cotangent = (found.written_down(logits) if isinstance(found, Chosen) else found.values)[:, 0]
    exact = logits.double().requires_grad_()
    order = (exact - exact.amax(1, keepdim=True)).abs().argsort(1).tolist()
    targets = [their_targets.FinerWeightedTarget(row[0], row[1:4], 0.8) for row in order]
    (expected,) = torch.autograd.grad(sum(target(z) for target, z in zip(targets, exact, strict=True)), exact)
    scale_of = expected.abs().amax(1, keepdim=True)
    assert ((cotangent - expected).abs() / scale_of).max() < 100 * torch.finfo(dtype).eps
    weight = torch.randn(40, 6, dtype=dtype)
    if isinstance(found, Chosen):
        assert torch.allclose(found.times(weight)[0], cotangent @ weight, atol=1e-6)


def test_subclasses_of_targets_are_called() -> None:
    class Doubled(model_targets.ClassifierOutputTarget):
        def __call__(self, model_output: torch.Tensor) -> torch.Tensor:
            return 2 * super().__call__(model_output)

    assert isinstance(Targets([Doubled(1)] * 2, 2).score(torch.randn(2, 5)), list)


def test_weighted_difference_far_from_zero() -> None:
    """What the cotangent says does not depend on where the logits lie, at alpha = 1."""
    logits = torch.randn(2, 6, dtype=torch.float64)
    classes, others, alpha = torch.tensor([[1], [4]]), torch.tensor([[[0, 2]], [[3, 5]]]), torch.ones(2, 1)
    near, far = (weighted_difference(z, classes, others, alpha.double()) for z in (logits, logits + 5000))
    assert (near - far).abs().max() < 1e-9 and near.sum(2).abs().max() < 1e-9


@pytest.mark.parametrize("method", ("gradcam", "gradcam++", "xgradcam", "hirescam", "layercam", "elementwise"))
def test_parts_add_up_to_the_maps(method: str) -> None:
    activations, gradients = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 5)
    expected = raw_cam(activations, gradients.unsqueeze(1), method)[:, 0]
    found = weighted_activations(activations, gradients, method).sum(1)
    assert (found - expected).abs().max() <= MAP_SHARE_OF_RANGE[torch.float32] * (expected.max() - expected.min())


def test_choices_of_other_libraries() -> None:
    a, g = torch.rand(1, 1, 2, 2, dtype=torch.float64), torch.rand(1, 1, 2, 2, dtype=torch.float64)
    found = channel_weights(a, g, "gradcam++", eps=0.5, activations_outside=False)
    expected = (g**2 / (2 * g**2 + (a * g**3).sum() + 0.5) * g).sum()
    assert (found - expected).abs().max() < 1e-12
    tiny = torch.full((1, 1, 1, 1), 1e-200, dtype=torch.float64)
    assert channel_weights(tiny, tiny, "gradcam++", positive_only=True).sum() == 0
    with pytest.raises(ValueError, match="method: expected one of gradcam"):
        channel_weights(a, g, "layercam")
    with pytest.raises(ValueError, match="method: expected a method"):
        weighted_activations(a, g, "eigen")


def test_parameters_are_not_needed() -> None:
    from diffcam_fast.compat.pytorch_grad_cam import GradCAM

    layer = nn.Tanh()
    model = nn.Sequential(layer, nn.Flatten())
    assert GradCAM(model, [layer])(torch.randn(2, 1, 3, 3)).shape == (2, 3, 3)
