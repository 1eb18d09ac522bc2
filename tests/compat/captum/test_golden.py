"""Attributions of our LayerGradCam against those of the installed original."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffcam_fast.compat.captum import LayerGradCam
from diffcam_fast.compat.originals import original
from diffcam_fast.models import load_efficientnet_lite0
from tests.compat.networks import Flat, Pooled, Tokens, Volume, images, make
from tests.tolerances import COMPAT_SHARE_OF_RANGE

pytest.importorskip("captum")
Original = original("captum", "attr").LayerGradCam


def assert_same(found: Any, expected: Any, bound: float = COMPAT_SHARE_OF_RANGE) -> None:
    assert type(found) is type(expected)
    if isinstance(found, tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other, bound)
        return
    assert found.shape == expected.shape and found.dtype == expected.dtype and found.device == expected.device
    expected = expected.detach()
    extent = float(expected.max() - expected.min() if expected.numel() > 1 else expected.abs())
    # A map of zeros would agree with anything.
    assert extent > 0
    assert float((found.detach() - expected).abs().max()) <= bound * extent


def compare(function: Any, layer: nn.Module, inputs: Any, *args: Any, **options: Any) -> None:
    expected = Original(function, layer).attribute(inputs, *args, **options)
    ours = LayerGradCam(function, layer)
    for _ in range(2):
        assert_same(ours.attribute(inputs, *args, **options), expected)
    strict = LayerGradCam(function, layer, strict=True).attribute(inputs, *args, **options)
    assert_same(strict, expected)
    one, other = (each[0] if isinstance(each, tuple) else each for each in (strict, expected))
    assert one.requires_grad == other.requires_grad


@pytest.mark.parametrize("options", ({}, {"relu_attributions": True}, {"attr_dim_summation": False}))
@pytest.mark.parametrize("count", (1, 3))
@pytest.mark.parametrize("kind", (Flat, Pooled, Volume, Tokens))
def test_networks(kind: type[nn.Module], count: int, options: dict[str, bool]) -> None:
    model = make(kind)
    compare(model, model.late, images(kind, count), 4, **options)
    if not options.get("relu_attributions"):
        compare(model, model.head, images(kind, count), 4, **options)


@pytest.mark.parametrize("summed", (False, True))
@pytest.mark.parametrize("kind", (Flat, Volume))
def test_float64(kind: type[nn.Module], summed: bool) -> None:
    model = make(kind, torch.float64)
    compare(model, model.late, images(kind, dtype=torch.float64), 4, attr_dim_summation=summed)


@pytest.mark.parametrize(
    "target",
    (
        4,
        -1,
        (2,),
        torch.tensor(3),
        torch.tensor([3]),
        torch.tensor([[3]]),
        torch.tensor([4, 0, 6]),
        torch.tensor([4, 0, 6], dtype=torch.int32),
        [4, 0, 6],
        [(4,), (0,), (-1,)],
    ),
    ids=str,
)
def test_targets(target: Any) -> None:
    model = make(Flat)
    compare(model, model.late, images(Flat), target)


@pytest.mark.parametrize("target", ((1, 3), (-1, 0), (slice(1, 2), 3), [(0, 1), (1, 2), (1, 6)]), ids=str)
def test_targets_of_outputs_with_more_dimensions(target: Any) -> None:
    model = make(Flat)
    compare(lambda x: torch.stack([model(x), model(x).tanh()], 1), model.late, images(Flat), target)


def test_outputs_that_need_no_target() -> None:
    model, x = make(Flat), images(Flat)
    compare(lambda x: model(x).amax(1), model.late, x)
    compare(lambda x: model(x).amax(1, keepdim=True), model.late, x)
    compare(lambda x: model(x).amax(1, keepdim=True), model.late, x, 0)
    compare(lambda: model(x), model.late, None, 2)
    compare(partial(torch.nn.Module.__call__, model), model.late, x, 2)
    compare(model.forward, model.late, x, 2)


@pytest.mark.parametrize("summed", (False, True))
@pytest.mark.parametrize("kind", (Flat, Pooled, Volume, Tokens))
def test_inputs_of_the_layer(kind: type[nn.Module], summed: bool) -> None:
    model = make(kind)
    # Through a layer norm, the mean of a token's gradient vanishes.
    for layer in (model.last if kind is Tokens else model.late, model.head):
        compare(model, layer, images(kind), 4, attribute_to_layer_input=True, attr_dim_summation=summed)


class _Residual(nn.Module):
    """Layers whose inputs are used elsewhere, too: before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.same, self.relu = nn.Identity(), nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        earlier = x.tanh()
        product = self.inner(x) * x
        return self.head((self.relu(self.same(product) + earlier) * product * x).mean((2, 3)))


@pytest.mark.parametrize("layer", ("first", "inner", "same", "relu", "head"))
@pytest.mark.parametrize("of_input", (False, True))
def test_inputs_that_are_used_elsewhere(layer: str, of_input: bool) -> None:
    torch.manual_seed(0)
    model = _Residual()
    compare(model, model.get_submodule(layer), torch.randn(2, 3, 8, 8), 3, attribute_to_layer_input=of_input)


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.step, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + self.step(x).tanh()
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("of_input", (False, True))
def test_the_last_of_several_calls(of_input: bool) -> None:
    torch.manual_seed(0)
    model = _Recurrent()
    compare(model, model.step, torch.randn(2, 3, 8, 8), 3, attribute_to_layer_input=of_input)


class _Split(nn.Module):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.kind((x * y, (x + y).flatten(2)))


