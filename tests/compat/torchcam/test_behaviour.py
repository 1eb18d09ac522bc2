"""What users of torchcam rely on, and what they were refused."""

from __future__ import annotations

import gc
import inspect
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffcam_fast.compat.originals import original
from diffcam_fast.compat.torchcam import methods as ours
from diffcam_fast.compat.torchcam import recording
from diffcam_fast.compat.torchcam.methods.core import _CAM
from diffcam_fast.compat.torchcam.methods.gradient import _GradCAM
from tests.compat.networks import Flat, Pooled, Tokens, Volume, images, make
from tests.tolerances import COMPAT_SHARE_OF_RANGE

GRADIENTS = ("GradCAM", "GradCAMpp", "XGradCAM", "LayerCAM", "SmoothGradCAMpp")
EVERY = (*GRADIENTS, "FinerCAM", "RefineCAM", "CAM")
CATEGORIES = [4, 0, 6]


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def extractor(name: str, model: nn.Module, **options: Any) -> Any:
    # XGrad-CAM divides by sums of activations, which nearly cancel before the ReLU.
    layers: Any = {"RefineCAM": ["early", "late"], "XGradCAM": "relu"}.get(name, "late")
    extra = {"fc_layer": "head.3"} if name == "CAM" else {}
    return getattr(ours, name)(model, layers, **extra, **options)


def maps_of(cam: Any, x: Tensor, class_idx: Any = CATEGORIES, **options: Any) -> Tensor:
    torch.manual_seed(0)
    (found,) = cam(class_idx, cam.model(x), **options)
    return found


def off(found: Tensor, expected: Tensor) -> float:
    """The largest difference; maps span 0 to 1."""
    assert found.shape == expected.shape and found.dtype == expected.dtype and expected.max() - expected.min() > 0.5
    return float((found - expected).abs().max())


@pytest.mark.parametrize("name", EVERY)
def test_signatures(name: str) -> None:
    """Ours takes what the original takes, in its order and with its defaults, and more by name."""
    pytest.importorskip("torchcam")
    their_class, our_class = getattr(original("torchcam", "methods"), name), getattr(ours, name)
    for method in ("__init__", "__call__", "compute_cams", "fuse_cams"):
        expected = inspect.signature(getattr(their_class, method)).parameters
        found = inspect.signature(getattr(our_class, method)).parameters
        for one, other in zip(found.values(), expected.values(), strict=False):
            assert (one.name, one.kind) == (other.name, other.kind)
            assert one.default == other.default or one.name == "base_method"
        extra = list(found.values())[len(expected) :]
        assert all(p.kind is p.KEYWORD_ONLY for p in extra)
    for attribute in dir(their_class):
        if not attribute.startswith("_"):
            assert hasattr(our_class, attribute), attribute


