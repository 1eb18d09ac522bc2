"""From a layer's values and gradients to captum's attributions."""

from __future__ import annotations

import torch
from torch import Tensor

from diffcam_fast.compat.captum.refusals import InvalidValue
from diffcam_fast.explain.evaluation import autocast_dtype
from diffcam_fast.ops.cam import cam
from diffcam_fast.reference.cam import accumulation_dtype


def fused(values: Tensor, gradients: Tensor, *, several: bool, relu: bool) -> Tensor:
    """Grad-CAM by our kernel; nothing in it is recorded.

    Args:
        values: ``(N, C, *S)``.
        gradients: ``(N, C, *S)``, or ``(N, T, C, *S)`` for T targets an example.
        several: whether the gradients are those of T targets.
        relu: set negative evidence to zero.

    Returns:
        ``(N, 1, *S)`` or ``(N, T, *S)``, in the dtype of the values; where autocast adds up in a wider one, in that.

    Raises:
        InvalidValue: the values have no channels.
    """
    _check_channels(values)
    positions = values.shape[2:]
    if not 1 <= len(positions) <= 3:
        values = values.reshape(*values.shape[:2], positions.numel())
        gradients = gradients.reshape(*gradients.shape[: 2 + several], positions.numel())
    maps = cam(values, gradients, "gradcam", relu=relu, normalize=None)
    if not several:
        maps = maps.unsqueeze(1)
    if maps.shape[2:] != positions:
        maps = maps.reshape(*maps.shape[:2], *positions)
    return maps.to(_dtype_of_sums(values))


def stepwise(values: Tensor, gradients: Tensor, *, several: bool, relu: bool, summed: bool, narrow: bool) -> Tensor:
    """The same by operators that autograd can differentiate any number of times.

    Args:
        values: as for `fused`, or of any shape.
        gradients: as for `fused`, or what broadcasts with the values.
        several: as for `fused`.
        relu: as for `fused`.
        summed: add up channels.
        narrow: half precision adds up in half precision.

    Returns:
        As `fused`; without summation ``(N, C, *S)`` or ``(N, T, C, *S)``.

    Raises:
        InvalidValue: there are no channels to add up.
    """
    if summed:
        _check_channels(values)
    dtype = _dtype_of_sums(values) if summed else values.dtype
    if not narrow:
        wide = accumulation_dtype(values.dtype)
        values, gradients = values.to(wide), gradients.to(wide)
    positions = tuple(range(2 + several, gradients.dim()))
    weights = gradients.mean(positions, keepdim=True) if positions else gradients
    attributions = weights * (values.unsqueeze(1) if several else values)
    if summed:
        attributions = attributions.sum(2) if several else attributions.sum(1, keepdim=True)
    return (attributions.relu() if relu else attributions).to(dtype)


def _check_channels(values: Tensor) -> None:
    if values.dim() < 2:
        raise InvalidValue(f"layer: expected tensors (N, C, *positions); got shape {tuple(values.shape)}")


def _dtype_of_sums(values: Tensor) -> torch.dtype:
    if autocast_dtype(values.device.type) is None:
        return values.dtype
    return values.new_empty(0).sum().dtype
