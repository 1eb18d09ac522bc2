"""Which shortcuts the autograd graph allows: heads that look alike and are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from diffcam_fast.explain import Explainer, LogitDifference, evidence, head
from diffcam_fast.explain.graph import Tail
from diffcam_fast.reference.cam import METHODS
from tests.explain.networks import Tapped

# One way of adding up instead of another, float64.
ROUNDING = {"rtol": 1e-9, "atol": 1e-9}

Forward = Callable[["Head", Tensor], Tensor]


class Head(Tapped):
    """A layer, followed by whatever the test gives."""

    image_shape = (3, 8, 8)

    def __init__(self, tail: Forward) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.layer = nn.Conv2d(3, 6, 3)
        self.norm = nn.LayerNorm(6)
        self.last = nn.Linear(6, 5)
        self.second = nn.Linear(5, 5)
        self.bare = nn.Linear(6, 5, bias=False)
        self.wide = nn.Linear(24, 5)
        self.convolution = nn.Conv2d(6, 5, 1)
        self.tied = nn.Linear(6, 6)
        self.drop = nn.Dropout(0.5)
        self.tail = tail

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self, self.layer(x))


def _hooked(y: Tensor, register: Callable[[Tensor], Any]) -> Tensor:
    register(y)
    return y


def _double(gradient: Tensor) -> Tensor:
    return gradient * torch.linspace(0, 2, gradient.numel(), dtype=gradient.dtype).reshape(gradient.shape)


def _double_inputs(inputs: Any, outputs: Any) -> Any:
    return tuple(None if gradient is None else _double(gradient) for gradient in inputs)


def _double_outputs(outputs: Any) -> Any:
    return tuple(_double(gradient) for gradient in outputs)


# Every tensor between the layer and the logits can be looked at for hooks.
BARE: dict[str, Forward] = {
    "mean": lambda m, y: m.last(y.mean((2, 3))),
    "negative dimensions, kept": lambda m, y: m.last(y.mean((-1, -2), keepdim=True).flatten(1)),
    "adaptive pooling": lambda m, y: m.last(functional.adaptive_avg_pool2d(y, 1).flatten(1)),
    "without bias": lambda m, y: m.bare(y.mean((2, 3))),
    "dropout": lambda m, y: m.last(m.drop(y.mean((2, 3)))),
    "written out": lambda m, y: torch.addmm(m.last.bias, y.mean((2, 3)), m.last.weight.t()),
    "weight computed": lambda m, y: functional.linear(y.mean((2, 3)), m.last.weight * 2, m.last.bias),
}
LINEAR: dict[str, Forward] = {
    "squeezed": lambda m, y: m.last(y.mean((2, 3), keepdim=True).squeeze(3).squeeze(2)),
    "copied": lambda m, y: m.last(y.mean((2, 3)).clone()),
    "copied and of another shape": lambda m, y: m.last(y.mean((2, 3), keepdim=True).clone().flatten(1)),
    "reshaped": lambda m, y: m.last(y.mean((2, 3), keepdim=True).reshape(len(y), 2, 3).contiguous().view(-1, 6)),
    "frozen weight": lambda m, y: functional.linear(y.mean((2, 3)), m.last.weight.detach(), m.last.bias.detach()),
}
POOLED: dict[str, Forward] = {
    "something after the mean": lambda m, y: m.last(y.mean((2, 3)).sin().square()),
    "mean used twice": lambda m, y: m.last((p := y.mean((2, 3))).exp() + p),
    "two linear layers": lambda m, y: m.second(m.last(y.mean((2, 3)))),
    "tied weights": lambda m, y: m.tied(m.tied(y.mean((2, 3)))),
    "layer norm": lambda m, y: m.last(m.norm(y.mean((2, 3)))),
    "1x1 convolution": lambda m, y: m.convolution(y.mean((2, 3), keepdim=True)).flatten(1),
    "logits used twice": lambda m, y: (z := m.last(y.mean((2, 3)))) + z.sin(),
    "a second way round the linear layer": lambda m, y: m.last(p := y.mean((2, 3))) + p[:, :5].exp(),
    "logits in other units": lambda m, y: 3 * m.last(y.mean((2, 3))),
    "scaled inside": lambda m, y: torch.addmm(m.last.bias, y.mean((2, 3)), m.last.weight.t(), alpha=2),
    "channels in another order": lambda m, y: m.last(y.mean((2, 3)).reshape(-1, 2, 3).transpose(1, 2).reshape(-1, 6)),
    "flipped": lambda m, y: m.last(y.mean((2, 3)).flip(1)),
    "in-place work after the mean": lambda m, y: m.last(y.mean((2, 3)).relu_()),
    "weight from the pooled vector": lambda m, y: (p := y.mean((2, 3))) @ (m.bare.weight.t() * p.sum().sin()),
    "hook on the node of the linear layer": lambda m, y: _hooked(
        m.last(y.mean((2, 3))), lambda z: z.grad_fn.register_hook(_double_inputs)
    ),
    "hook on the logits": lambda m, y: _hooked(m.last(y.mean((2, 3))), lambda z: z.register_hook(_double)),
    "hook on the pooled vector": lambda m, y: m.last(_hooked(y.mean((2, 3)), lambda p: p.register_hook(_double))),
}
OTHERS: dict[str, Forward] = {
    "something before the mean": lambda m, y: m.last(y.relu().mean((2, 3))),
    "in-place ReLU before the mean": lambda m, y: m.last(functional.relu_(y).mean((2, 3))),
    "in-place work before the mean": lambda m, y: m.last(y.mul_(2).mean((2, 3))),
    "mean over rows": lambda m, y: m.last(y.mean(2).amax(2)),
    "mean over rows, then over columns": lambda m, y: m.last(y.mean(3).mean(2)),
    "mean over channels too": lambda m, y: m.last(y.mean((1, 2, 3))[:, None].expand(-1, 6)),
    "mean over images too": lambda m, y: m.last(y.mean((0, 2, 3)).expand(len(y), 6)),
    "second consumer": lambda m, y: m.last(y.mean((2, 3)) + y.amax((2, 3))),
    "second mean": lambda m, y: m.last(y.mean((2, 3)) * y.mean((2, 3))),
    "skip around the pool": lambda m, y: m.last(y.mean((2, 3))) + 0.1 * y[:, :5].square().sum((2, 3)),
    "max-pool": lambda m, y: m.last(y.amax((2, 3))),
    "adaptive max-pool": lambda m, y: m.last(functional.adaptive_max_pool2d(y, 1).flatten(1)),
    "pooled to 2 by 2": lambda m, y: m.wide(functional.adaptive_avg_pool2d(y, 2).flatten(1)),
    "attention pool": lambda m, y: m.last((y.flatten(2).softmax(2) * y.flatten(2)).sum(2)),
    "part of the positions": lambda m, y: m.last(y[:, :, 1:].mean((2, 3))),
    "flattened": lambda m, y: functional.linear(y.flatten(1), m.last.weight.repeat(1, 36)),
    "hook on the layer's output": lambda m, y: m.last(_hooked(y, lambda t: t.register_hook(_double)).mean((2, 3))),
    "hook on the node of the mean": lambda m, y: m.last(
        _hooked(y.mean((2, 3)), lambda p: p.grad_fn.register_hook(_double_inputs))
    ),
    "hook before the node of the mean": lambda m, y: m.last(
        _hooked(y.mean((2, 3)), lambda p: p.grad_fn.register_prehook(_double_outputs))
    ),
}
RESTRIDED: dict[str, tuple[str, Forward]] = {
    "adaptive pooling": ("head", lambda m, y: m.last(functional.adaptive_avg_pool2d(y, 1).flatten(1))),
    "adaptive pooling module": ("head", lambda m, y: m.last(torch.flatten(m.pool(y), 1))),
    "by hand, in place": (
        "head",
        lambda m, y: m.last(y.mean((2, 3), keepdim=True).as_strided_((2, 6, 1, 1), (6, 1, 6, 6)).flatten(1)),
    ),
    "by hand, another tensor": (
        "pooled",
        lambda m, y: m.last(y.mean((2, 3), keepdim=True).as_strided((2, 6, 1, 1), (6, 1, 6, 6)).flatten(1)),
    ),
    "channels in another order": ("pooled", lambda m, y: m.last(y.mean((2, 3)).as_strided_((2, 6), (1, 2)))),
    "an offset of one's own": (
        "pooled",
        lambda m, y: m.last(y.mean((2, 3), keepdim=True).as_strided_((2, 6, 1, 1), (6, 1, 6, 6), 0).flatten(1)),
    ),
    "one image twice": ("pooled", lambda m, y: m.last(y.mean((2, 3)).as_strided_((2, 6), (0, 1)))),
    "from the second channel on": (
        "pooled",
        lambda m, y: m.last(torch.cat([y.mean((2, 3)).as_strided((2, 5), (6, 1), 1), y.new_zeros(2, 1)], 1)),
    ),
    "hook before the strides": (
        "pooled",
        lambda m, y: m.last(_hooked(y.mean((2, 3)), lambda p: p.register_hook(_double)).as_strided_((2, 6), (6, 1))),
    ),
    "hook after the strides": (
        "pooled",
        lambda m, y: m.last(
            _hooked(functional.adaptive_avg_pool2d(y, 1), lambda p: p.register_hook(_double)).flatten(1)
        ),
    ),
}
ALL = {**BARE, **LINEAR, **POOLED, **OTHERS}
FEW: list[Any] = [None, [[0, 1, 2]] * 2]
MANY = [list(range(5)) * 4] * 2


def _kind(explainer: Explainer, images: Tensor, classes: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, str]:
    """The explanation, and what it was made from: "head", "pooled" or "all positions"."""
    kinds: list[str] = []

    def noting(recipe: evidence.Recipe, activations: Tensor, gradient: Tensor) -> Tensor:
        kinds.append("pooled" if gradient.dim() == 3 else "all positions")
        return maps_of(recipe, activations, gradient)

    maps_of, maps = evidence.maps_of, head.LinearHead.maps
    with monkeypatch.context() as patched:
        patched.setattr(evidence, "maps_of", noting)
        patched.setattr(head.LinearHead, "maps", lambda *args: kinds.append("head") or maps(*args))
        found = explainer(images, classes)
    (kind,) = set(kinds)
    return found, kind


@pytest.mark.parametrize("name", ALL)
def test_heads_that_look_alike(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Head(ALL[name]).double().eval()
    images = network.images()
    for method in ("gradcam", "layercam"):
        explainer = Explainer(network, "layer", method)
        # with a reshape no shortcut is taken
        long = Explainer(network, "layer", method, reshape=lambda y: y, chunk_size=1)
        for classes in (*FEW, MANY):
            expected = long(images, classes)
            for _ in range(2):  # the first call is the careful one
                found, kind = _kind(explainer, images, classes, monkeypatch)
                torch.testing.assert_close(found.maps, expected.maps, **ROUNDING)
                torch.testing.assert_close(found.layer_maps["layer"], expected.layer_maps["layer"], **ROUNDING)
                torch.testing.assert_close(found.delta, expected.delta)
                if name in BARE:
                    assert kind == "head"
                elif name in LINEAR:
                    assert kind == ("pooled" if classes is None else "head")
                else:
                    assert kind == ("pooled" if name in POOLED else "all positions")


@pytest.mark.parametrize("name", RESTRIDED)
def test_pooled_vectors_in_other_strides(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, tail = RESTRIDED[name]
    network = Head(tail).double().eval()
    network.pool = nn.AdaptiveAvgPool2d(1)
    images = network.images().contiguous(memory_format=torch.channels_last)
    explainer = Explainer(network, "layer")
    # By the graph alone, before autograd is asked whether it says the same.
    weights: list[Tensor | None] = []
    explainer._explain_watched(images, lambda tail: weights.append(tail.head_weight("layer", without_hooks=True)))
    assert (weights[0] is not None) == (kind == "head")
    expected = Explainer(network, "layer", reshape=lambda y: y)(images, [0, 1])
    for _ in range(2):
        found, made_from = _kind(explainer, images, [0, 1], monkeypatch)
        torch.testing.assert_close(found.maps, expected.maps, **ROUNDING)
        assert made_from == kind


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_linear_heads_in_half_precision(dtype: torch.dtype, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Head(BARE["adaptive pooling"]).to(dtype).eval()
    images = network.images(dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = Explainer(network, "layer", reshape=lambda y: y)(images, MANY)
        found, kind = _kind(Explainer(network, "layer"), images, MANY, monkeypatch)
    assert kind == "head"
    assert (found.maps - expected.maps).abs().mean() < (0.03 if autocast or dtype == torch.bfloat16 else 1e-6)


HOOKED: dict[str, Forward] = {
    "hook on the pooled vector": lambda m, y: m.last(_hooked(y.mean((2, 3)), lambda p: p.register_hook(_double))),
    "hook before its shape changes": lambda m, y: m.last(
        _hooked(y.mean((2, 3), keepdim=True), lambda p: p.register_hook(_double)).flatten(1)
    ),
    "hook after its shape changes": lambda m, y: m.last(
        _hooked(y.mean((2, 3), keepdim=True).flatten(1), lambda p: p.register_hook(_double))
    ),
    "hook that another one replaced": lambda m, y: m.last(
        _hooked(y.mean((2, 3)), lambda p: (p.register_hook(_double), p.register_hook(lambda g: g)))
    ),
    "hook on what dropout hands on": lambda m, y: m.last(
        _hooked(m.drop(y.mean((2, 3))), lambda p: p.register_hook(_double))
    ),
}


@pytest.mark.parametrize("name", HOOKED)
def test_hooks_that_are_added_later_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Head(BARE["mean"]).double()
    images = network.images()
    explainer = Explainer(network, "layer")
    for _ in range(3):
        assert _kind(explainer, images, None, monkeypatch)[1] == "head"
    network.tail = HOOKED[name]
    expected = Explainer(network, "layer", reshape=lambda y: y, chunk_size=1)(images)
    for _ in range(2):
        found, kind = _kind(explainer, images, None, monkeypatch)
        torch.testing.assert_close(found.maps, expected.maps, **ROUNDING)
        assert kind == "pooled"


@pytest.mark.parametrize("hooked", [False, True])
def test_saved_tensors_that_are_unpacked_anew(hooked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # The tensor that a linear layer saved is then not the one that the hook is on.
    def tail(m: Head, y: Tensor) -> Tensor:
        pooled = y.mean((2, 3))
        if hooked:
            pooled.register_hook(_double)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), lambda t: t.clone()):
            return m.last(pooled)

    network = Head(BARE["mean"]).double()
    images = network.images()
    explainer = Explainer(network, "layer")
    explainer(images)
    network.tail = tail
    expected = Explainer(network, "layer", reshape=lambda y: y, chunk_size=1)(images)
    found, kind = _kind(explainer, images, None, monkeypatch)
    torch.testing.assert_close(found.maps, expected.maps, **ROUNDING)
    assert kind == "pooled"


def test_a_long_way_to_the_logits_is_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    def long(m: Head, y: Tensor) -> Tensor:
        y = y.mean((2, 3))
        for _ in range(100):
            y = y + 0.01
        return m.last(y)

    network = Head(long).double()
    _, kind = _kind(Explainer(network, "layer"), network.images(), None, monkeypatch)
    assert kind == "all positions"


def test_modules_with_backward_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Head(lambda m, y: m.last(m.pool(y).flatten(1))).double()
    network.pool = nn.AdaptiveAvgPool2d(1)
    network.pool.register_full_backward_hook(lambda module, inputs, outputs: _double_inputs(inputs, outputs))
    images = network.images()
    expected = Explainer(network, "layer", reshape=lambda y: y)(images)
    found, kind = _kind(Explainer(network, "layer"), images, None, monkeypatch)
    torch.testing.assert_close(found.maps, expected.maps)
    assert kind == "all positions"


def test_asking_nodes_for_hooks_leaves_none() -> None:
    network = Head(BARE["mean"]).double()
    nodes: list[Any] = []
    network.last.register_forward_hook(lambda module, inputs, output: nodes.append(output.grad_fn))
    Explainer(network, "layer")(network.images())
    handle = nodes[0].register_hook(lambda *gradients: None)
    assert len(handle.hooks_dict_ref()) == 1


def test_an_estimate_of_memory_counts_the_largest_gradient() -> None:
    y = torch.randn(2, 3, requires_grad=True)
    z = (y @ torch.randn(3, 100)).relu() @ torch.randn(100, 5)
    assert Tail(z, {}).bytes_per_target() == 3 * 2 * 100 * 4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "target",
    [
        LogitDifference(),
        LogitDifference("mean"),
        LogitDifference("max"),
        LogitDifference("expected", temperature=2.0),
        LogitDifference(top_k=3),
        LogitDifference("expected", top_k=2, temperature=0.5),
        LogitDifference(top_k=2, pairwise=True),
    ],
    ids=str,
)
def test_a_small_budget_changes_nothing(target: LogitDifference, method: str) -> None:
    network = Head(BARE["mean"]).double()
    images = network.images(3)
    expected = Explainer(network, "layer", method, target, reshape=lambda y: y)(images, MANY[:1] * 3)
    for budget in (1500, 10**9):
        found = Explainer(network, "layer", method, target, memory_budget=budget)(images, MANY[:1] * 3)
        torch.testing.assert_close(found.maps, expected.maps, **ROUNDING)
        torch.testing.assert_close(found.delta, expected.delta)
        if target.top_k is not None:
            assert torch.equal(found.rivals, expected.rivals)
