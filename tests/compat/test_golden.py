"""Maps of pytorch-grad-cam's names here against those of the installed original."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffcam_fast.compat import pytorch_grad_cam as ours
from diffcam_fast.compat.originals import original
from tests.compat.networks import CLASSES, Flat, Pooled, Tokens, Volume, images, make
from tests.tolerances import COMPAT_SHARE_OF_RANGE

pytest.importorskip("tests.helpers.torchvision_cpu")
pytest.importorskip("pytorch_grad_cam")
theirs = original("pytorch_grad_cam")
their_reshaping = original("pytorch_grad_cam", "utils.reshape_transforms")
their_targets = original("pytorch_grad_cam", "utils.model_targets")
our_targets = ours.utils.model_targets

GRADIENT_METHODS = (
    "GradCAM",
    "HiResCAM",
    "GradCAMElementWise",
    "GradCAMPlusPlus",
    "XGradCAM",
    "LayerCAM",
    "EigenGradCAM",
)
METHODS = (*GRADIENT_METHODS, "EigenCAM")
CATEGORIES = (4, 0, 6)


def assert_same(found: Any, expected: np.ndarray, bound: float = COMPAT_SHARE_OF_RANGE) -> None:
    assert isinstance(found, np.ndarray) and found.dtype == expected.dtype == np.float32
    assert found.shape == expected.shape
    for one, other in zip(found, expected, strict=True):
        # A map of zeros would agree with anything.
        assert np.ptp(other) > 0.5
        assert np.abs(one - other).max() <= bound * np.ptp(other)


def compare(method: str, model: nn.Module, layers: Any, x: Tensor, call: Any, **options: Any) -> None:
    with getattr(theirs, method)(model, layers, **options) as cam:
        expected = call(cam, x, their_targets)
    with getattr(ours, method)(model, layers, **options) as cam:
        assert_same(call(cam, x, our_targets), expected)
        # The second pass is done by what the first one taught.
        assert_same(call(cam, x, our_targets), expected)


def by_class(cam: Any, x: Tensor, targets: Any, **options: Any) -> np.ndarray:
    return cam(x, [targets.ClassifierOutputTarget(c) for c in CATEGORIES[: len(x)]], **options)


@pytest.mark.parametrize("count", (1, 3))
@pytest.mark.parametrize("kind", (Flat, Pooled))
@pytest.mark.parametrize("method", METHODS)
def test_methods(method: str, kind: type[nn.Module], count: int) -> None:
    model = make(kind)
    compare(method, model, [model.late], images(kind, count), by_class)


@pytest.mark.parametrize("method", METHODS)
def test_several_layers(method: str) -> None:
    model = make(Flat)
    compare(method, model, [model.early, model.late, model.relu], images(Flat), by_class)


def test_layers_in_a_container_and_one_of_them_twice() -> None:
    model = make(Flat)
    compare("LayerCAM", model, model.late[1:], images(Flat), by_class)
    compare("LayerCAM", model, [model.late, model.early, model.late], images(Flat), by_class)


@pytest.mark.parametrize("method", METHODS)
def test_float64(method: str) -> None:
    model = make(Pooled, torch.float64)
    compare(method, model, [model.late], images(Pooled, dtype=torch.float64), by_class)


@pytest.mark.parametrize("method", METHODS)
def test_volumes(method: str) -> None:
    model = make(Volume)
    compare(method, model, [model.late], images(Volume), by_class)


@pytest.mark.parametrize("method", METHODS)
def test_reshape_transform(method: str) -> None:
    # XGrad-CAM divides by sums that nearly cancel behind a layer norm.
    dtype = torch.float64 if method == "XGradCAM" else torch.float32
    model = make(Tokens, dtype)
    transforms = partial(their_reshaping.vit_reshape_transform, height=4, width=4)
    compare(method, model, [model.late], images(Tokens, dtype=dtype), by_class, reshape_transform=transforms)


@pytest.mark.parametrize("method", METHODS)
def test_predicted_class(method: str) -> None:
    model = make(Flat)
    compare(method, model, [model.late], images(Flat), lambda cam, x, _: cam(x, None))


@pytest.mark.parametrize("method", ("GradCAM", "EigenCAM"))
@pytest.mark.parametrize("kind", (Flat, Volume))
def test_aug_smooth(method: str, kind: type[nn.Module]) -> None:
    model = make(kind)
    compare(method, model, [model.late], images(kind), partial(by_class, aug_smooth=True))


def test_aug_smooth_with_given_transforms() -> None:
    tta = pytest.importorskip("ttach")
    transforms = tta.Compose([tta.VerticalFlip(), tta.Add(values=[0, 0.3])])

    def call(cam: Any, x: Tensor, targets: Any) -> np.ndarray:
        cam.tta_transforms = transforms
        return by_class(cam, x, targets, aug_smooth=True)

    model = make(Flat)
    compare("GradCAM", model, [model.late], images(Flat), call)


@pytest.mark.parametrize("method", METHODS)
def test_eigen_smooth(method: str) -> None:
    model = make(Pooled)
    compare(method, model, [model.late], images(Pooled), partial(by_class, eigen_smooth=True))


TARGETS = {
    "softmax": lambda targets, c: targets.ClassifierOutputSoftmaxTarget(c),
    "rest": lambda targets, c: targets.ClassifierOutputReST(c),
    "finer": lambda targets, c: targets.FinerWeightedTarget(c, [(c + 1) % CLASSES, (c + 3) % CLASSES], 0.7),
    "last": lambda targets, c: targets.ClassifierOutputTarget(c - CLASSES),
    "function": lambda targets, c: lambda output: output[c] * output[1].tanh() - output.square().mean(),
    "mixed": lambda targets, c: (
        targets.ClassifierOutputTarget(c) if c else targets.ClassifierOutputSoftmaxTarget(np.int64(c))
    ),
}


@pytest.mark.parametrize("kind", (Flat, Pooled))
@pytest.mark.parametrize("name", TARGETS)
def test_targets(name: str, kind: type[nn.Module]) -> None:
    model = make(kind)
    make_target = TARGETS[name]
    x = images(kind)
    call = lambda cam, x, targets: cam(x, [make_target(targets, c) for c in CATEGORIES])  # noqa: E731
    compare("GradCAM", model, [model.late], x, call)
    # The original's own classes are recognised, too.
    expected = call(theirs.GradCAM(model, [model.late]), x, their_targets)
    assert_same(call(ours.GradCAM(model, [model.late]), x, their_targets), expected)


class Binary(Flat):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, :1]


def test_binary_target() -> None:
    model = make(Binary)
    call = lambda cam, x, targets: cam(x, [targets.BinaryClassifierOutputTarget(c) for c in (0, 1, 0)])  # noqa: E731
    compare("HiResCAM", model, [model.late], images(Binary), call)


class Segmenting(Flat):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.late(self.early(x))).sin()


def test_segmentation_target() -> None:
    mask = np.zeros((6, 5), np.float32)
    mask[2:, 1:4] = 1
    model = make(Segmenting)
    call = lambda cam, x, targets: cam(x, [targets.SemanticSegmentationTarget(2, mask)] * 3)  # noqa: E731
    compare("GradCAMPlusPlus", model, [model.late], images(Segmenting), call)


class Detecting(Flat):
    """Outputs as detectors have them: a list with a dictionary for each image."""

    def forward(self, x: Tensor) -> Any:
        return [{"scores": scores.sigmoid()} for scores in super().forward(x)]


def test_outputs_that_are_no_tensor() -> None:
    model = make(Detecting)
    call = lambda cam, x, targets: cam(x, [lambda output: output["scores"].max()] * 3)  # noqa: E731
    compare("LayerCAM", model, [model.late], images(Detecting), call)


class Pyramid(Flat):
    """A layer that puts out a dictionary, as the backbones of detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.neck = Neck()

    def forward(self, x: Tensor) -> Tensor:
        return self.neck(self.late(self.early(x)))["pool"].mean((2, 3))


