"""Gradients and gradients times the input against autograd, and that nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffcam_fast.explain import LogitDifference, Probability
from diffcam_fast.saliency.gradients import Saliency, gradient, gradient_times_input
from diffcam_fast.saliency.guided import guided_backpropagation
from tests.saliency.networks import CLASSES, Mixed, Plain, assert_same, images, make, state

METHODS = (gradient, gradient_times_input, guided_backpropagation)
Method = Callable[..., Saliency]


def _by_autograd(model: nn.Module, given: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
    leaf = given.clone().requires_grad_()
    (found,) = torch.autograd.grad(score(model.eval()(leaf * 1)).sum(), leaf)
    return found


@pytest.mark.parametrize("kind", [Plain, Mixed])
@pytest.mark.parametrize("chunk_size", [1, 2, 9])
def test_is_the_gradient_of_each_class(kind: type[nn.Module], chunk_size: int) -> None:
    model, given = make(kind), images()
    classes = torch.tensor([[0, 3, 1], [4, 4, 2], [2, 0, 1]])
    found = gradient(model, given, classes, chunk_size=chunk_size)
    product = gradient_times_input(model, given, classes, chunk_size=chunk_size)
    logits = model.eval()(given.clone())
    for t in range(3):
        expected = _by_autograd(model, given, lambda z, t=t: z.gather(1, classes[:, t : t + 1]))
        assert torch.allclose(found.attributions[:, t], expected, rtol=0, atol=1e-14)
        assert torch.allclose(product.attributions[:, t], expected * given, rtol=0, atol=1e-14)
    assert torch.equal(found.classes, classes)
    assert torch.allclose(found.scores, logits.gather(1, classes))


@pytest.mark.parametrize("method", METHODS)
def test_forms_of_classes(method: Method) -> None:
    model, given = make(Plain), images()
    predicted = model.eval()(given.clone()).argmax(1)
    by_default = method(model, given)
    assert by_default.attributions.shape == given.shape and by_default.scores.shape == (3,)
    assert torch.equal(by_default.classes, predicted)
    assert torch.equal(method(model, given, predicted.tolist()).attributions, by_default.attributions)
    assert torch.equal(method(model, given, predicted[:, None]).attributions[:, 0], by_default.attributions)
    assert method(model, given, 2).classes.tolist() == [2, 2, 2]
    for image in range(3):
        alone = method(model, given[image : image + 1])
        assert torch.allclose(alone.attributions[0], by_default.attributions[image], rtol=0, atol=1e-13)


def test_targets() -> None:
    model, given = make(Plain), images()
    found = gradient(model, given, 1, target=Probability()).attributions
    assert torch.allclose(found, _by_autograd(model, given, lambda z: z.softmax(1)[:, 1]), rtol=0, atol=1e-14)
    found = gradient(model, given, 1, target=lambda logits, classes: 2 * logits.gather(1, classes)).attributions
    assert torch.allclose(found, _by_autograd(model, given, lambda z: 2 * z[:, 1]), rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match="target: expected one with one score a class"):
        gradient(model, given, 1, target=LogitDifference(top_k=2, pairwise=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [Plain, Mixed])
def test_model_images_and_random_numbers_stay_as_they_are(method: Method, kind: type[nn.Module]) -> None:
    model, given = make(kind), images()
    next(model.parameters()).grad = torch.ones(1, dtype=torch.float64).expand_as(next(model.parameters()))
    next(model.parameters()).requires_grad_(False)
    before, pixels = state(model), given.clone()
    first = method(model, given, [[0, 1], [1, 2], [2, 3]])
    assert_same(state(model), before)
    assert torch.equal(given, pixels) and not given.requires_grad
    assert not first.attributions.requires_grad
    with torch.inference_mode():
        found = method(model, images(), [[0, 1], [1, 2], [2, 3]]).attributions
    with torch.no_grad():
        assert torch.equal(method(model, given, [[0, 1], [1, 2], [2, 3]]).attributions, found)
    assert torch.equal(found, first.attributions)
    with pytest.raises(ValueError, match="classes"):
        method(model, given, CLASSES)
    assert_same(state(model), before)


@pytest.mark.parametrize("method", METHODS)
def test_dtypes(method: Method) -> None:
    exact = method(make(Plain), images(), 1).attributions
    for dtype in (torch.float32, torch.bfloat16):
        found = method(make(Plain, dtype), images(dtype=dtype), 1).attributions
        assert found.dtype == torch.float32
        allowed = 1e-5 if dtype == torch.float32 else 0.02
        assert (found.double() - exact).abs().amax() <= allowed * exact.abs().amax()
    assert exact.dtype == torch.float64


@pytest.mark.parametrize("method", METHODS)
def test_no_images(method: Method) -> None:
    found = method(make(Plain), images(0), torch.zeros(0, 2, dtype=torch.int64))
    assert found.attributions.shape == (0, 2, 3, 11, 9)


class Detached(nn.Module):
    """Its logits do not depend on the images."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * torch.ones(len(x), 1)).relu()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((None, images()), {}, TypeError, "model: expected a torch.nn.Module; got NoneType"),
        ((make(Plain), [1]), {}, TypeError, "images: expected a torch.Tensor; got list"),
        ((make(Plain), images()[0, 0]), {}, ValueError, "images: expected a batch"),
        ((make(Plain), images(), [0, 1]), {}, ValueError, "classes: expected"),
        ((make(Plain), images(), 0.5), {}, TypeError, "classes: expected integers"),
        ((make(Plain), images()), {"chunk_size": 0}, ValueError, "chunk_size: expected at least 1; got 0"),
        ((make(Plain), images()), {"chunk_size": 1.5}, TypeError, "chunk_size: expected an integer; got float"),
        ((make(Plain), images()), {"target": 3}, TypeError, "target"),
        ((nn.Flatten(2), images()), {}, ValueError, r"model: expected logits of shape \(3, K\)"),
        ((Detached(), images()), {}, ValueError, "model: expected logits that depend on the images differentiably"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_wrong_arguments_are_named(
    method: Method, arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        method(*arguments, **options)