@pytest.mark.parametrize("name", EVERY)
def test_attributes_and_names(name: str) -> None:
    pytest.importorskip("torchcam")
    model, x = make(Pooled), images(Pooled)
    other = getattr(original("torchcam", "methods"), name)
    names = extractor(name, model, enable_hooks=False).target_names
    theirs = other(
        model, names if name == "RefineCAM" else names[0], **({"fc_layer": "head.3"} if name == "CAM" else {})
    )
    with extractor(name, model) as mine, theirs:
        assert repr(mine) == repr(theirs) and mine.target_names == theirs.target_names
        assert mine.model is theirs.model is model
        maps_of(theirs, x), maps_of(mine, x)
        mine, theirs = getattr(mine, "base_cam", mine), getattr(theirs, "base_cam", theirs)
        assert set(mine.submodule_dict) == set(theirs.submodule_dict)
        for attribute in ("hook_g",) if name == "SmoothGradCAMpp" else ("hook_a", "hook_g"):
            for one, another in zip(getattr(mine, attribute), getattr(theirs, attribute), strict=True):
                assert one is another is None or torch.allclose(one, another, atol=1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_hooks_come_and_go(name: str) -> None:
    model, x = make(Pooled), images(Pooled)
    with extractor(name, model) as cam:
        assert hooks(model) > 0
        expected = maps_of(cam, x)
        cam.disable_hooks()
        model(x * 7)
        kept = [a.clone() for a in getattr(cam, "base_cam", cam).hook_a]
        cam.enable_hooks()
        model(x)
        if name != "SmoothGradCAMpp":
            assert all(map(torch.equal, kept, getattr(cam, "base_cam", cam).hook_a))
        cam.reset_hooks()
        with pytest.raises(AssertionError, match="expected a forward pass"):
            cam(CATEGORIES, torch.zeros(3, 7))
        assert torch.equal(maps_of(cam, x), expected)
    assert hooks(model) == 0
    with pytest.raises(AssertionError, match="expected a forward pass"):
        maps_of(cam, x)
    cam = extractor(name, model, enable_hooks=False)
    with pytest.raises(AssertionError, match="expected a forward pass"):
        maps_of(cam, x)
    cam.remove_hooks()
    assert hooks(model) == 0


@pytest.mark.parametrize("mode", (torch.enable_grad, torch.no_grad, torch.inference_mode))
@pytest.mark.parametrize("name", EVERY)
def test_usable_after_an_exception(name: str, mode: Any) -> None:
    model, x = make(Pooled), images(Pooled)
    with extractor(name, model) as cam:
        expected = maps_of(cam, x)
        failing = model.head[3].register_forward_hook(lambda *_: 1 / 0)
        with mode():
            before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
            with pytest.raises(ZeroDivisionError):
                model(x)
            assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
        failing.remove()
        if name in GRADIENTS:
            model(x)
            with pytest.raises(ZeroDivisionError):
                cam(scores=model(x), targets=lambda output: 1 / 0)
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        assert torch.equal(maps_of(cam, x), expected)
    with pytest.raises(KeyError), extractor(name, model):
        raise KeyError
    assert hooks(model) == 0


class _Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.late, self.head = nn.Conv2d(1, 2, 1), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.late(x).mean((2, 3)))


