"""What the pull-back computes, and above all what it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffcam_fast.explain import Explainer, explainer
from tests.explain.networks import InPlaceAfter, PooledConvolutions, Residual, Tapped, make


class Recorder(TorchDispatchMode):
    """Notes every operator that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((func.overloadpacket.__name__, args))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("classes", [None, [[0, 1]] * 2], ids=["one target", "two targets"])
def test_no_weight_gradient_is_computed(classes: Any) -> None:
    network = make(Residual)
    for parameter in network.parameters():
        parameter.register_hook(lambda gradient: pytest.fail("a parameter got a gradient"))
    with Recorder() as recorder:
        Explainer(network, "layer", chunk_size=1)(network.images(), classes)
    masks = [args[10] for name, args in recorder.calls if name == "convolution_backward"]
    assert len(masks) == 2 * (1 if classes is None else 2)
    assert all(mask == [True, False, False] for mask in masks)


def test_nothing_is_recorded_before_the_layer() -> None:
    network = make(PooledConvolutions)
    seen: dict[str, Tensor] = {}
    for name, module in network.named_modules():
        module.register_forward_hook(lambda module, inputs, output, name=name: seen.update({name: output}))
    Explainer(network, "layer")(network.images())
    for name in ("early", "early.0", "early.1", "layer.0", "layer.1", "layer.2", "layer"):
        assert seen[name].grad_fn is None and not seen[name].requires_grad, name
    assert seen["head"].grad_fn is not None


def test_one_forward_and_one_pull_back_for_all_layers_and_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    network = make(Residual)
    forwards, pull_backs = [], []
    network.register_forward_hook(lambda *args: forwards.append(1))
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **options: pull_backs.append(1) or grad(*args, **options))
    Explainer(network, network.layers)(network.images(), [[0, 1, 2]] * 2)
    assert (len(forwards), len(pull_backs)) == (1, 1)


class Head(Tapped):
    """A layer, followed by whatever the test gives."""

    image_shape = (3, 8, 8)

    def __init__(self, head: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.layer = nn.Conv2d(3, 6, 3)
        self.norm = nn.LayerNorm(6)
        self.last = nn.Linear(6, 5)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.head(self.layer(x)))


def _expanded(call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[int]]:
    """The result of a call, and the number of dimensions of the gradients that became maps."""
    dimensions: list[int] = []
    cam = explainer.cam

    def noting(activations: Tensor, gradients: Tensor, *args: Any, **options: Any) -> Tensor:
        dimensions.append(gradients.dim())
        return cam(activations, gradients, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(explainer, "cam", noting)
        return call(), dimensions


MEANS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean over positions": lambda y: y.mean((2, 3)),
    "mean, negative dimensions": lambda y: y.mean((-1, -2), keepdim=True).flatten(1),
    "adaptive pooling": lambda y: nn.functional.adaptive_avg_pool2d(y, 1).flatten(1),
    "a head after the mean": lambda y: y.mean((2, 3)).sin().square(),
    "the mean used twice": lambda y: (m := y.mean((2, 3))).exp() + m,
}
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "something before the mean": lambda y: y.relu().mean((2, 3)),
    "mean over rows alone": lambda y: y.mean(2).amax(2),
    "mean over channels too": lambda y: y.mean((1, 2, 3))[:, None].expand(-1, 6),
    "mean and maximum": lambda y: y.mean((2, 3)) + y.amax((2, 3)),
    "two means": lambda y: y.mean((2, 3)) * y.mean((2, 3)),
    "maximum": lambda y: y.amax((2, 3)),
    "in-place work before the mean": lambda y: y.mul_(2).mean((2, 3)),
}


@pytest.mark.parametrize("name", [*MEANS, *OTHERS])
@pytest.mark.parametrize("classes", [None, [[0, 1, 2]] * 2], ids=["one target", "three targets"])
def test_gradients_that_are_the_same_everywhere_are_not_expanded(
    name: str, classes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Head({**MEANS, **OTHERS}[name]).double()
    images = network.images()
    for method in ("gradcam", "hirescam", "gradcam++"):
        found, dimensions = _expanded(lambda m=method: Explainer(network, "layer", m)(images, classes), monkeypatch)
        assert dimensions == [3 if name in MEANS else 5]
        # with a reshape the shortcut is not taken
        plain, dimensions = _expanded(
            lambda m=method: Explainer(network, "layer", m, reshape=lambda y: y)(images, classes), monkeypatch
        )
        assert dimensions == [5]
        torch.testing.assert_close(found.maps, plain.maps)


def test_the_mean_is_not_searched_for_at_length(monkeypatch: pytest.MonkeyPatch) -> None:
    def long(y: Tensor) -> Tensor:
        y = y.mean((2, 3))
        for _ in range(100):
            y = y + 0.01
        return y

    network = Head(long).double()
    _, dimensions = _expanded(lambda: Explainer(network, "layer")(network.images()), monkeypatch)
    assert dimensions == [5]


class Unbatchable(torch.autograd.Function):
    """A function whose backward leaves PyTorch, so that `torch.vmap` cannot follow."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * torch.from_numpy(gradient.detach().numpy().copy())


def test_a_backward_that_cannot_be_batched() -> None:
    network = make(InPlaceAfter)
    images = network.images()
    network.head[2].forward = Unbatchable.apply
    with pytest.raises(RuntimeError, match=r"pulling back 2 targets in one pass failed: .*pass chunk_size=1"):
        Explainer(network, "layer")(images, [[0, 1]] * 2)
    found = Explainer(network, "layer", chunk_size=1)(images, [[0, 1]] * 2).maps
    network.head[2].forward = lambda x: 2 * x
    torch.testing.assert_close(found, Explainer(network, "layer")(images, [[0, 1]] * 2).maps)
