"""What users of pytorch-grad-cam rely on, and what they were refused."""

from __future__ import annotations

import gc
import inspect
import re
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import diffcam_fast as dcf
from diffcam_fast.compat import pytorch_grad_cam as ours
from diffcam_fast.compat.originals import original
from tests.compat.networks import Flat, Pooled, images, make
from tests.tolerances import COMPAT_SHARE_OF_RANGE, MAP_SHARE_OF_RANGE

Target = ours.utils.model_targets.ClassifierOutputTarget
CLASSES = ("GradCAM", "HiResCAM", "GradCAMElementWise", "GradCAMPlusPlus", "XGradCAM", "LayerCAM", "EigenGradCAM")
EVERY = (*CLASSES, "EigenCAM", "FinerCAM")


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


@pytest.mark.parametrize("name", (*EVERY, "BaseCAM"))
def test_signatures(name: str) -> None:
    """Ours takes what the original takes, in its order and with its defaults, and more by name."""
    pytest.importorskip("tests.helpers.torchvision_cpu")
    pytest.importorskip("pytorch_grad_cam")
    their_class = original("pytorch_grad_cam", "base_cam").BaseCAM if name == "BaseCAM" else None
    their_class = their_class or getattr(original("pytorch_grad_cam"), name)
    our_class = getattr(ours, name)
    for method in ("__init__", "forward", "__call__"):
        expected = list(inspect.signature(getattr(their_class, method)).parameters.values())
        found = list(inspect.signature(getattr(our_class, method)).parameters.values())
        assert [p.name for p in found[: len(expected)]] == [p.name for p in expected]
        for one, other in zip(found, expected, strict=False):
            if other.name not in ("targets", "base_method"):
                assert one.default == other.default, one
        assert all(p.kind is p.KEYWORD_ONLY for p in found[len(expected) :])
    for attribute in vars(original("pytorch_grad_cam", "base_cam").BaseCAM):
        assert name == "FinerCAM" or attribute == "__del__" or hasattr(our_class, attribute)


@pytest.mark.parametrize("name", EVERY)
def test_no_hooks_stay_and_an_exception_does_no_harm(name: str) -> None:
    model, x = make(Flat), images(Flat)
    cam = getattr(ours, name)(model, [model.late])
    assert hooks(model) == 0
    expected = cam(x, [Target(1)] * 3)
    with pytest.raises(RuntimeError):
        cam(x[:, :2], [Target(1)] * 3)
    if name != "EigenCAM":
        with pytest.raises(ZeroDivisionError):
            cam(x, [lambda output: 1 / 0] * 3)
    assert hooks(model) == 0 and torch.is_grad_enabled()
    assert np.array_equal(cam(x, [Target(1)] * 3), expected)
    cam = getattr(cam, "base_cam", cam)
    cam.activations_and_grads.release()
    assert cam.activations_and_grads.activations == [] and hooks(model) == 0


class Tiny(nn.Module):
    """What takes next to no time."""

    def __init__(self) -> None:
        super().__init__()
        self.late, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.late(x).mean((2, 3)))


def objects() -> tuple[int, int]:
    """How many there are that Python's collector knows, and how many of them are tensors."""
    gc.collect()
    found = gc.get_objects()
    return len(found), sum(issubclass(type(thing), Tensor) for thing in found)


def resident_kb() -> int:
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("no /proc to read resident memory from")
    return int(re.search(r"VmRSS:\s+(\d+) kB", status.read_text())[1])


def test_ten_thousand_calls_take_no_memory() -> None:
    torch.manual_seed(0)
    model, x = Tiny(), torch.randn(1, 3, 4, 4)
    cam = ours.GradCAM(model, [model.late])
    targets = [Target(1)]
    for _ in range(1000):
        cam(x, targets)
    before, resident = objects(), resident_kb()
    gc.disable()
    try:
        for _ in range(10_000):
            cam(x, targets)
        # What is not Python's would show here: 200 bytes a call are 2 MB. Asked before the list of all objects, which
        # takes megabytes itself.
        grown = resident_kb() - resident
        # Without a collector: no call leaves a cycle for it to find.
        known = len(gc.get_objects())
    finally:
        gc.enable()
    assert known <= before[0] + 10
    assert objects()[1] <= before[1]
    assert grown < 2000
    assert hooks(model) == 0


