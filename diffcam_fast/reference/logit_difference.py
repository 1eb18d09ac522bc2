"""Logit differences and their cotangents in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffcam_fast.reference.cam import accumulation_dtype

BASELINES = ("max", "mean", "logsumexp", "expected", "finer")
TEMPERED = ("logsumexp", "expected")

FINER_EPS = 1e-9


def logit_difference(
    logits: Tensor,
    classes: Tensor,
    baseline: str,
    top_k: int,
    temperature: float,
    alpha: float,
    ranks: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Difference between a class's logit and its rivals', and its gradient with respect to the logits.

    Everything is written in differences to the strongest rival, so that nothing is lost where a network adds
    the same large number to all its logits. All results but the rivals are differentiable in the logits.

    Args:
        logits: (N, K), K at least 2.
        classes: (N, T), int64, each in [0, K).
        baseline: one of `BASELINES`.
        top_k: how many of the strongest rivals the baseline folds; 0: all of them. 0 for "finer".
        temperature: positive; of "logsumexp" and "expected".
        alpha: factor of the rivals' logits in "finer".
        ranks: of "finer": which of the nearest classes are compared, 1 = nearest, each in [1, K - 1].

    Returns:
        delta (N, T); cotangent (N, T, K); rivals (N, T, k), int64; differences to those rivals (N, T, k), with
        k the number of ranks or top_k. float32, or float64 for float64 logits.
    """
    z = logits.to(accumulation_dtype(logits.dtype))
    chosen = z.gather(1, classes)
    if baseline == "finer":
        return _finer(z, classes, chosen, alpha, ranks)

    if baseline == "max" or top_k > 0:
        order = z.sort(dim=-1, descending=True, stable=True).indices.unsqueeze(1)
        rivals = _first_rivals(order, classes, max(top_k, 1))
    else:
        rivals = _all_rivals(classes, z.shape[-1])
    rival_logits = _at(z, rivals)

    if baseline == "max":
        members = rivals[..., :1]
        delta = chosen - rival_logits[..., 0]
        derivative = torch.ones_like(rival_logits[..., :1])
    else:
        members = rivals
        strongest = rival_logits.detach().amax(-1, keepdim=True)
        value, derivative = _fold(rival_logits - strongest, baseline, temperature)
        delta = (chosen - strongest.squeeze(-1)) - value

    cotangent = z.new_zeros((*classes.shape, z.shape[-1]))
    cotangent = cotangent.scatter(-1, members, -derivative)
    cotangent = cotangent.scatter(-1, classes.unsqueeze(-1), 1.0)

    reported = rivals[..., :top_k].clone()
    differences = chosen.unsqueeze(-1) - rival_logits[..., :top_k]
    return delta, cotangent, reported, differences


def _fold(centred: Tensor, baseline: str, temperature: float) -> tuple[Tensor, Tensor]:
    """The baseline of logits (N, T, J) less their maximum, (N, T), and its gradient (N, T, J)."""
    if baseline == "mean":
        return centred.mean(-1), torch.full_like(centred, 1 / centred.shape[-1])
    weights = torch.softmax(centred / temperature, -1)
    if baseline == "logsumexp":
        return temperature * torch.logsumexp(centred / temperature, -1), weights
    # expected: a logit of minus infinity has no weight, and must not turn the sum into NaN
    centred = torch.where(weights > 0, centred, torch.zeros_like(centred))
    value = (weights * centred).sum(-1)
    return value, weights * (1 + (centred - value.unsqueeze(-1)) / temperature)


def _finer(
    z: Tensor, classes: Tensor, chosen: Tensor, alpha: float, ranks: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """FinerCAM's target (Zhang et al. 2025) as pytorch-grad-cam defines it, the softmax not detached."""
    order = (z.detach().unsqueeze(1) - chosen.detach().unsqueeze(-1)).abs().sort(dim=-1, stable=True).indices
    nearest = _first_rivals(order, classes, max(ranks))
    # A stack of slices, not an index tensor: a copy from the host would have to wait for the device.
    rivals = torch.stack([nearest[..., rank - 1] for rank in ranks], -1)

    rival_logits = _at(z, rivals)
    probabilities = torch.softmax(z, -1)
    weights = _at(probabilities, rivals)
    contrasts = chosen.unsqueeze(-1) - alpha * rival_logits
    total = weights.sum(-1)
    delta = (weights * contrasts).sum(-1) / (total + FINER_EPS)

    scale = (1 / (total + FINER_EPS)).unsqueeze(-1)
    cotangent = -FINER_EPS * (delta.unsqueeze(-1) * scale) * probabilities.unsqueeze(1)
    cotangent = cotangent.scatter_add(-1, rivals, scale * weights * (contrasts - alpha - delta.unsqueeze(-1)))
    cotangent = cotangent.scatter_add(-1, classes.unsqueeze(-1), scale * total.unsqueeze(-1))
    return delta, cotangent, rivals, chosen.unsqueeze(-1) - rival_logits


def _first_rivals(order: Tensor, classes: Tensor, count: int) -> Tensor:
    """The first `count` classes of an order (N, 1 or T, K) that are not the class itself, (N, T, count)."""
    place = (order == classes.unsqueeze(-1)).int().argmax(-1, keepdim=True)
    positions = torch.arange(count, device=classes.device)
    return _along(order, positions + (positions >= place))


def _all_rivals(classes: Tensor, count: int) -> Tensor:
    """All classes but the class itself in ascending order, (N, T, count - 1)."""
    positions = torch.arange(count - 1, device=classes.device)
    return positions + (positions >= classes.unsqueeze(-1))


def _at(values: Tensor, indices: Tensor) -> Tensor:
    """values[n, indices[n, t, j]] of values (N, K), as (N, T, J)."""
    return _along(values.unsqueeze(1), indices)


def _along(values: Tensor, indices: Tensor) -> Tensor:
    return values.expand(-1, indices.shape[1], -1).gather(-1, indices)
