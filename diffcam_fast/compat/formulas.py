"""The formulas of class activation maps, where libraries differ with their choices as parameters.

`diffcam_fast.cam` is the fused form of the default choices. This is for what needs the parts: weights by themselves,
activations before they are pooled, and the choices of others.
"""

from __future__ import annotations

import torch
from torch import Tensor

WEIGHTING = ("gradcam", "gradcam++", "xgradcam")
"""Methods that have a weight for each channel."""


def channel_weights(
    activations: Tensor,
    gradients: Tensor,
    method: str,
    *,
    eps: float | None = None,
    activations_outside: bool = True,
    positive_only: bool = False,
) -> Tensor:
    """Weights of channels.

    Args:
        activations: ``(N, C, *S)``, float32 or float64.
        gradients: ``(N, C, *S)``.
        method: one of `WEIGHTING`.
        eps: added to the denominators of gradcam++ (None: 1e-6) and xgradcam (None: 1e-7).
        activations_outside: in the denominator of gradcam++ (Chattopadhay et al. 2018, equation 19), ``(sum A) G^3``
            as pytorch-grad-cam has it; otherwise ``sum(A G^3)``, as in torchcam.
        positive_only: gradcam++ counts positions where the gradient's square exceeds 0, as rounded; the two are the
            same but for gradients so small that their squares vanish.

    Returns:
        ``(N, C)``.

    Raises:
        ValueError: another method.
    """
    if method not in WEIGHTING:
        raise ValueError(f"method: expected one of {', '.join(WEIGHTING)}; got {method!r}")
    a, g = activations.flatten(2), gradients.flatten(2)
    if method == "gradcam":
        return g.mean(2)
    total = a.sum(2, keepdim=True)
    if method == "xgradcam":
        return (g * a / (total + (1e-7 if eps is None else eps))).sum(2)
    square = g * g
    cube = square * g
    weighed = total * cube if activations_outside else (a * cube).sum(2, keepdim=True)
    alpha = square / (2 * square + weighed + (1e-6 if eps is None else eps))
    counted = square > 0 if positive_only else g != 0
    return (torch.where(counted, alpha, 0) * g.relu()).sum(2)


def weighted_activations(activations: Tensor, gradients: Tensor, method: str) -> Tensor:
    """Activations times what the method weights them with, ``(N, C, *S)``: maps are their sum over channels.

    Args:
        activations: ``(N, C, *S)``.
        gradients: ``(N, C, *S)``.
        method: one of those of `diffcam_fast.cam`.
    """
    if method in WEIGHTING:
        weights = channel_weights(activations, gradients, method)
        return activations * weights.reshape(*weights.shape, *(1 for _ in activations.shape[2:]))
    if method == "hirescam":
        return gradients * activations
    if method == "layercam":
        return gradients.relu() * activations
    if method == "elementwise":
        return (gradients * activations).relu()
    raise ValueError(f"method: expected a method of diffcam_fast.cam; got {method!r}")


def weighted_difference(logits: Tensor, classes: Tensor, others: Tensor, alpha: Tensor, eps: float = 1e-9) -> Tensor:
    """Gradient of FinerCAM's target for given classes of comparison, in closed form (Zhang et al. 2025).

    The target is ``sum_i p_i (z_c - alpha z_i) / (sum_i p_i + eps)`` with the softmax ``p``, not detached.

    Args:
        logits: ``(N, K)``, float32 or float64.
        classes: ``(N, T)``, int64.
        others: ``(N, T, R)``, int64.
        alpha: ``(N, T)``.
        eps: see above.

    Returns:
        ``(N, T, K)``.
    """
    everything = (*classes.shape, logits.shape[1])
    picked = torch.cat([classes.unsqueeze(2), others], 2)
    z = logits.unsqueeze(1).expand(everything).gather(2, picked)
    p = logits.softmax(1).unsqueeze(1)
    weights = p.expand(everything).gather(2, others)
    alpha = alpha.unsqueeze(2)
    # Differences first: logits may be large.
    differences = z[:, :, :1] - z[:, :, 1:] + (1 - alpha) * z[:, :, 1:]
    total = weights.sum(2, keepdim=True)
    divisor = total + eps
    score = (weights * differences).sum(2, keepdim=True) / divisor
    factors = torch.cat([total, weights * (differences - alpha - score)], 2) / divisor
    return (score * (-eps) / divisor * p).scatter_add_(2, picked, factors)