class _Several(nn.Module):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.first, self.split, self.head = nn.Conv2d(3, 4, 3), _Split(kind), nn.Linear(4, 5)

    def forward(self, x: Tensor, y: Tensor, factor: Any = 1.0, *, shift: float = 0.0) -> Tensor:
        one, other = self.split(self.first(x), self.first(y))
        return self.head(one.mean((2, 3)) * other.amax(2) * factor + shift)


@pytest.mark.parametrize("options", ({}, {"attribute_to_layer_input": True}, {"attr_dim_summation": False}))
@pytest.mark.parametrize("kind", (tuple, list))
def test_layers_of_several_tensors(kind: type, options: dict[str, bool]) -> None:
    torch.manual_seed(0)
    model, x, y = _Several(kind), torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    compare(model, model.split, (x, y), 3, **options)
    compare(model, model.split, x, 3, (y, 2.0), **options)
    compare(model, model.split, (x,), torch.tensor([3, 1]), y, **options)
    compare(model, model.split, (x, y), 3, torch.rand(2, 1), **options)


def test_layers_of_one_tensor_in_a_tuple() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.LSTM(10, 3), nn.Identity())
    x = torch.randn(2, 2, 12)
    # What an LSTM puts out is nested: only the first of it is a tensor.
    compare(lambda x: model[1](model[0](x))[0].sum(2), model[0], x, 1)
    compare(lambda x: model[2]([model[1](model[0](x))[0]])[0].sum(2), model[2], x, 1)


def test_layers_of_many_dimensions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Unflatten(2, (2, 3)), nn.Unflatten(1, (2, 3)), nn.Flatten())
    model.append(nn.Linear(6 * 36, 4))
    for layer in model[:3]:
        compare(model, layer, torch.randn(2, 3, 8, 8), 1)


@pytest.mark.parametrize(
    "options",
    (
        {"retain_graph": True},
        {"create_graph": True},
        {"allow_unused": True},
        {"materialize_grads": True},
        {"grad_outputs": (torch.tensor(2.0), torch.tensor(-1.0))},
        {"grad_outputs": (torch.ones(3), torch.rand(3)), "is_grads_batched": True},
    ),
    ids=lambda options: ",".join(options),
)
@pytest.mark.parametrize("summed", (False, True))
def test_grad_kwargs(options: dict[str, Any], summed: bool) -> None:
    model = make(Flat)
    compare(model, model.late, images(Flat, 2), 4, attr_dim_summation=summed, grad_kwargs=options)


def test_second_derivatives() -> None:
    model, x = make(Flat), images(Flat)

    def penalty(cam: Any) -> list[Tensor]:
        attributions = cam(model, model.late).attribute(x, 4, grad_kwargs={"create_graph": True})
        return list(torch.autograd.grad(attributions.square().sum(), list(model.parameters()), allow_unused=True))

    for found, expected in zip(penalty(LayerGradCam), penalty(Original), strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_training_mode() -> None:
    model, x = make(Pooled).train(), images(Pooled)

    def seeded(cam: Any) -> Tensor:
        torch.manual_seed(0)
        return cam(model, model.late).attribute(x, 4)

    assert_same(seeded(LayerGradCam), seeded(Original))
    # A layer whose output is memory of its input takes a second attempt, which draws the same random numbers.
    model.late = nn.Sequential(model.late, nn.Dropout2d(0.4), nn.ReLU(inplace=True))
    layer = model.late[-1]

    def again(cam: Any) -> Tensor:
        torch.manual_seed(0)
        return cam(model, layer).attribute(x, 4)

    assert_same(again(LayerGradCam), again(Original))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision(dtype: torch.dtype) -> None:
    model, x = make(Flat), images(Flat)
    expected = LayerGradCam(model, model.late).attribute(x, 4)
    model.to(dtype)
    for cam in (Original, LayerGradCam, partial(LayerGradCam, strict=True)):
        found = cam(model, model.late).attribute(x.to(dtype), 4)
        assert found.dtype == dtype
        assert (found - expected).abs().max() < 0.1 * (expected.max() - expected.min())


@pytest.mark.parametrize("summed", (False, True))
def test_autocast(summed: bool) -> None:
    model, x = make(Flat), images(Flat)
    with torch.autocast("cpu", torch.bfloat16):
        expected = Original(model, model.late[1]).attribute(x, 4, attr_dim_summation=summed)
        found = LayerGradCam(model, model.late[1]).attribute(x, 4, attr_dim_summation=summed)
    assert found.dtype == expected.dtype
    assert (found - expected).abs().max() <= 2**-6 * expected.abs().max()


def test_wrapped_models() -> None:
    model, x = make(Flat), images(Flat)
    compare(nn.DataParallel(model), model.late, x, 4)
    compare(torch.compile(model, backend="eager"), model.late, x, 4)
    model.compile(backend="eager")
    compare(model, model.late, x, 4)


def test_interpolation() -> None:
    maps = torch.randn(2, 1, 4, 5)
    for size, mode in (((8, 9), "nearest"), (7, "nearest"), ((8, 9), "bilinear"), ((3, 4), "area")):
        assert torch.equal(
            LayerGradCam.interpolate(maps, size, mode), Original.interpolate(maps, size, interpolate_mode=mode)
        )
    assert torch.equal(LayerGradCam.interpolate(maps, (8, 9)), Original.interpolate(maps, (8, 9)))


@pytest.fixture(scope="module")
def real() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return load_efficientnet_lite0(), torch.randn(2, 3, 64, 64)


@pytest.mark.parametrize("layer", ("head_activation", "_conv_head"))
def test_real_weights(layer: str, real: tuple[nn.Module, Tensor]) -> None:
    model, x = real
    compare(model, model.get_submodule(layer), x, [281, 3])
