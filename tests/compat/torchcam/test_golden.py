"""Maps of torchcam's names here against those of the installed original."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffcam_fast.compat.originals import original
from diffcam_fast.compat.torchcam import gradients, pulling
from diffcam_fast.compat.torchcam import methods as ours
from diffcam_fast.models import load_efficientnet_lite0
from tests.compat.networks import CLASSES, Flat, Pooled, Tokens, Volume, images, make
from tests.tolerances import COMPAT_SHARE_OF_RANGE

pytest.importorskip("torchcam")
theirs = original("torchcam", "methods")

METHODS = ("GradCAM", "GradCAMpp", "XGradCAM", "LayerCAM", "SmoothGradCAMpp", "FinerCAM")
CATEGORIES = [4, 0, 6]

# Its Grad-CAM++ is not Grad-CAM++: see the differences.
STRICT = {"GradCAMpp": {"strict": True}}


def assert_same(found: list[Tensor], expected: list[Tensor], bound: float = COMPAT_SHARE_OF_RANGE) -> None:
    assert isinstance(found, list) and len(found) == len(expected)
    for mine, other in zip(found, expected, strict=True):
        assert mine.shape == other.shape and mine.dtype == other.dtype and not mine.requires_grad
        for one, another in zip(mine, other, strict=True):
            span = another.max() - another.min()
            # A map of zeros would agree with anything.
            assert span > 1e-6
            assert (one - another).abs().max() <= bound * span


def by_class(cam: Any, model: nn.Module, x: Tensor, **options: Any) -> list[Tensor]:
    torch.manual_seed(0)
    return cam(CATEGORIES[: len(x)], model(x), **options)


def compare(method: str, model: nn.Module, layers: Any, x: Tensor, call: Any = by_class, **options: Any) -> None:
    with getattr(theirs, method)(model, layers, **options) as cam:
        expected = call(cam, model, x)
    with getattr(ours, method)(model, layers, **options, **STRICT.get(method, {})) as cam:
        found = call(cam, model, x)
    assert_same(found, expected)


@pytest.mark.parametrize("count", (1, 3))
@pytest.mark.parametrize("kind", (Flat, Pooled))
@pytest.mark.parametrize("method", METHODS)
def test_methods(method: str, kind: type[nn.Module], count: int) -> None:
    model = make(kind)
    compare(method, model, model.late, images(kind, count))


@pytest.mark.parametrize("method", METHODS)
def test_gradients_that_are_given_once(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that follows the layer is a mean over positions."""
    model, x = make(Pooled), images(Pooled)
    monkeypatch.setattr(pulling.LinearHead, "gradients", lambda *given: None)
    pools: list[Any] = []
    pool = pulling._pool
    monkeypatch.setattr(pulling, "_pool", lambda *given: pools.append(pool(*given)) or pools[-1])
    for layers, given_once in ((["relu"], [True]), (["late", "relu"], [False, True]), (["late"], [False])):
        for class_idx in (CATEGORIES, 2, [[1, 2], [3, 4], [5, 6]]):
            found = []
            for smallest in (0, 2**15):
                monkeypatch.setattr(pulling, "_WORTH_POOLING", smallest)
                pools.clear()
                with getattr(ours, method)(model, layers) as cam:
                    torch.manual_seed(0)
                    found.append(cam(class_idx, model(x)))
                    base = getattr(cam, "base_cam", cam)
                    assert all(g.shape[-3:] == a.shape[-3:] for a, g in zip(base.hook_a, base.hook_g, strict=True))
                times = cam.num_samples if method == "SmoothGradCAMpp" else 1
                expected = [False] * len(layers) if smallest else given_once
                assert [pool is not None for pool in pools] == expected * times
            assert_same(*found)