def test_ten_thousand_calls_keep_nothing() -> None:
    model, x = _Tiny(), torch.rand(1, 1, 2, 2)
    cam = ours.GradCAM(model, "late")

    def call(times: int, model: nn.Module = model, cam: Any = cam) -> None:
        for _ in range(times // 2):
            cam(1, model(x))
            with torch.inference_mode():
                scores = model(x)
            cam(1, scores)

    def alive() -> tuple[int, int]:
        gc.collect()
        objects = gc.get_objects()
        return sum(issubclass(type(thing), Tensor) for thing in objects), len(objects)

    call(10)
    before = alive()
    call(10_000)
    tensors, objects = alive()
    assert tensors <= before[0] and objects <= before[1] + 50
    assert len(recording._histories) == 0 and not recording._open
    gone = weakref.ref(model)
    cam.remove_hooks()
    del cam, model, call
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("name", ("GradCAM", "SmoothGradCAMpp", "FinerCAM"))
def test_a_pass_is_let_go_of(name: str) -> None:
    """Neither scores nor what the model computed for them are kept when the user drops them, but for the layer's."""
    model, x = make(Pooled), images(Pooled)
    with extractor(name, model) as cam:
        for mode in (torch.enable_grad, torch.no_grad):
            with mode():
                scores = model(x)
            gone = weakref.ref(scores)
            cam(1, scores)
            del scores
            gc.collect()
            assert gone() is None and len(recording._histories) == 0
    assert getattr(cam, "base_cam", cam).hook_a == [None]


def test_training_with_hooks_is_as_without() -> None:
    """In the caller's own mode nothing is cut: gradients of all parameters, and of the images, are as ever."""
    model, x = make(Flat), images(Flat)
    x.requires_grad_()
    gradients = []
    for name in (None, *GRADIENTS):
        cam = None if name is None else getattr(ours, name)(model, ["early", "late"])
        scores = model(x)
        assert scores.requires_grad
        if cam is not None:
            cam(1, scores, retain_graph=True)
        assert all(p.grad is None for p in model.parameters()) and x.grad is None
        scores.square().sum().backward()
        gradients.append([p.grad for p in (x, *model.parameters())])
        for p in (x, *model.parameters()):
            p.grad = None
        if cam is not None:
            cam.remove_hooks()
    for found in gradients[1:]:
        assert all(map(torch.equal, found, gradients[0]))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("frozen", (False, True))
def test_modes_that_the_original_refuses(name: str, frozen: bool) -> None:
    model, x = make(Pooled), images(Pooled)
    with extractor(name, model) as cam:
        expected = maps_of(cam, x)
        model.requires_grad_(not frozen)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode():
                before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
                torch.manual_seed(0)
                scores = model(x.clone())
                assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
                torch.manual_seed(0)
                (inside,) = cam(CATEGORIES, scores, retain_graph=True) if name != "CAM" else cam(CATEGORIES, scores)
            # What was made here without history has none for the caller.
            assert scores.requires_grad is (mode is torch.enable_grad and not frozen)
            torch.manual_seed(0)
            (outside,) = cam(CATEGORIES, scores)
            for found in (inside, outside):
                assert off(found.clone(), expected) <= COMPAT_SHARE_OF_RANGE
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert all(p.requires_grad is not frozen and p.grad is None for p in model.parameters())


class _Nested(Pooled):
    def forward(self, x: Tensor) -> Any:
        scores = super().forward(x)
        return {"scores": scores, "more": [scores * 2, (scores.square(), "text")]}


@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
def test_outputs_that_contain_the_scores(mode: Any) -> None:
    model, x = make(Pooled), images(Pooled)
    nested = _Nested().eval()
    nested.load_state_dict(model.state_dict())
    with ours.GradCAM(model, "late") as cam:
        expected = maps_of(cam, x)
    with ours.GradCAM(nested, "late") as cam, mode():
        output = nested(x)
        assert not output["scores"].requires_grad and output["more"][1][1] == "text"
        (found,) = cam(CATEGORIES, output["scores"])
        assert off(found, expected) <= COMPAT_SHARE_OF_RANGE
        (found,) = cam(CATEGORIES, nested(x)["more"][0])
        assert off(found, expected) <= COMPAT_SHARE_OF_RANGE
        with pytest.raises(RuntimeError, match="call the model as a whole and pass its output as it is"):
            cam(CATEGORIES, nested(x)["scores"].softmax(1))
        # Of the parts of a model the pass is not known to begin or to end.
        with pytest.raises(RuntimeError, match="call the model as a whole"):
            cam(CATEGORIES, nested.head(nested.relu(nested.late(nested.early(x)))))
        assert not torch.is_grad_enabled()


def test_a_frozen_trunk_and_a_head_that_is_trained() -> None:
    model, x = make(Pooled), images(Pooled)
    with ours.GradCAM(model, "late") as cam:
        expected = maps_of(cam, x)
        model.early.requires_grad_(False)
        model.late.requires_grad_(False)
        scores = model(x)
        assert off(cam(CATEGORIES, scores, retain_graph=True)[0], expected) <= COMPAT_SHARE_OF_RANGE
        scores.sum().backward()
        assert model.head[3].weight.grad is not None and model.late[1].weight.grad is None


class _Guarding(Pooled):
    """The trunk is not recorded, as in fine-tuning."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.late(self.early(x))
        return self.head(self.relu(x))


def test_a_model_that_switches_gradients_off_up_to_the_layer() -> None:
    model, x = make(Pooled), images(Pooled)
    guarding = _Guarding().eval()
    guarding.load_state_dict(model.state_dict())
    with ours.GradCAM(model, "late") as cam, ours.GradCAM(guarding, "late") as other:
        assert off(maps_of(other, x), maps_of(cam, x)) <= COMPAT_SHARE_OF_RANGE


@pytest.mark.parametrize("mode", (torch.enable_grad, torch.no_grad, torch.inference_mode))
def test_several_extractors_of_one_model(mode: Any) -> None:
    model, x = make(Pooled), images(Pooled)
    names = ("LayerCAM", "GradCAM", "XGradCAM")
    layers = ("late", "early", "relu")
    expected = []
    for name, layer in zip(names, layers, strict=True):
        with getattr(ours, name)(model, layer) as cam:
            expected.append(maps_of(cam, x))
    cams = [getattr(ours, name)(model, layer) for name, layer in zip(names, layers, strict=True)]
    with mode():
        scores = model(x)
    for cam, wanted in zip(cams, expected, strict=True):
        (found,) = cam(CATEGORIES, scores, retain_graph=True)
        assert off(found, wanted) <= COMPAT_SHARE_OF_RANGE
        cam.remove_hooks()
    assert hooks(model) == 0


class _Checkpointed(Flat):
    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(lambda x: self.late(self.early(x)), x, use_reentrant=False)
        return self.head(self.relu(x))


def test_checkpoints() -> None:
    model, x = make(Flat), images(Flat)
    checkpointed = _Checkpointed().eval()
    checkpointed.load_state_dict(model.state_dict())
    with ours.GradCAM(model, ["early", "late"]) as cam, ours.GradCAM(checkpointed, ["early", "late"]) as other:
        scores, others = model(x), checkpointed(x)
        for class_idx in (1, 5):
            # Layers run once more on the way back, which is no pass of the user's.
            pairs = zip(
                other(class_idx, others, retain_graph=True), cam(class_idx, scores, retain_graph=True), strict=True
            )
            for found, expected in pairs:
                assert off(found, expected) <= COMPAT_SHARE_OF_RANGE


def test_hooks_of_the_user_on_the_gradient_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shortcut to the mean would pass them by."""
    monkeypatch.setattr("diffcam_fast.compat.torchcam.pulling._WORTH_POOLING", 0)
    model, x = make(Pooled), images(Pooled)
    with ours.GradCAM(model, "relu") as cam:
        expected = maps_of(cam, x)
        mask = torch.zeros(12, 1, 1)
        mask[3] = 1
        handle = model.relu.register_forward_hook(
            lambda m, i, output: output.register_hook(lambda g: g * mask) and None
        )
        masked = maps_of(cam, x)
        handle.remove()
        assert off(masked, expected) > 0.1


@pytest.mark.parametrize("kind", (Flat, Volume))
@pytest.mark.parametrize("name", (*GRADIENTS, "FinerCAM"))
def test_several_classes_an_image(name: str, kind: type[nn.Module]) -> None:
    model, x = make(kind), images(kind, 2)
    classes = [[4, 0, 3], [1, 4, 6]]
    with getattr(ours, name)(model, "late") as cam:
        each = torch.stack([maps_of(cam, x, [row[t] for row in classes]) for t in range(3)], 1)
        for asked in (classes, torch.tensor(classes), np.array(classes)):
            assert off(maps_of(cam, x, asked), each) <= COMPAT_SHARE_OF_RANGE
        base = getattr(cam, "base_cam", cam)
        assert base.hook_g[0].shape[:2] == (2, 3)
        assert off(maps_of(cam, x, [[4], [1]]), each[:, :1]) <= COMPAT_SHARE_OF_RANGE
        assert off(maps_of(cam, x, torch.tensor([4, 1])), each[:, 0]) <= COMPAT_SHARE_OF_RANGE
        assert torch.equal(maps_of(cam, x, torch.tensor(4)), maps_of(cam, x, 4))
        if name != "FinerCAM":
            targets = [[lambda output, c=c: output[c] for c in row] for row in classes]
            assert off(maps_of(cam, x, None, targets=targets), each) <= COMPAT_SHARE_OF_RANGE
        with pytest.raises(ValueError, match="expected one for each image"):
            maps_of(getattr(ours, name)(model, "late", strict=True), x, classes)


def test_several_classes_by_the_weights_of_the_head() -> None:
    model, x = make(Pooled), images(Pooled, 2)
    with extractor("CAM", model) as cam:
        each = torch.stack([maps_of(cam, x, [4, 1]), maps_of(cam, x, [0, 6])], 1)
        assert off(maps_of(cam, x, [[4, 0], [1, 6]]), each) <= COMPAT_SHARE_OF_RANGE


def test_signals_with_as_many_classes_as_channels_and_positions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 3, stride=4), nn.Tanh(), nn.Flatten(), nn.Linear(9, 5))
    x, classes = torch.randn(2, 2, 12), [[0, 1, 2], [3, 2, 4]]
    for name in GRADIENTS:
        with getattr(ours, name)(model, "0") as cam:
            each = torch.stack([maps_of(cam, x, [row[t] for row in classes]) for t in range(3)], 1)
            assert each.shape == (2, 3, 3)
            assert off(maps_of(cam, x, classes), each) <= COMPAT_SHARE_OF_RANGE


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("name", EVERY)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    model, x = make(Pooled), images(Pooled)
    with extractor(name, model) as cam:
        expected = maps_of(cam, x)
    model.to(dtype)
    with extractor(name, model) as cam:
        found = maps_of(cam, x.to(dtype))
    assert found.dtype == dtype and off(found.float(), expected) < 0.1


