"""What the pull-back computes, and above all what it does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffcam_fast.explain import Explainer
from tests.explain.networks import InPlaceAfter, PooledConvolutions, Residual, make


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


@pytest.mark.parametrize("budget", [1, 3_000, 10**9])
def test_the_budget_decides_how_many_targets_are_pulled_back_at_a_time(
    budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = make(InPlaceAfter)
    images, classes = network.images(), [[0, 1, 2, 3, 4]] * 2
    expected = Explainer(network, "layer")(images, classes)
    targets: list[int] = []
    grad = torch.autograd.grad

    def noting(outputs: Any, inputs: Any, cotangents: Tensor, **options: Any) -> Any:
        targets.append(len(cotangents) if options.get("is_grads_batched") else 1)
        return grad(outputs, inputs, cotangents, **options)

    monkeypatch.setattr(torch.autograd, "grad", noting)
    found = Explainer(network, "layer", memory_budget=budget)(images, classes)
    assert sum(targets) == 5
    assert max(targets) == {1: 1, 10**9: 5}.get(budget, max(targets))
    assert len(targets) > 1 or budget == 10**9
    torch.testing.assert_close(found.maps, expected.maps)
    torch.testing.assert_close(found.delta, expected.delta)


def test_cotangents_too_are_within_the_budget() -> None:
    network = make(InPlaceAfter)
    seen: list[int] = []

    def target(logits: Tensor, classes: Tensor) -> Tensor:
        seen.append(classes.shape[1])
        return logits.gather(1, classes)

    cotangent = 2 * 5 * 8  # images, classes, bytes of a float64
    Explainer(network, "layer", target=target, memory_budget=2 * cotangent)(network.images(), [[0, 1, 2, 3, 4]] * 2)
    assert seen == [2, 2, 1]