@pytest.mark.parametrize("method", METHODS)
def test_the_weight_of_the_head_in_place_of_a_pull_back(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = make(Pooled), images(Pooled)
    pulled: list[Any] = []
    pull_back = gradients.pull_back
    monkeypatch.setattr(
        gradients, "pull_back", lambda *given, **more: pulled.append(given) or pull_back(*given, **more)
    )
    rows = pulling.LinearHead.gradients
    for class_idx in (CATEGORIES, 2, [[1, 2], [3, 4], [5, 6]]):
        found = []
        for head in (rows, lambda *given: None):
            monkeypatch.setattr(pulling.LinearHead, "gradients", head)
            pulled.clear()
            with getattr(ours, method)(model, "relu") as cam:
                torch.manual_seed(0)
                found.append(cam(class_idx, model(x)))
            assert bool(pulled) == (head is not rows)
        assert_same(*found)
    monkeypatch.setattr(pulling.LinearHead, "gradients", rows)
    compare(method, model, "relu", x)


@pytest.mark.parametrize("layer", ("late", "relu"))
def test_a_graph_that_has_been_used_up(layer: str) -> None:
    model, x = make(Pooled), images(Pooled)
    with ours.GradCAM(model, layer) as cam:
        scores = model(x)
        scores.sum().backward()
        # PyTorch's own message names retain_graph, too.
        with pytest.raises(RuntimeError, match=r"scores: cannot be differentiated"):
            cam(CATEGORIES, scores)
        scores = model(x)
        with torch.no_grad():
            model.head[3].weight.mul_(2)
        with pytest.raises(RuntimeError, match=r"scores: cannot be differentiated .*modified by an inplace operation"):
            cam(CATEGORIES, scores)


class _Hooked(Pooled):
    """A hook changes the gradient on its way from the head to the layer."""

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.relu(self.late(self.early(x))).mean((2, 3))
        if pooled.requires_grad:
            pooled.register_hook(lambda gradient: gradient * torch.linspace(-1, 2, gradient.shape[1]))
        return self.head[3](pooled)


class _Warmed(Pooled):
    """Scores that are not the logits themselves."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.late(self.early(x)))) * torch.linspace(1, 2, CLASSES)


class _Skipping(Pooled):
    """The layer's output reaches the logits by two ways."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.late(self.early(x)))
        pooled = x.mean((2, 3))
        return self.head[3](pooled + x[:, :, 0, 0])


@pytest.mark.parametrize("kind", (_Hooked, _Warmed, _Skipping))
def test_heads_that_look_alike(kind: type[nn.Module]) -> None:
    model, x = make(kind), images(Pooled)
    for _ in range(2):
        compare("LayerCAM", model, "relu", x)
    model.requires_grad_(False)
    model.early.requires_grad_(True)
    compare("LayerCAM", model, "relu", x)


class _Twofold(Pooled):
    """More than the mean over positions is made of the layer's output."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.late(self.early(x)))
        return x.amax((2, 3))[:, :CLASSES] + self.head(x)


def test_gradients_that_differ_between_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulling, "_WORTH_POOLING", 0)
    compare("LayerCAM", make(_Twofold), "relu", images(Pooled))


@pytest.mark.parametrize("method", METHODS)
def test_strict(method: str) -> None:
    model = make(Flat)
    x = images(Flat)
    for options in ({}, {"normalized": False}):
        with getattr(theirs, method)(model, "late") as cam:
            expected = by_class(cam, model, x, **options)
        with getattr(ours, method)(model, "late", strict=True) as cam:
            assert_same(by_class(cam, model, x, **options), expected)


@pytest.mark.parametrize("method", METHODS)
def test_several_layers(method: str) -> None:
    model = make(Flat)
    compare(method, model, ["early", model.late, "relu"], images(Flat))
    compare(method, model, ["late", "early", "late"], images(Flat))


@pytest.mark.parametrize("method", METHODS)
def test_float64_and_not_normalized(method: str) -> None:
    model = make(Pooled, torch.float64)
    x = images(Pooled, dtype=torch.float64)
    compare(method, model, "late", x, lambda cam, m, x: by_class(cam, m, x, normalized=False))


@pytest.mark.parametrize("method", METHODS)
def test_volumes(method: str) -> None:
    model = make(Volume)
    compare(method, model, "late", images(Volume))


@pytest.mark.parametrize("method", METHODS)
def test_reshape_transform(method: str) -> None:
    # XGrad-CAM divides by sums that nearly cancel behind a layer norm.
    dtype = torch.float64 if method == "XGradCAM" else torch.float32
    model = make(Tokens, dtype)

    def transform(tokens: Tensor) -> Tensor:
        return tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4))

    compare(method, model, "late", images(Tokens, dtype=dtype), reshape_transform=transform)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "SmoothGradCAMpp"])
def test_one_class_and_another_after_it(method: str) -> None:
    model = make(Flat)

    def call(cam: Any, model: nn.Module, x: Tensor) -> list[Tensor]:
        torch.manual_seed(0)
        scores = model(x)
        first = cam(3, scores, retain_graph=True)
        return [*first, *cam(5, scores)]

    compare(method, model, "late", images(Flat), call)


TARGETS = {
    "one": lambda output: output[2] - output[1].tanh(),
    "each": [lambda output, c=c: output[c] * output.square().mean() for c in range(3)],
}


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("method", [method for method in METHODS if method != "FinerCAM"])
def test_targets(method: str, targets: str) -> None:
    def call(cam: Any, model: nn.Module, x: Tensor) -> list[Tensor]:
        torch.manual_seed(0)
        return cam(scores=model(x), targets=TARGETS[targets])

    compare(method, make(Pooled), "late", images(Pooled), call)


class _Detector(Flat):
    """Something for each image in a list, as detectors have it."""

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        return [{"scores": scores} for scores in super().forward(x)]


def test_targets_of_other_outputs() -> None:
    def call(cam: Any, model: nn.Module, x: Tensor) -> list[Tensor]:
        return cam(scores=model(x), targets=lambda output: output["scores"][2])

    compare("GradCAM", make(_Detector), "late", images(Flat), call)


class _Segmenting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.late, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.late(x).tanh())


def test_scores_with_positions() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 9, 8)
    compare("GradCAM", _Segmenting(), "late", x, lambda cam, model, x: cam(2, model(x)))


@pytest.mark.parametrize("base", ("GradCAM", "GradCAMpp", "LayerCAM"))
@pytest.mark.parametrize("comparison", (None, 1, [5, 2], [[1, 2], [3, 5], [0, 4]]))
def test_finer(base: str, comparison: Any) -> None:
    model, x = make(Flat), images(Flat)
    found = []
    for module, options in ((theirs, {}), (ours, STRICT.get(base, {}))):
        method = getattr(module, base)
        with module.FinerCAM(model, "late", base_method=method, gamma=0.9, num_references=9, **options) as cam:
            found.append(cam(CATEGORIES, model(x), comparison))
    assert_same(found[1], found[0])


@pytest.mark.parametrize("target_shape", (None, (20, 9)))
@pytest.mark.parametrize("method", ("GradCAMpp", "LayerCAM"))
def test_refine(method: str, target_shape: Any) -> None:
    model, x = make(Flat), images(Flat)
    found = []
    for module, options in ((theirs, {}), (ours, STRICT.get(method, {}))):
        base = getattr(module, method)
        with module.RefineCAM(model, ["early", "late"], base_method=base, **options) as cam:
            found.append(cam(CATEGORIES, model(x), target_shape=target_shape))
    assert_same(found[1], found[0])


@pytest.mark.parametrize("method", ("GradCAM", "LayerCAM"))
@pytest.mark.parametrize("target_shape", (None, (20, 9)))
def test_fusing(method: str, target_shape: Any) -> None:
    def call(cam: Any, model: nn.Module, x: Tensor) -> list[Tensor]:
        maps = by_class(cam, model, x)
        return [cam.fuse_cams(maps, target_shape), cam.fuse_cams(maps[:1])]

    compare(method, make(Flat), ["early", "late"], images(Flat), call)


def test_fusing_is_differentiable() -> None:
    maps = [torch.rand(2, 3, 4), torch.rand(2, 6, 5)]
    maps[1][0] = maps[1][0].round()
    maps[0][0] = 1.0
    found = []
    for module in (theirs, ours):
        leaves = [each.clone().requires_grad_() for each in maps]
        module.LayerCAM.fuse_cams(leaves).square().sum().backward()
        found.append([leaf.grad for leaf in leaves])
    assert_same(found[1], found[0])


class _Averaging(Pooled):
    def __init__(self, convolution: bool) -> None:
        super().__init__()
        if convolution:
            self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(12, CLASSES, 1), nn.Flatten())


@pytest.mark.parametrize("convolution", (False, True))
@pytest.mark.parametrize("class_idx", (2, CATEGORIES))
@pytest.mark.parametrize("normalized", (False, True))
def test_weights_of_the_head(convolution: bool, class_idx: Any, normalized: bool) -> None:
    torch.manual_seed(0)
    model, x = _Averaging(convolution).eval(), images(Pooled)
    found = []
    for module in (theirs, ours):
        with module.CAM(model, "relu", model.head[1] if convolution else None) as cam:
            with torch.inference_mode():
                model(x)
            found.append(cam(class_idx, normalized=normalized))
    assert_same(found[1], found[0])


@pytest.fixture(scope="module")
def real() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return load_efficientnet_lite0(), torch.randn(2, 3, 64, 64)


@pytest.mark.parametrize("method", METHODS)
def test_real_weights(method: str, real: tuple[nn.Module, Tensor]) -> None:
    model, x = real

    def call(cam: Any, model: nn.Module, x: Tensor) -> list[Tensor]:
        torch.manual_seed(0)
        return cam([281, 3], model(x))

    compare(method, model, "head_activation", x, call)


def test_layer_that_is_chosen(real: tuple[nn.Module, Tensor]) -> None:
    for model, shape in ((real[0], (3, 64, 64)), (make(Flat), (3, 12, 10)), (make(Volume), (2, 8, 9, 10))):
        with theirs.GradCAM(model, input_shape=shape) as cam:
            expected = cam.target_names
        assert ours.GradCAM(model, input_shape=shape).target_names == expected
