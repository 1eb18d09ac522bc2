"""Integrated gradients against closed forms and sums by hand, and that the model is left as it was."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffcam_fast.explain import Finer, Logit, LogitDifference, LogProbability, Probability
from diffcam_fast.robustness.logit_shift import CornerSum, shift_logits
from diffcam_fast.saliency.integrated_gradients import QUADRATURES, integrated_gradients
from tests.explain.networks import PooledConvolutions, Residual, Signal, make
from tests.explain.oracle import SCORES
from tests.tolerances import CAPTUM_WEIGHTS as WEIGHTS

captum = pytest.importorskip("captum.attr", reason="captum is not installed: pip install 'diffcam_fast[saliency]'")


class Squares(nn.Module):
    """Logits ``sum w_k x^2``, whose integrated gradients from b are ``w_k (x^2 - b^2)`` value by value."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.weight = nn.Parameter(torch.randn(4, 3, 5, 6, generator=generator, dtype=torch.float64))

    def forward(self, images: Tensor) -> Tensor:
        return torch.einsum("nchw,kchw->nk", images.square(), self.weight)


def _images(count: int = 3) -> Tensor:
    return torch.rand(count, 3, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("baseline", [0.0, 0.25, "tensor"])
def test_closed_form(baseline: Any) -> None:
    network, images = Squares(), _images()
    start = torch.full_like(images[:1], 0.5).cumsum(2) / 5 if baseline == "tensor" else baseline
    found = integrated_gradients(network, images, [0, 3, 1], target=Logit(), baseline=start, steps=4)
    weight = network.weight.detach()[[0, 3, 1]]
    torch.testing.assert_close(found.attributions, weight * (images**2 - start**2), rtol=WEIGHTS, atol=WEIGHTS)
    torch.testing.assert_close(found.scores, (weight * images**2).sum((1, 2, 3)))
    torch.testing.assert_close(found.baseline_scores, (weight * (start + 0 * images) ** 2).sum((1, 2, 3)))
    assert found.completeness_error.abs().max() < 1e-5
    assert found.classes.tolist() == [0, 3, 1]


@pytest.mark.parametrize("name", SCORES)
def test_every_target_by_hand(name: str) -> None:
    network = make(PooledConvolutions)
    images = network.images(2)
    targets = {"logit": Logit(), "probability": Probability(), "log probability": LogProbability()}
    target = targets.get(name) or LogitDifference(name)
    total = torch.zeros_like(images)
    for step in range(8):
        points = (images * ((step + 0.5) / 8)).requires_grad_()
        value = sum(SCORES[name](logits, 2) for logits in network(points))
        total += torch.autograd.grad(value, points)[0] / 8
    found = integrated_gradients(network, images, 2, target=target, steps=8, quadrature="riemann_middle")
    torch.testing.assert_close(found.attributions, total * images, rtol=WEIGHTS, atol=1e-12)
    ends = [torch.stack([SCORES[name](row, 2) for row in network(points)]).detach() for points in (images, 0 * images)]
    torch.testing.assert_close(found.scores, ends[0])
    torch.testing.assert_close(found.baseline_scores, ends[1])
    error = found.attributions.sum((1, 2, 3)) - (ends[0] - ends[1])
    torch.testing.assert_close(found.completeness_error, error, rtol=0, atol=1e-12)


@pytest.mark.parametrize("quadrature", QUADRATURES)
def test_captum_called_directly(quadrature: str) -> None:
    network = make(Residual)
    images = network.images(2)
    theirs, delta = captum.IntegratedGradients(network).attribute(
        images, target=3, n_steps=7, method=quadrature, return_convergence_delta=True
    )
    found = integrated_gradients(network, images, 3, target=Logit(), steps=7, quadrature=quadrature)
    torch.testing.assert_close(found.attributions, theirs.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.completeness_error, delta, rtol=0, atol=1e-12)


def test_more_steps_are_more_complete() -> None:
    network = make(Residual)
    images = network.images(4)
    errors = [
        float(integrated_gradients(network, images, steps=steps, quadrature="riemann_middle").completeness_error.norm())
        for steps in (2, 8, 64)
    ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0


@pytest.mark.parametrize("batch_size", [1, 3, 7, 50])
def test_no_more_points_at_a_time_than_asked_for(batch_size: int) -> None:
    network = make(PooledConvolutions)
    images = network.images(5)
    expected = integrated_gradients(network, images, [[0, 1]] * 5, steps=6, batch_size=1000)
    sizes: list[int] = []
    with network.register_forward_hook(lambda module, inputs, output: sizes.append(len(output))):
        found = integrated_gradients(network, images, [[0, 1]] * 5, steps=6, batch_size=batch_size)
    assert max(sizes) <= batch_size
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_several_classes_an_image() -> None:
    network = make(PooledConvolutions)
    images = network.images(3)
    classes = torch.tensor([[0, 2], [1, 4], [3, 3]])
    found = integrated_gradients(network, images, classes, steps=5)
    assert found.attributions.shape == (3, 2, *images.shape[1:])
    assert found.completeness_error.shape == found.scores.shape == (3, 2)
    for index in range(2):
        alone = integrated_gradients(network, images, classes[:, index], steps=5)
        torch.testing.assert_close(found.attributions[:, index], alone.attributions, rtol=0, atol=1e-12)
    predicted = integrated_gradients(network, images, steps=5)
    assert torch.equal(predicted.classes, network(images).argmax(1))
    assert predicted.attributions.shape == images.shape


def test_signals_and_no_images() -> None:
    network = make(Signal)
    images = network.images(2)
    assert integrated_gradients(network, images, steps=3).attributions.shape == images.shape
    empty = integrated_gradients(network, images[:0], steps=3)
    assert empty.attributions.shape == images[:0].shape
    assert empty.completeness_error.shape == (0,)


def test_a_function_as_target() -> None:
    network = make(PooledConvolutions)
    images = network.images(2)
    one = integrated_gradients(network, images, 1, target=lambda z, c: z.softmax(1).gather(1, c), steps=5)
    two = integrated_gradients(network, images, 1, target=Probability(), steps=5)
    torch.testing.assert_close(one.attributions, two.attributions, rtol=0, atol=1e-12)


def test_differences_do_not_feel_shifted_logits() -> None:
    network = make(PooledConvolutions)
    images = network.images(2)
    shifted = shift_logits(network, "layer", CornerSum(1.0))
    for target in (
        *(LogitDifference(name) for name in ("logsumexp", "expected", "mean", "max")),
        Finer(),
        Probability(),
    ):
        one, two = (integrated_gradients(model, images, 1, target=target, steps=5) for model in (network, shifted))
        torch.testing.assert_close(one.attributions, two.attributions, rtol=0, atol=1e-10)
    one, two = (integrated_gradients(model, images, 1, target=Logit(), steps=5) for model in (network, shifted))
    assert (one.attributions - two.attributions).abs().max() > 0.1 * one.attributions.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    network = make(PooledConvolutions, dtype)
    images = network.images(3, dtype)
    found = integrated_gradients(network, images, 1, steps=20)
    assert found.attributions.dtype == found.completeness_error.dtype == torch.float32
    exact = integrated_gradients(network.float(), images.float(), 1, steps=20)
    # Rounding moves some points to the other side of a ReLU: single values differ by more than the whole.
    error = (found.attributions - exact.attributions).norm() / exact.attributions.norm()
    assert error < 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_leaves_no_trace(mode: Any) -> None:
    network = make(PooledConvolutions).train()
    network.head.weight.requires_grad_(False)
    network.head.bias.grad = torch.ones_like(network.head.bias)
    images = network.images(2)

    def state() -> list[Any]:
        return [
            [tensor.tolist() for tensor in (*network.state_dict().values(), images, torch.get_rng_state())],
            [None if p.grad is None else p.grad.tolist() for p in network.parameters()],
            [p.requires_grad for p in network.parameters()] + [images.requires_grad],
            [module.training for module in network.modules()],
            [len(module._forward_hooks) for module in network.modules()],
            torch.is_grad_enabled(),
        ]

    expected = integrated_gradients(network, images, steps=3)
    with mode():
        before = state()
        found = integrated_gradients(network, images.clone(), steps=3)
        assert state() == before
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert not found.attributions.requires_grad


class _InPlace(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.mul_(2.0))


def test_a_model_that_normalises_in_place() -> None:
    network = make(PooledConvolutions)
    images = network.images(2)
    before = images.clone()
    found = integrated_gradients(_InPlace(network), images, 1, steps=4)
    assert torch.equal(images, before)
    expected = integrated_gradients(network, 2 * images, 1, steps=4)
    torch.testing.assert_close(found.attributions, expected.attributions)


class _NoGradient(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.detach().flatten(1)[:, :4]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda n, x: integrated_gradients(len, x), TypeError, "model: expected a torch.nn.Module"),
        (lambda n, x: integrated_gradients(n, x.long()), TypeError, "images: expected a floating point tensor"),
        (lambda n, x: integrated_gradients(n, x, 4), ValueError, "classes: expected indices from 0 to 3"),
        (lambda n, x: integrated_gradients(n, x, [0]), ValueError, "classes: expected None, an integer, or"),
        (lambda n, x: integrated_gradients(n, x, target=Logit), TypeError, "target: expected an instance"),
        (
            lambda n, x: integrated_gradients(n, x, target=LogitDifference(top_k=2, pairwise=True)),
            ValueError,
            "target: expected one with one score a class",
        ),
        (lambda n, x: integrated_gradients(n, x, baseline="black"), TypeError, "baseline: expected a number or"),
        (lambda n, x: integrated_gradients(n, x, baseline=x[:2]), ValueError, r"baseline: .* got \(2, 3, 5, 6\)"),
        (lambda n, x: integrated_gradients(n, x, baseline=float("nan")), ValueError, "baseline: expected finite"),
        (lambda n, x: integrated_gradients(n, x, steps=1), ValueError, "steps: expected at least 2; got 1"),
        (lambda n, x: integrated_gradients(n, x, steps=2.0), TypeError, "steps: expected an integer; got float"),
        (lambda n, x: integrated_gradients(n, x, batch_size=0), ValueError, "batch_size: expected at least 1; got 0"),
        (lambda n, x: integrated_gradients(n, x, quadrature="simpson"), ValueError, "quadrature: expected one of"),
        (lambda n, x: integrated_gradients(_NoGradient(), x), ValueError, "model: .*depend on the images differentiab"),
        (lambda n, x: integrated_gradients(nn.Identity(), x), ValueError, "model: expected logits"),
    ],
)
def test_refusals(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(Squares(), _images())


def test_without_captum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(ImportError, match=r"pip install 'diffcam_fast\[saliency\]'"):
        integrated_gradients(Squares(), _images())