@pytest.mark.parametrize("name", EVERY)
def test_repeated_calls_keep_nothing(name: str) -> None:
    model, x = make(Flat), images(Flat)
    cam = getattr(ours, name)(model, [model.late])
    for _ in range(3):
        cam(x, [Target(1)] * 3)
    before = objects()
    for _ in range(10):
        cam(x, [Target(1)] * 3)
    after = objects()
    assert after[1] <= before[1] and after[0] <= before[0] + 10
    gone = weakref.ref(model)
    del cam, model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("name", EVERY)
def test_with_block_and_release(name: str) -> None:
    """As with the original, what was recorded goes with the block; unlike there, the object may be called again."""
    model, x = make(Flat), images(Flat)
    with getattr(ours, name)(model, [model.late]) as cam:
        expected = cam(x, [Target(1)] * 3)
        recorded = getattr(cam, "base_cam", cam).activations_and_grads
        assert len(recorded.activations) == 1
        held = weakref.ref(recorded.activations[0])
    assert recorded.activations == [] and recorded.gradients == []
    gc.collect()
    assert held() is None
    recorded.release()  # twice does no harm
    assert np.array_equal(cam(x, [Target(1)] * 3), expected)
    with pytest.raises(ZeroDivisionError), getattr(ours, name)(model, [model.late]) as cam:
        cam(x, [Target(1)] * 3)
        raise ZeroDivisionError
    assert getattr(cam, "base_cam", cam).activations_and_grads.activations == []
    assert hooks(model) == 0 and not any(p.grad is not None for p in model.parameters())


