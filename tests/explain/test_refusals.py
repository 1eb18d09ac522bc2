"""Arguments and models that `Explainer` refuses, and what it says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffcam_fast.explain import Explainer, Logit
from tests.explain.networks import Branches, InPlaceAfter, PooledConvolutions, Signal, Tokens, make


class TestRefusedArguments:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"method": "gradcam+++"}, ValueError, "method: expected one of gradcam, .*; got 'gradcam\\+\\+\\+'"),
            ({"normalize": "none"}, ValueError, "normalize: expected None, 'max' or 'minmax'; got 'none'"),
            ({"size": "output"}, ValueError, "size: expected 'input', None or a tuple of integers; got 'output'"),
            ({"size": (3.5, 2)}, TypeError, "size: expected a tuple of integers"),
            ({"size": (0, 2)}, ValueError, "size: expected one to three positive integers"),
            ({"size": 7}, TypeError, "size: expected a tuple of integers; got 7"),
            ({"reshape": 3}, TypeError, "reshape: expected a function or None; got int"),
            ({"chunk_size": 0}, ValueError, "chunk_size: expected at least 1; got 0"),
            ({"chunk_size": 2.0}, TypeError, "chunk_size: expected an integer or None; got float"),
            ({"memory_budget": 0}, ValueError, "memory_budget: expected a positive number of bytes; got 0"),
            ({"memory_budget": 1e9}, TypeError, "memory_budget: expected an integer; got float"),
            ({"target": "logsumexp"}, TypeError, "target: expected LogitDifference, .* or a function"),
            ({"target": Logit}, TypeError, "target: expected an instance; got the class Logit; write Logit()"),
        ],
        ids=str,
    )
    def test_options(self, options: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            Explainer(make(InPlaceAfter), "layer", **options)

    def test_model(self) -> None:
        with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module; got function"):
            Explainer(lambda x: x)

    @pytest.mark.parametrize(
        ("images", "error", "message"),
        [
            (np.zeros((1, 3, 12, 10)), TypeError, "images: expected a torch.Tensor; got ndarray"),
            (torch.zeros(1, 3, 12, 10, dtype=torch.uint8), TypeError, "images: expected a floating point tensor"),
            (torch.zeros(12, 10), ValueError, r"images: expected a batch \(N, C, \*S\).*got shape \(12, 10\)"),
        ],
        ids=["array", "integers", "no channels"],
    )
    def test_images(self, images: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            Explainer(make(PooledConvolutions, torch.float32), "layer")(images)

    def test_cuda_graphs_of_other_devices(self) -> None:
        network = make(PooledConvolutions, torch.float32)
        with pytest.raises(ValueError, match=r"example: expected images on a CUDA device.*got images on cpu"):
            Explainer(network, "layer").capture(network.images(dtype=torch.float32))
        with pytest.raises(TypeError, match=r"images: expected a torch.Tensor"):
            Explainer(network, "layer").capture("images")

    def test_sizes_of_other_dimensions(self) -> None:
        network = make(Tokens)
        with pytest.raises(ValueError, match=r"layer 'layer' has 1 dimensions .* pass reshape="):
            Explainer(network, "layer")(network.images())
        with pytest.raises(ValueError, match=r"cannot be resized to \(3, 3\)"):
            Explainer(make(Signal), "layer", size=(3, 3))(make(Signal).images())


class Returns(nn.Module):
    """Passes the images through a layer, and what came out through a function."""

    def __init__(self, function: Callable[[Tensor], Any], layer: nn.Module | None = None) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3) if layer is None else layer
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.layer(x))


class TestRefusedModels:
    @pytest.mark.parametrize(
        ("function", "message"),
        [
            (lambda y: (y.mean((2, 3)),), "model: expected it to return logits .*; got tuple; wrap the model"),
            (lambda y: y.mean(3), r"model: expected logits of shape \(2, K\).*got shape \(2, 4, 10\)"),
            (lambda y: y.mean((0, 2, 3)), r"got shape \(4,\)"),
            (lambda y: y.mean((2, 3))[:1], r"got shape \(1, 4\)"),
            (lambda y: y.mean((1, 2, 3))[:, None], r"K at least 2.*got shape \(2, 1\)"),
            (lambda y: y.mean((2, 3)).long(), "model: expected floating point logits; got torch.int64"),
            (lambda y: y.detach().mean((2, 3)), "the logits do not depend differentiably on 'layer'"),
            (lambda y: torch.zeros(2, 4), "the logits do not depend differentiably on 'layer'"),
        ],
    )
    def test_outputs(self, function: Callable[[Tensor], Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Explainer(Returns(function), "layer")(torch.randn(2, 3, 12, 12))

    def test_images_without_batch_dimension(self) -> None:
        with pytest.raises(ValueError, match=r"logits of shape \(3, K\).*with a batch dimension.*got shape \(4,\)"):
            Explainer(Returns(lambda y: y.mean((-1, -2))), "layer")(torch.randn(3, 12, 12))

    def test_gradients_switched_off_in_the_tail(self) -> None:
        def tail(y: Tensor) -> Tensor:
            with torch.no_grad():
                return y.mean((2, 3))

        with pytest.raises(ValueError, match="switches gradients off"):
            Explainer(Returns(tail), "layer")(torch.randn(2, 3, 12, 12))

    def test_a_layer_beside_the_way_to_the_logits(self) -> None:
        network = make(Branches)
        network.forward = lambda x: network.head(
            torch.cat([network.left(network.stem(x)).mean((2, 3)), 0 * x[:, :, 0, 0]], 1)
            + 0 * network.right(network.stem(x)).detach().mean()
        )
        with pytest.raises(ValueError, match="the logits do not depend on layer 'right'"):
            Explainer(network, ["left", "right"])(network.images())
