"""The passes after the first: at the cost of inference, the same maps, and every exception noticed."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from diffcam_fast.explain import Explainer, tokens_to_positions
from tests.explain.networks import NETWORKS, PooledConvolutions, Residual, Tapped, Tokens, make
from tests.explain.test_side_effects import SURROUNDINGS, _unchanged


class Model(nn.Module):
    """A stem, the layer, and what the test makes of them."""

    def __init__(self, forward: Callable[[Model, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.stem, self.layer = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(4, 5)
        self._forward = forward
        self.forwards = 0
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        return self._forward(self, x)


def _images() -> Tensor:
    return torch.randn(2, 3, 8, 8)


def _differentiated(x: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(leaf.sin().sum(), leaf)
    return gradient


# What works with a trunk in inference mode as it is.
PLAIN: dict[str, Callable[[Model, Tensor], Tensor]] = {
    "straight on": lambda m, x: m.head(m.layer(m.stem(x)).mean((2, 3))),
    "sum of a skip connection": lambda m, x: m.head((m.layer(y := m.stem(x)) + y).relu().mean((2, 3))),
    "in-place sum of a skip connection": lambda m, x: m.head(m.layer(y := m.stem(x)).add_(y).relu_().mean((2, 3))),
    "concatenation": lambda m, x: m.head(m.norm(torch.cat([m.layer(y := m.stem(x)), y], 1)).mean((2, 3))[:, :4]),
    "a layer that hands its input on": lambda m, x: m.head(m.drop(m.stem(x)).sin().mean((2, 3))),
}
# What needs an ordinary trunk.
SPECIAL: dict[str, Callable[[Model, Tensor], Tensor]] = {
    "product with a trunk tensor": lambda m, x: m.head((m.layer(y := m.stem(x)) * y).mean((2, 3))),
    "trunk tensor convolved": lambda m, x: m.head((m.layer(y := m.stem(x)) + m.layer2(y)).mean((2, 3))),
    "trunk tensor changed in place": lambda m, x: m.head((m.layer(y := m.stem(x)).sin() + y.mul_(2)).mean((2, 3))),
    "differentiates before the layer": lambda m, x: m.head(m.layer(m.stem(_differentiated(x))).mean((2, 3))),
    "differentiates functionally before the layer": lambda m, x: m.head(
        m.layer(m.stem(torch.func.grad(lambda v: v.sin().sum())(x))).mean((2, 3))
    ),
}


def _make(forward: Callable[[Model, Tensor], Tensor]) -> Model:
    model = Model(forward)
    model.drop = nn.Dropout(0.5)
    model.layer2 = nn.Conv2d(4, 4, 1)
    return model.eval()


@pytest.mark.parametrize("name", [*PLAIN, *SPECIAL])
@pytest.mark.parametrize("surroundings", SURROUNDINGS)
def test_later_passes_give_the_same(name: str, surroundings: str) -> None:
    model, images = _make({**PLAIN, **SPECIAL}[name]), _images()
    layer = "drop" if "hands its input on" in name else "layer"
    explainer = Explainer(model, layer)
    seen: list[bool] = []
    model.stem.register_forward_hook(lambda module, inputs, output: seen.append(output.is_inference()))
    with SURROUNDINGS[surroundings]():
        images = images.clone()  # in inference mode an inference tensor
        first = explainer(images, [[0, 1]] * 2)
        for _ in range(3):
            with _unchanged(model):
                again = explainer(images, [[0, 1]] * 2)
            assert torch.equal(again.logits, first.logits)
            torch.testing.assert_close(again.maps, first.maps)
    if name in PLAIN:
        assert (model.forwards, seen) == (4, [False, True, True, True])
    else:  # tried once, done again, and not tried any more
        assert model.forwards == 5
        assert seen[-3:] == [False, False, False]


@pytest.mark.parametrize("kind", NETWORKS)
def test_later_passes_of_every_network(kind: type[Tapped]) -> None:
    network = make(kind)
    images = network.images()
    reshape = tokens_to_positions() if kind is Tokens else None
    explainer = Explainer(network, network.layers, "layercam", reshape=reshape)
    first = explainer(images, [[0, 1, 2]] * 2)
    for _ in range(2):
        with _unchanged(network):
            again = explainer(images, [[0, 1, 2]] * 2)
        for name, maps in first.layer_maps.items():
            torch.testing.assert_close(again.layer_maps[name], maps, msg=name)


def test_outputs_that_stay_as_they_are_are_not_copied() -> None:
    model, images = _make(PLAIN["straight on"]), _images()
    explainer = Explainer(model, "layer")
    addresses: list[int] = []
    model.layer.register_forward_hook(lambda module, inputs, output: addresses.append(output.data_ptr()))
    received: list[int] = []

    def forward(m: Model, x: Tensor) -> Tensor:
        received.append((y := m.layer(m.stem(x))).data_ptr())
        return m.head(y.mean((2, 3)))

    model._forward = forward
    for _ in range(3):
        explainer(images)
    assert addresses[0] != received[0]
    assert addresses[1:] == received[1:]


def _in_place(tail: Callable[[Model, Tensor, Tensor], Tensor]) -> Model:
    """A model whose layer puts out the memory of its input, which the tail has, too."""
    model = _make(lambda m, x: tail(m, y := m.stem(x), m.rectifier(y)))
    model.rectifier = nn.ReLU(inplace=True)
    return model


def test_outputs_of_layers_that_work_in_place_are_not_copied() -> None:
    received: list[int] = []
    model, images = _in_place(lambda m, x, y: received.append(y.data_ptr()) or m.head(y.sin().mean((2, 3)))), _images()
    explainer = Explainer(model, "rectifier")
    addresses: list[int] = []
    model.rectifier.register_forward_hook(lambda module, inputs, output: addresses.append(output.data_ptr()))
    maps = [explainer(images).maps for _ in range(3)]
    assert addresses[0] != received[0]
    assert addresses[1:] == received[1:]
    torch.testing.assert_close(maps[1:], maps[:1] * 2)


@pytest.mark.parametrize("images", [_images(), None], ids=["trunk", "no trunk"])
@pytest.mark.parametrize("learned", [False, True])
def test_outputs_that_are_changed_as_the_layers_input(images: Tensor | None, learned: bool) -> None:
    def changing(m: Model, x: Tensor, y: Tensor) -> Tensor:
        z = y.sin().mean((2, 3))
        with torch.no_grad():
            x.mul_(2)
        return m.head(z)

    model = _in_place(lambda m, x, y: m.head(y.sin().mean((2, 3))))
    if images is None:
        images, model.stem = torch.randn(2, 4, 8, 8), nn.Identity()
    explainer = Explainer(model, "rectifier")
    expected = explainer(images.clone())
    if not learned:
        explainer = Explainer(model, "rectifier")
    tail = model._forward
    model._forward = lambda m, x: changing(m, y := m.stem(x), m.rectifier(y))
    for _ in range(3):
        torch.testing.assert_close(explainer(images.clone()).maps, expected.maps)
    model._forward = tail


def test_outputs_that_are_changed_later_on_after_all() -> None:
    model, images = _make(lambda m, x: m.head(m.layer(m.stem(x)).sin().mean((2, 3)))), _images()
    explainer = Explainer(model, ["layer", "stem"])
    explainer(images)
    explainer(images)
    model._forward = lambda m, x: m.head(functional.relu_(m.layer(m.stem(x).tanh_())).mean((2, 3)))
    expected = Explainer(copy.deepcopy(model), ["layer", "stem"])(images)
    for _ in range(3):
        found = explainer(images)
        for name in ("layer", "stem"):
            torch.testing.assert_close(found.layer_maps[name], expected.layer_maps[name])


def test_random_numbers_are_drawn_once_although_a_pass_is_done_again() -> None:
    def noisy(m: Model, x: Tensor) -> Tensor:
        y = functional.dropout(m.stem(x), 0.5)
        return m.head((m.layer(y) * y).mean((2, 3)))

    model, images = _make(noisy), _images()
    explainer = Explainer(model, "layer")
    explainer(images)
    torch.manual_seed(7)
    found = explainer(images)  # fails with an inference trunk, and is done again
    after = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(found.logits, model(images))
    assert torch.equal(after, torch.rand(1))


def test_what_the_model_keeps_for_itself_can_be_trained_with() -> None:
    def caching(m: Model, x: Tensor) -> Tensor:
        if x.shape not in m.tables:
            m.tables[x.shape] = torch.linspace(0, 1, x.shape[-1])
        return m.head(m.layer(m.stem(x) * m.tables[x.shape]).mean((2, 3)))

    model = _make(caching)
    model.tables = {}
    explainer = Explainer(model, "layer")
    for images in (_images(), torch.randn(2, 3, 10, 10)):
        for _ in range(2):
            explainer(images)
        model(images).sum().backward()


def test_genuine_errors_are_reported_as_they_are() -> None:
    model, images = _make(PLAIN["straight on"]), _images()
    explainer = Explainer(model, "layer")
    explainer(images)

    def broken(m: Model, x: Tensor) -> Tensor:
        m.layer(m.stem(x))
        raise RuntimeError("out of luck")

    model._forward = broken
    with pytest.raises(RuntimeError, match="out of luck"):
        explainer(images)
    model._forward = PLAIN["straight on"]
    seen: list[bool] = []
    model.stem.register_forward_hook(lambda module, inputs, output: seen.append(output.is_inference()))
    explainer(images)
    assert seen == [True]


def test_a_head_that_turns_out_not_to_be_linear_any_more() -> None:
    network = make(PooledConvolutions)
    images, classes = network.images(), [[0, 1, 2]] * 2
    explainer = Explainer(network, "layer", "layercam")
    for _ in range(2):
        explainer(images, classes)
    network.head = nn.Sequential(network.head, nn.Tanh())
    expected = Explainer(network, "layer", "layercam", reshape=lambda y: y)(images, classes)
    torch.testing.assert_close(explainer(images, classes).maps, expected.maps)


def test_weights_may_change_between_passes() -> None:
    network = make(PooledConvolutions)
    images, classes = network.images(), [[0, 1, 2]] * 2
    explainer = Explainer(network, "layer", "layercam")
    for _ in range(2):
        explainer(images, classes)
    with torch.no_grad():
        network.head.weight.normal_()
    expected = Explainer(network, "layer", "layercam")(images, classes)
    assert torch.equal(explainer(images, classes).maps, expected.maps)


def test_nothing_is_kept_between_calls() -> None:
    network = make(Residual)
    explainer = Explainer(network, network.layers)
    kept: list[Any] = []
    for module in network.modules():
        module.register_forward_hook(lambda module, inputs, output: kept.append(weakref.ref(output)))
    gc.collect()
    gc.disable()
    try:
        for _ in range(4):
            explainer(network.images(), [[0, 1, 2]] * 2).maps.sum()
            assert [reference() for reference in kept] == [None] * len(kept)
    finally:
        gc.enable()
