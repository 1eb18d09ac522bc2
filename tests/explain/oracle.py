"""Maps the long way: one image, one target, one formula at a time, in float64 and without hooks."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from diffcam_fast.explain import tokens_to_positions
from tests.explain.networks import Aliased, Tapped, Tokens

ScoreFunction = Callable[[Tensor, int], Tensor]


def rivals_of(logits: Tensor, chosen: int) -> Tensor:
    return torch.cat([logits[:chosen], logits[chosen + 1 :]])


SCORES: dict[str, ScoreFunction] = {
    "logit": lambda z, c: z[c],
    "probability": lambda z, c: z.softmax(0)[c],
    "log probability": lambda z, c: z.log_softmax(0)[c],
    "logsumexp": lambda z, c: z[c] - rivals_of(z, c).logsumexp(0),
    "mean": lambda z, c: z[c] - rivals_of(z, c).mean(),
    "max": lambda z, c: z[c] - rivals_of(z, c).max(),
}


def raw_map(activation: Tensor, gradient: Tensor, method: str) -> Tensor:
    """One map from activation and gradient (C, *S)."""
    a, g = activation.flatten(1), gradient.flatten(1)
    if method == "hirescam":
        raw = (g * a).sum(0)
    elif method == "layercam":
        raw = (g.relu() * a).sum(0)
    elif method == "elementwise":
        raw = (g * a).relu().sum(0)
    else:
        if method == "gradcam":
            weights = g.mean(1)
        elif method == "xgradcam":
            weights = (g * a).sum(1) / (a.sum(1) + 1e-7)
        else:
            alpha = g**2 / (2 * g**2 + a.sum(1, keepdim=True) * g**3 + 1e-6)
            weights = (alpha * g.relu()).sum(1)
        raw = sum(weight * channel for weight, channel in zip(weights, a, strict=True))
    return raw.reshape(activation.shape[1:])


def normalized(values: Tensor) -> Tensor:
    return (values - values.min()) / (values.max() - values.min() + 1e-7)


def resized(values: Tensor, size: tuple[int, ...]) -> Tensor:
    mode = ("linear", "bilinear", "trilinear")[len(size) - 1]
    return functional.interpolate(values[None, None], size, mode=mode, align_corners=False)[0, 0]


def maps(
    network: Tapped,
    images: Tensor,
    classes: Tensor,
    layers: tuple[str, ...],
    method: str = "gradcam",
    score: ScoreFunction = SCORES["logsumexp"],
    size: tuple[int, ...] | None = None,
) -> Tensor:
    """Maps (N, T, *size), of several layers their mean; float64."""
    network = copy.deepcopy(network).double().eval()
    size = tuple(images.shape[2:]) if size is None else size
    if isinstance(network, Aliased):
        network._oracle = True
    outputs: dict[str, Tensor] = {}

    def tap(name: str, output: Tensor) -> Tensor:
        outputs[name] = output
        return output.clone()

    network.tap = tap
    rows = []
    for image, chosen in zip(images.double(), classes.tolist(), strict=True):
        for index in chosen:
            with torch.enable_grad():
                total = score(network(image[None])[0], index)
                gradients = torch.autograd.grad(total, [outputs[name] for name in layers])
            fused = torch.zeros(size, dtype=torch.float64)
            for name, gradient in zip(layers, gradients, strict=True):
                activation = outputs[name].detach()
                if isinstance(network, Tokens):
                    activation, gradient = tokens_to_positions()(activation), tokens_to_positions()(gradient)
                single = normalized(raw_map(activation[0], gradient[0], method).relu())
                if single.shape != size:
                    single = normalized(resized(single, size))
                fused += single / len(layers)
            rows.append(fused if len(layers) == 1 else normalized(fused))
    return torch.stack(rows).reshape(*classes.shape, *size)
