"""`Explainer.compile`: the same explanations from one compiled graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffcam_fast.explain import Explainer, Explanation, Finer, Logit, LogitDifference, tokens_to_positions
from diffcam_fast.reference.cam import METHODS
from tests.explain.networks import NETWORKS, InPlaceAfter, PooledConvolutions, Residual, Tapped, Tokens, make
from tests.explain.test_side_effects import _unchanged
from tests.tolerances import PEER_SHARE_OF_RANGE

# Traces and decomposes as for inductor, and then runs PyTorch's operators: no C++ compiler, seconds instead of minutes.
BACKEND = "aot_eager"


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def _explainer(network: Tapped, **options: Any) -> Explainer:
    reshape = tokens_to_positions() if isinstance(network, Tokens) else None
    return Explainer(network, options.pop("layers", network.layers), reshape=reshape, **options)


def _same(found: Explanation, expected: Explanation) -> None:
    assert found.layers == expected.layers
    torch.testing.assert_close(found.maps, expected.maps, rtol=0, atol=PEER_SHARE_OF_RANGE)
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.delta, expected.delta)
    assert torch.equal(found.classes, expected.classes)
    assert (found.rivals is None) == (expected.rivals is None)
    if expected.rivals is not None:
        assert torch.equal(found.rivals, expected.rivals)


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_network(kind: type[Tapped]) -> None:
    network = make(kind)
    images = network.images()
    explainer = _explainer(network, method="layercam")
    compiled = explainer.compile(backend=BACKEND)
    for classes in (None, [[0, 1, 2]] * 2):
        with _unchanged(network):
            found = compiled(images, classes)
        _same(found, explainer(images, classes))


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str) -> None:
    network = make(PooledConvolutions)
    images = network.images()
    explainer = _explainer(network, method=method)
    _same(explainer.compile(backend=BACKEND)(images, [[0, 1]] * 2), explainer(images, [[0, 1]] * 2))


@pytest.mark.parametrize(
    "target",
    [
        LogitDifference("expected", top_k=2),
        LogitDifference(top_k=2, pairwise=True),
        Finer(),
        Logit(),
        lambda z, c: z.log_softmax(1).gather(1, c),
    ],
    ids=["top k", "pairwise", "finer", "logit", "function"],
)
def test_every_target(target: Any) -> None:
    network = make(InPlaceAfter)
    images = network.images()
    explainer = _explainer(network, target=target, chunk_size=2)
    compiled = explainer.compile(backend=BACKEND)
    for classes in (3, [[0, 1, 2]] * 2):
        _same(compiled(images, classes), explainer(images, classes))


def test_other_images_and_other_weights() -> None:
    network = make(Residual).train()
    explainer = _explainer(network)
    compiled = explainer.compile(backend=BACKEND, dynamic=False)
    for shape in ((2, 3, 12, 10), (3, 3, 12, 10), (2, 3, 16, 10)):
        images = torch.randn(shape, dtype=torch.float64)
        _same(compiled(images), explainer(images))
    with torch.no_grad():
        network.head.weight.normal_()
    _same(compiled(images), explainer(images))
    assert network.training
    assert compiled(images[:0]).maps.shape == (0, 1, 16, 10)


def test_inductor_and_autocast() -> None:
    network = make(PooledConvolutions, torch.float32)
    images = network.images(dtype=torch.float32)
    explainer = Explainer(network)
    compiled = explainer.compile()
    _same(compiled(images), explainer(images))
    with torch.inference_mode():
        _same(compiled(images.clone()), explainer(images))
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = compiled(images), explainer(images)
    assert found.logits.dtype == torch.bfloat16
    assert (found.maps - expected.maps).abs().mean() < 0.03


def test_errors_come_from_the_eager_pass() -> None:
    network = make(PooledConvolutions)
    compiled = Explainer(network, "layer").compile(backend=BACKEND)
    with pytest.raises(ValueError, match="classes: expected indices from 0 to 4"):
        compiled(network.images(), 5)
    with pytest.raises(TypeError, match=r"images: expected a torch.Tensor"):
        compiled([1, 2])
    with pytest.raises(TypeError, match="fullgraph: an explanation is compiled as one graph"):
        Explainer(network, "layer").compile(fullgraph=False)


class Printing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        torch._dynamo.graph_break()
        return y.mean((2, 3))


def test_a_model_that_is_no_single_graph() -> None:
    with pytest.raises(RuntimeError, match="cannot turn this model's explanation into one graph"):
        Explainer(Printing(), "layer").compile(backend=BACKEND)(torch.randn(2, 3, 8, 8))


def test_a_model_that_goes_around_its_modules() -> None:
    network = make(PooledConvolutions)
    network.forward = lambda x: network.head(network.layer(network.early(x)).mean((2, 3)))
    with pytest.raises(RuntimeError, match="cannot turn this model's explanation into one graph"):
        Explainer(network, "layer").compile(backend=BACKEND)(network.images())