class Weighing(Tiny):
    """Changes the gradient on its way from the head to the layer."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def forward(self, x: Tensor) -> Tensor:
        at = {"layer": self.late(x)}
        at["mean"] = at["layer"].mean((2, 3))
        at["view"] = at["mean"].view(-1, 4)
        at["logits"] = self.head(at["view"])
        tensor = at[self.where]
        if tensor.requires_grad:
            factor = torch.tensor([3.0, -1.0, 0.5, 2.0][: tensor.shape[1]]).reshape(1, -1, *[1] * (tensor.dim() - 2))
            tensor.register_hook(lambda gradient: gradient * factor)
        return at["logits"]


@pytest.mark.parametrize("where", ("layer", "mean", "view", "logits"))
def test_hooks_that_change_gradients_are_heeded(where: str) -> None:
    """Where the logits are one linear layer of means, its weight is the gradient; not so with such hooks."""
    torch.manual_seed(0)
    model, x = Weighing(where), torch.randn(2, 3, 4, 4)
    cam = ours.GradCAM(model, [model.late])
    for category in (1, 0, 2):
        found = cam(x, [Target(category)] * 2, as_tensor=True)
        activations = model.late(x)
        outputs = model.head(activations.mean((2, 3)))
        factor = torch.tensor([3.0, -1.0, 0.5, 2.0])
        weight = model.head.weight[category] * (factor[category] if where == "logits" else factor)
        raw = (weight[:, None, None] * activations).sum(1).relu().detach()
        low, high = raw.amin((1, 2), keepdim=True), raw.amax((1, 2), keepdim=True)
        assert outputs.shape == cam.outputs.shape and high.max() > 0
        assert (found - (raw - low) / (high - low + 1e-7)).abs().max() <= COMPAT_SHARE_OF_RANGE


def test_weights_that_change_between_calls() -> None:
    """What was learned about the head is not its weight."""
    torch.manual_seed(0)
    model, x = Tiny(), torch.randn(2, 3, 4, 4)
    cam = ours.GradCAM(model, [model.late])
    for _ in range(3):
        cam(x, [Target(1)] * 2)
    with torch.no_grad():
        model.head.weight.copy_(torch.randn(3, 4))
    changed = cam(x, [Target(1)] * 2)
    assert np.array_equal(changed, ours.GradCAM(model, [model.late])(x, [Target(1)] * 2)) and np.ptp(changed) > 0.5
    model.head = nn.Sequential(nn.Tanh(), nn.Linear(4, 3))
    expected = ours.GradCAM(model, [model.late])(x, [Target(1)] * 2)
    assert np.array_equal(cam(x, [Target(1)] * 2), expected)


def test_what_a_call_leaves_to_look_at() -> None:
    model, x = make(Pooled), images(Pooled)
    with ours.GradCAM(model, [model.early, model.late]) as cam:
        cam(x, [Target(1)] * 3)
        with torch.no_grad():
            assert torch.allclose(cam.outputs, model(x))
        assert not cam.outputs.requires_grad
        recorded = cam.activations_and_grads
        activations, gradients = recorded.activations, recorded.gradients
        assert [a.shape for a in activations] == [g.shape for g in gradients]
        assert [tuple(a.shape) for a in activations] == [(3, 5, 12, 10), (3, 12, 6, 5)]
        early = model.early(x).detach().requires_grad_()
        late = model.late(early)
        late.retain_grad()
        model.head(model.relu(late))[:, 1].sum().backward()
        assert torch.allclose(gradients[0], early.grad) and torch.allclose(gradients[1], late.grad)
        assert torch.allclose(activations[1], late)
    assert recorded.activations == [] and recorded.gradients == []
    # It records for callers with a backward pass of their own, too.
    output = recorded(x)
    output[:, 1].sum().backward()
    assert torch.allclose(recorded.gradients[1], late.grad) and len(recorded.activations) == 2
    recorded.release()
    assert hooks(model) == 0


@pytest.mark.parametrize("name", EVERY)
def test_refused_by_the_original(name: str) -> None:
    model, x = make(Pooled), images(Pooled)
    cam = getattr(ours, name)(model, [model.late])
    expected = cam(x, [Target(1)] * 3)
    model.requires_grad_(False)
    for guard in (torch.no_grad, torch.inference_mode):
        with guard():
            assert np.abs(cam(x.clone(), [Target(1)] * 3) - expected).max() <= MAP_SHARE_OF_RANGE[torch.float32]
    maps = cam(x, [Target(1)] * 3, as_tensor=True)
    assert isinstance(maps, Tensor) and maps.dtype == torch.float32 and not maps.requires_grad
    assert np.array_equal(maps.numpy(), expected)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("name", ("GradCAM", "GradCAMPlusPlus", "EigenGradCAM", "EigenCAM"))
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    model, x = make(Pooled), images(Pooled)
    cam = getattr(ours, name)(model, [model.late])
    expected = cam(x, [Target(1)] * 3)
    model.to(dtype)
    found = cam(x.to(dtype), [Target(1)] * 3)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < 0.1


def test_half_precision_in_a_subclass() -> None:
    class Doubled(ours.GradCAM):
        def get_cam_weights(self, *args: Any) -> np.ndarray:
            return 2 * super().get_cam_weights(*args)

    model, x = make(Pooled).bfloat16(), images(Pooled).bfloat16()
    expected = ours.GradCAM(model, [model.late])(x, [Target(1)] * 3)
    maps = Doubled(model, [model.late])(x, [Target(1)] * 3, as_tensor=True)
    assert np.abs(maps.numpy() - expected).max() < MAP_SHARE_OF_RANGE[torch.float32]


@pytest.mark.parametrize("kind", (Flat, Pooled))
def test_several_classes_an_image(kind: type[nn.Module]) -> None:
    class Overridden(ours.GradCAM):
        def get_cam_weights(self, *args: Any) -> np.ndarray:
            return super().get_cam_weights(*args)

    model, x = make(kind), images(kind, 2)
    classes = [[4, 0, 3], [1, 4, 6]]
    asked = [
        [[Target(c) for c in row] for row in classes],
        [[lambda output, c=c: output[c] for c in row] for row in classes],
        torch.tensor(classes),
        np.array(classes),
    ]
    single = ours.GradCAM(model, [model.late])

    def check(cam: Any, targets: Any, **options: bool) -> None:
        each = [single(x, [Target(row[t]) for row in classes], **options) for t in range(3)]
        found = cam(x, targets, **options)
        assert found.shape == (2, 3, 12, 10)
        assert np.abs(found - np.stack(each, 1)).max() <= COMPAT_SHARE_OF_RANGE

    for targets in asked:
        check(single, targets)
        check(Overridden(model, [model.late]), targets)
    check(single, asked[0], eigen_smooth=True)
    check(single, asked[0], aug_smooth=True)
    assert single(x, torch.tensor([4, 1])).shape == (2, 12, 10)


def test_signals() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 10, 4))
    x = torch.randn(4, 2, 12)
    found = ours.GradCAM(model, [model[0]])(x, torch.arange(4), as_tensor=True)
    expected = dcf.Explainer(model, "0", "gradcam", dcf.Logit())(x, torch.arange(4)).maps[:, 0]
    assert (found - expected).abs().max() <= COMPAT_SHARE_OF_RANGE


class _Signal(nn.Module):
    """As many channels as positions: gradients that are given once are easily mistaken."""

    def __init__(self) -> None:
        super().__init__()
        self.late, self.head = nn.Conv1d(2, 3, 3, stride=4), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.late(x).mean(2))


def test_signals_with_as_many_targets_as_channels() -> None:
    torch.manual_seed(0)
    model, x = _Signal(), torch.randn(2, 2, 12)
    cam = ours.HiResCAM(model, [model.late])
    several = cam(x, torch.tensor([[0, 1, 2], [3, 2, 1]]))
    assert np.abs(several[:, 1] - cam(x, torch.tensor([1, 2]))).max() <= COMPAT_SHARE_OF_RANGE
    assert np.ptp(several) > 0.5


def test_without_targets_and_under_autocast() -> None:
    model, x = make(Pooled), images(Pooled)
    cam = ours.GradCAM(model, [model.late])
    expected = cam(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert np.abs(cam(x) - expected).max() < 0.1
    assert cam(x[:0]).shape == (0, 12, 10)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    (
        (lambda m, x: ours.GradCAM(m, m.late[0])(x), TypeError, "target_layers: expected a list of modules"),
        (lambda m, x: ours.GradCAM(m, [])(x), ValueError, "target_layers: expected at least one module"),
        (lambda m, x: ours.GradCAM(m, ["late"])(x), TypeError, "target_layers: expected modules; got str"),
        (lambda m, x: ours.GradCAM(m, [nn.Identity()])(x), ValueError, "expected the model to call layer 'number 0'"),
        (lambda m, x: ours.GradCAM(m, [m.late])(x, Target(1)), TypeError, "targets: expected None or a list"),
        (lambda m, x: ours.GradCAM(m, [m.late])(x, [1, 2, 3]), TypeError, "targets: expected functions"),
        (lambda m, x: ours.GradCAM(m, [m.late])(x, []), ValueError, "targets: expected at least one"),
        (lambda m, x: ours.GradCAM(m, [m.late])(x, [[], [], []]), ValueError, "as many targets for each image"),
        (lambda m, x: ours.GradCAM(m, [m.head])(x), ValueError, "pass reshape_transform"),
        (lambda m, x: ours.BaseCAM(m, [m.late])(x), TypeError, "expected get_cam_weights or get_cam_image"),
        (lambda m, x: ours.GradCAM(m, [m.late])(x, [lambda o: x.sum().requires_grad_()] * 3), ValueError, "depend on"),
        (lambda m, x: ours.FinerCAM(m, [m.late], base_method=dict)(x), TypeError, "base_method: expected a class"),
        (lambda m, x: ours.FinerCAM(m, [m.late])(x, comparison_categories=[9]), ValueError, "ranks below 7"),
        (lambda m, x: ours.FinerCAM(m, [m.late])(x, target_idx=7), IndexError, "class 7 is out of bounds .* 7 classes"),
        (lambda m, x: ours.FinerCAM(m, [m.late])(x, target_idx="1"), TypeError, "target_idx: expected an integer"),
    ),
)
def test_refusals(call: Any, error: type[Exception], message: str) -> None:
    model = make(Flat)
    with pytest.raises(error, match=message):
        call(model, images(Flat))
    assert hooks(model) == 0
