"""Guided back-propagation against captum's, and where captum's does not reach, against ReLUs written out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from diffcam_fast.saliency.gradients import gradient
from diffcam_fast.saliency.guided import guided_backpropagation
from tests.saliency.networks import CLASSES, Mixed, Plain, images, make


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_is_captums_on_a_plain_network(chunk_size: int) -> None:
    captum = pytest.importorskip("captum.attr", reason="captum is not installed: pip install 'diffcam_fast[saliency]'")
    model, given = make(Plain).eval(), images()
    classes = torch.tensor([[0, 3, 1], [4, 4, 2], [2, 0, 1]])
    found = guided_backpropagation(model, given, classes, chunk_size=chunk_size)
    for t in range(3):
        with pytest.warns(UserWarning, match="Setting backward hooks on ReLU"):
            expected = captum.GuidedBackprop(model).attribute(given.clone().requires_grad_(), classes[:, t])
        assert expected.abs().amax() > 1e-3
        assert torch.allclose(found.attributions[:, t], expected, rtol=0, atol=1e-14)


class _Guided(torch.autograd.Function):
    """The rule written out: values cut off outside 0 to `most`, only positive gradients where they were not."""

    @staticmethod
    def forward(ctx, x: Tensor, most: float) -> Tensor:
        ctx.save_for_backward((x > 0) & (x < most))
        return x.clamp(0, most)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return grad.relu() * inside, None


class Written(Mixed):
    """`Mixed` with the rule in the place of each ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        def relu(values: Tensor) -> Tensor:
            return _Guided.apply(values, torch.inf)

        x = relu(self.first(x - 0.1))
        y = _Guided.apply(relu(self.second(x) - 0.1) * 3, 6.0)
        y = relu(y - 0.2) + relu(y - 0.1) + _Guided.apply(y - 0.3, 6.0)
        y = y + functional.hardtanh(y) + functional.leaky_relu(y - 1)
        return self.head(relu(y).mean((2, 3)))


def test_every_form_of_relu_follows_the_rule_and_nothing_else_does() -> None:
    model, written, given = make(Mixed), make(Written), images()
    assert torch.allclose(model.eval()(given.clone()), written.eval()(given.clone()))
    for each in range(CLASSES):
        found = guided_backpropagation(model, given, each).attributions
        expected = gradient(written, given, each).attributions
        assert expected.abs().amax() > 1e-3
        assert torch.allclose(found, expected, rtol=0, atol=1e-13)
        assert not torch.allclose(found, gradient(model, given, each).attributions, rtol=0, atol=1e-4)


def test_the_gradient_is_plain_again_afterwards() -> None:
    model, given = make(Mixed), images()
    before = gradient(model, given, 1).attributions
    guided_backpropagation(model, given, 1)
    assert torch.equal(gradient(model, given, 1).attributions, before)


class Wrapped(nn.Module):
    """A plain network behind something."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.function = make(Plain), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.inner, x)


def _in_part(model: nn.Module, x: Tensor) -> Tensor:
    x = x * 1
    x[:, :1].relu_()
    return model(x)


def test_what_cannot_be_seen_is_refused() -> None:
    given = images()
    hidden = Wrapped(lambda model, x: checkpoint(model, x, use_reentrant=True))
    with pytest.raises(ValueError, match="cannot look into reentrant checkpoints"):
        guided_backpropagation(hidden, given, 1)
    with pytest.raises(ValueError, match="cannot look into an operation in place on a part of a tensor"):
        guided_backpropagation(Wrapped(_in_part), given, 1)
    seen = Wrapped(lambda model, x: checkpoint(model, x, use_reentrant=False))
    expected = guided_backpropagation(make(Plain), given, 1).attributions
    assert torch.equal(guided_backpropagation(seen, given, 1).attributions, expected)


def test_a_compiled_model_is_refused() -> None:
    torch._dynamo.reset()
    model = make(Plain)
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.raises(ValueError, match="cannot look into a compiled model; pass the model that was compiled"):
        guided_backpropagation(compiled, images(), 1)
    torch._dynamo.reset()


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.Hardtanh(), nn.LeakyReLU(), nn.Threshold(0.1, 0.0)])
def test_without_relu_it_is_not_defined(activation: nn.Module) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 11 * 9, 4), activation, nn.Linear(4, CLASSES)).double()
    with pytest.raises(ValueError, match=r"model: expected ReLU, ReLU6 or a clamp from 0 on .* found none"):
        guided_backpropagation(model, images())