class Neck(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"0": x, "pool": nn.functional.max_pool2d(x, 2)}


def test_layer_that_puts_out_a_dictionary() -> None:
    model = make(Pyramid)
    transform = their_reshaping.fasterrcnn_reshape_transform
    call = lambda cam, x, targets: cam(x, [])  # noqa: E731
    compare("EigenCAM", model, [model.neck], images(Pyramid), call, reshape_transform=transform)


@pytest.mark.parametrize("metric", ("cam_mult_image.CamMultImageConfidenceChange", "road.ROADMostRelevantFirst"))
def test_metrics_of_the_original(metric: str) -> None:
    model, x = make(Flat), images(Flat)
    module, name = metric.split(".")
    change = getattr(original("pytorch_grad_cam", f"metrics.{module}"), name)
    change = change(percentile=50) if module == "road" else change()
    scores = []
    for library, targets in ((theirs, their_targets), (ours, our_targets)):
        wanted = [targets.ClassifierOutputSoftmaxTarget(c) for c in CATEGORIES]
        torch.manual_seed(0)
        np.random.seed(0)
        scores.append(change(x, library.GradCAM(model, [model.late])(x, wanted), wanted, model))
    assert np.abs(np.subtract(*scores)).max() < 1e-3


@pytest.mark.parametrize(
    "options",
    (
        {},
        {"alpha": 0.4},
        *({"comparison_categories": ranks} for ranks in ([2, -1], [3, 0], [1, 1], [2, 1, 5])),
        {"target_idx": 3},
        {"target_idx": -2, "alpha": 0.6},
        {"eigen_smooth": True},
    ),
    ids=str,
)
@pytest.mark.parametrize("kind", (Flat, Pooled))
def test_finer(kind: type[nn.Module], options: dict[str, Any]) -> None:
    model = make(kind)
    call = lambda cam, x, targets: cam(x, **options)  # noqa: E731
    compare("FinerCAM", model, [model.late], images(kind), call)


