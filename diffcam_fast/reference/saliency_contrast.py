"""Contrast of saliency maps in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from diffcam_fast.reference.cam import accumulation_dtype


def saliency_contrast(saliency: Tensor, rivals: Tensor, per_channel: bool) -> Tensor:
    """What a class's saliency has more of than each rival's, both at energy 1.

    Args:
        saliency: (N, C, *S), one to three spatial dimensions.
        rivals: (N, T, C, *S).
        per_channel: whether each channel has an energy of its own, or all of a map have one.

    Returns:
        (N, T, C, *S), contiguous; float32, or float64 for float64 input.
    """
    dtype = accumulation_dtype(saliency.dtype)
    own, _ = at_unit_energy(saliency.to(dtype), 1, per_channel)
    others, _ = at_unit_energy(rivals.to(dtype), 2, per_channel)
    return (own.unsqueeze(1) - others).relu().contiguous()


def at_unit_energy(values: Tensor, channel: int, per_channel: bool) -> tuple[Tensor, Tensor]:
    """Values divided by their energy, the Euclidean norm, and that energy; values of energy 0 stay as they are.

    Args:
        values: dimension `channel` holds channels, those after it positions.
        channel: which dimension that is.
        per_channel: whether each channel has an energy of its own.

    Returns:
        Values of the same shape, and energies that broadcast with them. Where a value is not finite, neither is any
        that shares its energy.
    """
    axes = tuple(range(channel + 1 if per_channel else channel, values.dim()))
    if values.numel() == 0:
        return values, values.sum(axes, keepdim=True)
    # Squares of what is very large or very small would leave the range of the dtype.
    largest = values.abs().amax(axes, keepdim=True)
    scaled = values / torch.where(largest == 0, 1, largest)
    energy = scaled.square().sum(axes, keepdim=True).sqrt()
    return scaled / torch.where(energy == 0, 1, energy), energy * largest


def saliency_contrast_backward(
    grad: Tensor,
    contrast: Tensor,
    saliency: Tensor,
    rivals: Tensor,
    per_channel: bool,
    for_saliency: bool,
    for_rivals: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradient of `saliency_contrast` with respect to both maps, in closed form.

    Args:
        grad: (N, T, C, *S), gradient of a scalar with respect to the contrast.
        contrast: what `saliency_contrast` returned.
        saliency: as in `saliency_contrast`.
        rivals: as in `saliency_contrast`.
        per_channel: as in `saliency_contrast`.
        for_saliency: whether the first result is wanted.
        for_rivals: whether the second result is wanted.

    Returns:
        Gradients of the shape and dtype of saliency and of rivals; None where not wanted. Zero where an energy is 0.
    """
    dtype = accumulation_dtype(saliency.dtype)
    passed = grad.to(dtype) * (contrast > 0)
    grad_saliency, grad_rivals = None, None
    if for_saliency:
        grad_saliency = _through_energy(passed.sum(1), saliency.to(dtype), 1, per_channel).to(saliency.dtype)
    if for_rivals:
        grad_rivals = _through_energy(-passed, rivals.to(dtype), 2, per_channel).to(rivals.dtype)
    return grad_saliency, grad_rivals


def _through_energy(grad: Tensor, values: Tensor, channel: int, per_channel: bool) -> Tensor:
    # u = s / |s|: ds = (du - u <u, du>) / |s|
    unit, energy = at_unit_energy(values, channel, per_channel)
    axes = tuple(range(channel + 1 if per_channel else channel, values.dim()))
    across = grad - unit * (unit * grad).sum(axes, keepdim=True)
    return torch.where(energy == 0, 0, across / torch.where(energy == 0, 1, energy))
