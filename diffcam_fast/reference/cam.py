"""Class activation maps in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

METHODS = ("gradcam", "gradcam++", "xgradcam", "hirescam", "layercam", "elementwise")
NORMALIZATIONS = ("none", "max", "minmax")

PLUS_PLUS_EPS = 1e-6
XGRADCAM_EPS = 1e-7


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over inputs of `dtype` are taken: float64 for float64, float32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cam(activations: Tensor, gradients: Tensor, method: str, relu: bool, normalize: str, eps: float) -> Tensor:
    """Finished maps.

    Args:
        activations: (N, C, *S), one to three spatial dimensions.
        gradients: (N, T, C, *S), or (N, T, C) when they are the same at every position.
        method: one of `METHODS`.
        relu: whether negative evidence is set to zero.
        normalize: one of `NORMALIZATIONS`.
        eps: added to the denominator of the normalisation.

    Returns:
        Maps (N, T, *S), float32, or float64 for float64 input.
    """
    return finish(raw_cam(activations, gradients, method), relu, normalize, eps)


def raw_cam(activations: Tensor, gradients: Tensor, method: str) -> Tensor:
    """Maps before ReLU and normalisation, (N, T, *S). Arguments as in `cam`."""
    dtype = accumulation_dtype(activations.dtype)
    spatial = activations.shape[2:]
    a = activations.to(dtype).flatten(2).unsqueeze(1)
    g = gradients.to(dtype)
    g = g.unsqueeze(-1) if gradients.dim() == 3 else g.flatten(3)
    raw = _pool_over_channels(a, g, method)
    return raw.reshape(*raw.shape[:2], *spatial)


def _pool_over_channels(a: Tensor, g: Tensor, method: str) -> Tensor:
    # a (N, 1, C, S); g (N, T, C, S) or (N, T, C, 1), which broadcasts
    if method == "hirescam":
        return (g * a).sum(2)
    if method == "layercam":
        return (g.relu() * a).sum(2)
    if method == "elementwise":
        return (g * a).relu().sum(2)
    return (_channel_weights(a, g, method).unsqueeze(-1) * a).sum(2)


def _channel_weights(a: Tensor, g: Tensor, method: str) -> Tensor:
    # (N, T, C)
    if method == "gradcam":
        return g.mean(-1)
    if method == "xgradcam":
        return (g * a).sum(-1) / (a.sum(-1) + XGRADCAM_EPS)
    # gradcam++: Chattopadhay et al. 2018, equation 19, with the sum of activations outside as pytorch-grad-cam has it
    square = g * g
    denominator = 2 * square + a.sum(-1, keepdim=True) * square * g + PLUS_PLUS_EPS
    alpha = torch.where(g != 0, square / denominator, torch.zeros_like(g))
    return (alpha * g.relu()).expand(*g.shape[:-1], a.shape[-1]).sum(-1)


def cam_backward(
    grad_raw: Tensor,
    activations: Tensor,
    gradients: Tensor,
    method: str,
    for_activations: bool,
    for_gradients: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient of `raw_cam` with respect to activations and gradients, in closed form.

    Args:
        grad_raw: (N, T, *S), gradient of a scalar with respect to the raw maps.
        activations: as in `cam`.
        gradients: as in `cam`.
        method: one of `METHODS`.
        for_activations: whether the first result is wanted.
        for_gradients: whether the second result is wanted.

    Returns:
        Gradients with the shape, dtype and memory layout of activations and of gradients; empty, shape (0,), where not
        wanted.
    """
    dtype = accumulation_dtype(activations.dtype)
    a = activations.to(dtype).flatten(2).unsqueeze(1)
    constant = gradients.dim() == 3
    g = gradients.to(dtype)
    g = g.unsqueeze(-1).expand(*g.shape, a.shape[-1]) if constant else g.flatten(3)
    grad = grad_raw.to(dtype).flatten(2).unsqueeze(2)
    if method in ("gradcam", "gradcam++", "xgradcam"):
        grad_a, grad_g = _weighted_backward(grad, a, g, method)
    else:
        evidence = g if method == "layercam" else g * a
        counted = torch.ones_like(g) if method == "hirescam" else (evidence > 0).to(dtype)
        grad_a, grad_g = grad * g * counted, grad * a * counted
    grad_activations, grad_gradients = activations.new_empty(0), activations.new_empty(0)
    if for_activations:
        grad_activations = torch.empty_like(activations)
        grad_activations.copy_(grad_a.sum(1).reshape(activations.shape))
    if for_gradients:
        grad_g = grad_g.sum(-1) if constant else grad_g
        grad_gradients = torch.empty_like(gradients)
        grad_gradients.copy_(grad_g.reshape(gradients.shape))
    return grad_activations, grad_gradients


def _weighted_backward(grad: Tensor, a: Tensor, g: Tensor, method: str) -> tuple[Tensor, Tensor]:
    # grad (N, T, 1, S); both results (N, T, C, S)
    weights = _channel_weights(a, g, method).unsqueeze(-1)
    grad_weights = (grad * a).sum(-1, keepdim=True)
    grad_a = grad * weights
    if method == "gradcam":
        return grad_a, (grad_weights / max(a.shape[-1], 1)).expand_as(g)
    total = a.sum(-1, keepdim=True)
    if method == "xgradcam":
        divisor = total + XGRADCAM_EPS
        return grad_a + grad_weights * (g - weights) / divisor, grad_weights * a / divisor
    # gradcam++: where g > 0 the weight sums f = g^3 / d with d = 2 g^2 + (sum A) g^3 + eps, and elsewhere it is 0;
    # df/dg = (2 g^4 + 3 eps g^2) / d^2 and df/d(sum A) = -(g^3 / d)^2
    positive = g.relu()
    square = positive * positive
    divisor = 2 * square + total * square * positive + PLUS_PLUS_EPS
    slope = square * (2 * square + 3 * PLUS_PLUS_EPS) / divisor.square()
    by_total = -(square * positive / divisor).square().sum(-1, keepdim=True)
    return grad_a + grad_weights * by_total, grad_weights * slope


def finish(raw: Tensor, relu: bool, normalize: str, eps: float) -> Tensor:
    """ReLU and normalisation of raw maps (N, T, *S), each map by itself."""
    maps = raw.relu() if relu else raw
    if normalize == "none" or maps.numel() == 0:
        return maps.clone() if maps is raw else maps
    positions = tuple(range(2, maps.dim()))
    high = maps.amax(positions, keepdim=True)
    if normalize == "max":
        return maps / (high + eps)
    low = maps.amin(positions, keepdim=True)
    return (maps - low) / (high - low + eps)