def test_finer_with_targets_and_another_method() -> None:
    model = make(Flat)
    x = images(Flat)
    for module in (theirs, ours):
        finer = module.FinerCAM(model, [model.late], base_method=module.LayerCAM)
        found = finer(x, [our_targets.ClassifierOutputTarget(c) for c in CATEGORIES])
        if module is theirs:
            expected = found
    assert_same(found, expected)


def _squared(base: type) -> type:
    class Squared(base):
        """Replaces weights, and uses those it inherits."""

        def get_cam_weights(
            self, input_tensor: Any, target_layer: Any, targets: Any, activations: Any, grads: Any
        ) -> np.ndarray:
            assert isinstance(activations, np.ndarray) and isinstance(grads, np.ndarray)
            assert len(targets) == len(input_tensor)
            return super().get_cam_weights(input_tensor, target_layer, targets, activations, grads) ** 2

    return Squared


def _strongest(base: type) -> type:
    class Strongest(base):
        """Replaces maps, and uses those it inherits."""

        def get_cam_image(self, *args: Any, **kwargs: Any) -> np.ndarray:
            return super().get_cam_image(*args, **kwargs) + args[3].max(1)

    return Strongest


def _from_scratch(base: type) -> type:
    class FromScratch(base):
        def __init__(self, model: nn.Module, target_layers: Any, reshape_transform: Any = None) -> None:
            super().__init__(model, target_layers, reshape_transform, uses_gradients=False)

        def get_cam_weights(self, input_tensor: Any, target_layer: Any, targets: Any, a: Any, g: Any) -> np.ndarray:
            return a.std((2, 3))

        def aggregate_multi_layers(self, maps: Any) -> np.ndarray:
            return super().aggregate_multi_layers([1 - one for one in maps])

    return FromScratch


def _looking_at_the_input(base: type) -> type:
    class LookingAtTheInput(base):
        def __init__(self, model: nn.Module, target_layers: Any) -> None:
            super().__init__(model, target_layers, compute_input_gradient=True)

        def get_cam_image(self, input_tensor: Any, layer: Any, targets: Any, a: Any, g: Any, smooth: Any) -> Any:
            return (g * a).sum(1) + input_tensor.grad.abs().sum((1, 2, 3), keepdim=True)[:, 0].numpy() * a[:, 0]

    return LookingAtTheInput


@pytest.mark.parametrize("eigen_smooth", (False, True))
@pytest.mark.parametrize(
    ("change", "method"),
    (
        (_squared, "GradCAM"),
        (_squared, "GradCAMPlusPlus"),
        (_squared, "XGradCAM"),
        (_strongest, "GradCAM"),
        (_strongest, "HiResCAM"),
        (_strongest, "EigenCAM"),
        (_from_scratch, "BaseCAM"),
        (_looking_at_the_input, "BaseCAM"),
    ),
)
def test_subclasses(change: Any, method: str, eigen_smooth: bool) -> None:
    model = make(Pooled)
    layers = [model.early, model.late]
    base = original("pytorch_grad_cam", "base_cam").BaseCAM if method == "BaseCAM" else getattr(theirs, method)
    expected = by_class(change(base)(model, layers), images(Pooled), their_targets, eigen_smooth=eigen_smooth)
    found = by_class(
        change(getattr(ours, method))(model, layers), images(Pooled), our_targets, eigen_smooth=eigen_smooth
    )
    assert_same(found, expected)