@pytest.mark.parametrize("name", GRADIENTS)
def test_autocast(name: str) -> None:
    model, x = make(Pooled), images(Pooled)
    with extractor(name, model) as cam:
        expected = maps_of(cam, x)
        for mode in (torch.enable_grad, torch.no_grad):
            with mode(), torch.autocast("cpu", torch.bfloat16):
                found = maps_of(cam, x)
            assert off(found.float(), expected) < 0.1


class _Squared(_GradCAM):
    """As third parties write it."""

    def _get_weights(self, class_idx: Any, scores: Any, **kwargs: Any) -> list[Tensor]:
        self._backprop(scores, class_idx, **kwargs)
        return [g.flatten(2).mean(2) ** 2 for g in self.hook_g]


class _Doubled(ours.XGradCAM):
    def _get_weights(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        return [2 * weights for weights in super()._get_weights(*args, **kwargs)]


class _Deviation(_CAM):
    def _get_weights(self, class_idx: Any, scores: Any, **kwargs: Any) -> list[Tensor]:
        return [a.flatten(2).std(2) for a in self.hook_a]


def test_subclasses() -> None:
    model, x = make(Flat), images(Flat)
    a = model.late(model.early(x)).detach().requires_grad_()
    scores = model.head(model.relu(a))
    (g,) = torch.autograd.grad(sum(scores[i, c] for i, c in enumerate(CATEGORIES)), a)
    a = a.detach()
    weights = {
        _Squared: g.mean((2, 3)) ** 2,
        _Doubled: 2 * (g * a).sum((2, 3)) / (a.sum((2, 3)) + 1e-8),
        _Deviation: a.flatten(2).std(2),
    }
    for kind, expected in weights.items():
        maps = (expected[:, :, None, None] * a).sum(1)
        maps = maps if kind is _Deviation else maps.relu()
        with kind(model, "late") as cam:
            (found,) = cam(CATEGORIES, model(x), normalized=False)
        assert (found - maps).abs().max() <= COMPAT_SHARE_OF_RANGE * (maps.max() - maps.min())


def test_outputs_that_are_made_tensors_by_the_transform() -> None:
    model, x = make(Tokens), images(Tokens)
    with ours.GradCAM(model, "late", reshape_transform=lambda t: t[:, 1:].transpose(1, 2).unflatten(2, (4, 4))) as cam:
        assert maps_of(cam, x).shape == (3, 4, 4)
    with ours.GradCAM(model, "late") as cam, pytest.raises(TypeError, match="floating point tensor; got tuple"):
        model.late.register_forward_hook(lambda m, i, output: (output,), prepend=True)
        model(x)


CALLS = (
    (lambda m, x: ours.GradCAM(m, 3), TypeError, "target_layer: expected a module, a name or a list of them; got int"),
    (lambda m, x: ours.GradCAM(m, ["late", 3]), TypeError, "target_layer: expected a module, a name"),
    (lambda m, x: ours.GradCAM(m, "lat"), ValueError, "the model has no layer 'lat'; close names: 'late'"),
    (lambda m, x: ours.GradCAM(m, nn.ReLU()), ValueError, "expected a module of the model; got another ReLU"),
    (lambda m, x: ours.GradCAM(m, []), ValueError, "target_layer: expected at least one layer"),
    (lambda m, x: ours.GradCAM(nn.Flatten()), ValueError, "target_layer: found none for inputs"),
    (lambda m, x: ours.GradCAM(m, "late", reshape_transform=3), TypeError, "reshape_transform: expected a function"),
    (lambda m, x: ours.GradCAM(m, reshape_transform=abs), ValueError, "target_layer: expected a layer to go with"),
    (lambda m, x: ours.CAM(m, ["early", "late"]), ValueError, "target_layer: expected one layer; got 2"),
    (lambda m, x: ours.CAM(m, "late"), ValueError, "fc_layer: expected one linear layer in the model; found 2"),
    (lambda m, x: ours.CAM(m, "late", 3), TypeError, "fc_layer: expected a module or a name"),
    (lambda m, x: ours.CAM(m, "late", "late.9"), ValueError, "fc_layer: the model has no layer"),
    (lambda m, x: ours.SmoothGradCAMpp(m, "late", 0), ValueError, "num_samples: expected at least 1"),
    (lambda m, x: ours.FinerCAM(m, "late", base_method=ours.XGradCAM), TypeError, "base_method: expected GradCAM"),
    (lambda m, x: ours.FinerCAM(m, "late", gamma="1"), TypeError, "gamma: expected a number"),
    (lambda m, x: ours.FinerCAM(m, "late", gamma=-1), ValueError, "gamma: expected a finite number"),
    (lambda m, x: ours.FinerCAM(m, "late", num_references=0), ValueError, "num_references: expected at least 1"),
    (lambda m, x: ours.FinerCAM(m, "late", num_references=1.5), TypeError, "num_references: expected an integer"),
    (lambda m, x: ours.RefineCAM(m, "late"), ValueError, "target_layer: expected a list of at least two layers"),
    (lambda m, x: ours.RefineCAM(m, ["early", "late"], base_method=3), TypeError, "base_method: expected a class"),
    (lambda m, x: ours.GradCAM.fuse_cams(x), TypeError, "cams: expected a list of tensors"),
    (lambda m, x: ours.GradCAM.fuse_cams([]), ValueError, "cams: expected at least one map"),
    (lambda m, x: maps_of(ours.GradCAM(m, "late"), x, None), ValueError, "class_idx, targets: expected one of them"),
    (lambda m, x: maps_of(ours.GradCAM(m, "late"), x, 1, targets=max), ValueError, "expected one of them"),
    (lambda m, x: maps_of(ours.GradCAM(m, "late"), x, -1), ValueError, "class_idx: expected an integer from 0"),
    (lambda m, x: maps_of(ours.GradCAM(m, "late"), x, "dog"), ValueError, "class_idx: expected an integer from 0"),
    (lambda m, x: maps_of(ours.GradCAM(m, "late"), x, [1, 2]), ValueError, "a class for each of 3 images; got 2"),
    (lambda m, x: maps_of(ours.GradCAM(m, "late"), x, [[1], [2], []]), ValueError, "as many classes for each image"),
    (lambda m, x: maps_of(ours.GradCAM(m, "late"), x, torch.rand(3)), ValueError, "class_idx: expected integers"),
    (lambda m, x: maps_of(ours.GradCAM(m, "late"), x, None, targets=3), TypeError, "targets: expected a function"),
    (lambda m, x: maps_of(ours.GradCAM(m, "late"), x, None, targets=[max]), ValueError, "each of 3 images"),
    (lambda m, x: maps_of(ours.GradCAM(m, "late"), x, None, targets=len), TypeError, "that return a tensor"),
    (lambda m, x: maps_of(ours.GradCAM(m, "late"), x, None, targets=abs), ValueError, "that return a scalar"),
    (lambda m, x: maps_of(ours.FinerCAM(m, "late"), x, 1, targets=max), ValueError, "targets: not for FinerCAM"),
    (lambda m, x: maps_of(ours.FinerCAM(m, "late"), x, 1, comparison_idx=1), ValueError, "expected other classes"),
    (lambda m, x: maps_of(ours.FinerCAM(m, "late"), x, 1, comparison_idx=[2, 2]), ValueError, "each class once"),
    (lambda m, x: maps_of(ours.FinerCAM(m, "late"), x, 1, comparison_idx=[[2]]), ValueError, "rows for 3 images"),
    (lambda m, x: maps_of(ours.FinerCAM(m, "late"), x, 1, comparison_idx=[9]), ValueError, "classes from 0 to 6"),
    (lambda m, x: maps_of(ours.FinerCAM(m, "late"), x, 1, comparison_idx=[]), ValueError, "at least one class"),
    (lambda m, x: maps_of(ours.FinerCAM(m, "late"), x, 1, comparison_idx=["a"]), TypeError, "expected integers"),
    (lambda m, x: maps_of(ours.FinerCAM(m, "late"), x, True), TypeError, "class_idx: expected an integer"),
    (lambda m, x: maps_of(ours.GradCAM(m, "head"), x), ValueError, "pass reshape_transform"),
    (lambda m, x: _after(ours.GradCAM(m, "late"), x, None), ValueError, "scores: expected what the model put out"),
    (lambda m, x: _after(ours.GradCAM(m, "late"), x, [1]), TypeError, "scores: expected a tensor"),
    (lambda m, x: _after(ours.GradCAM(m, "late"), x, torch.rand(3, 7)), RuntimeError, "depends differentiably"),
    (lambda m, x: _after(ours.GradCAM(m, "late"), x, m.head[3].weight), RuntimeError, "depends on every target layer"),
    (lambda m, x: _twice(ours.GradCAM(m, "late"), x), RuntimeError, "retain_graph=True"),
)


@pytest.mark.parametrize("strict", (False, True))
@pytest.mark.parametrize("retain_graph", (False, True))
@pytest.mark.parametrize("layer", ("late", "relu"))
def test_nothing_of_a_pass_stays_in_memory(layer: str, retain_graph: bool, strict: bool) -> None:
    model, x = make(Pooled), images(Pooled)
    kept: list[weakref.ref[Tensor]] = []
    # What only the graph of the pass holds.
    model.early.register_forward_hook(lambda module, given, output: kept.append(weakref.ref(output)))
    with ours.GradCAM(model, layer, strict=strict) as cam:
        scores = model(x)
        cam(CATEGORIES, scores, retain_graph=retain_graph)
        if retain_graph:
            cam(CATEGORIES, scores)
        kept.clear()
        scores = model(x)
        cam(CATEGORIES, scores)
        assert kept[0]() is not None
        del scores
        assert kept[0]() is None


def test_torchcam_keeps_a_pass_in_memory() -> None:
    pytest.importorskip("torchcam")
    model, x = make(Pooled), images(Pooled)
    kept: list[weakref.ref[Tensor]] = []
    model.early.register_forward_hook(lambda module, given, output: kept.append(weakref.ref(output)))
    with original("torchcam", "methods").GradCAM(model, "relu") as cam:
        cam(CATEGORIES, model(x))
        gc.collect()
        assert kept[0]() is not None


def _after(cam: Any, x: Tensor, scores: Any) -> None:
    cam.model(x)
    cam(1, scores)


def _twice(cam: Any, x: Tensor) -> None:
    scores = cam.model(x)
    cam(1, scores)
    cam(2, scores)


@pytest.mark.parametrize(("call", "error", "message"), CALLS)
def test_refusals(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(make(Flat), images(Flat))


def test_targets_are_not_for_the_weights_of_the_head() -> None:
    model = make(Pooled)
    with extractor("CAM", model) as cam:
        model(images(Pooled))
        with pytest.raises(ValueError, match="targets: not for CAM"):
            cam(targets=max)
