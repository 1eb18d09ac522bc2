"""How alike two saliency maps are: measures of whether a method tells classes apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffcam_fast.ops.arguments import check_number
from diffcam_fast.reference.cam import accumulation_dtype


def filter_similarity(a: Tensor, b: Tensor, *, threshold: float = 0.0) -> Tensor:
    """The share of values that are equal once both maps are binarised; 1 for maps that select the same.

    A map is read as a filter of its image. Values above `threshold` times the map's largest value are let through, so
    with the default the positive ones.

    Args:
        a: ``(N, *)``, such as ``(N, C, *S)`` or ``(N, *S)``: a map of each image; float32, float64, bfloat16 or
            float16.
        b: the same shape and device.
        threshold: a share of each map's largest value, from 0 to less than 1.

    Returns:
        ``(N,)`` from 0 to 1; float32, or float64 for float64 input. NaN where a map holds one.

    Raises:
        TypeError: an argument is not of the type above.
        ValueError: shapes or devices differ, there is nothing but a batch dimension or no value in a map, or a
            threshold out of range.
    """
    a, b = _pair(a, b)
    check_number("threshold", threshold)
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold: expected 0 to less than 1; got {threshold!r}")
    filters = [values > threshold * values.amax(1, keepdim=True).clamp_min(0) for values in (a, b)]
    share = (filters[0] == filters[1]).to(a.dtype).mean(1)
    return torch.where(a.isnan().any(1) | b.isnan().any(1), torch.nan, share)


def average_difference(a: Tensor, b: Tensor) -> Tensor:
    """How far the means of two maps are apart: ``|mean a - mean b| / max(mean a, mean b)``.

    Meant for maps without negative values, for which it is from 0 to 1; take their positive part before, if they have
    some. Means of either sign are divided by the larger magnitude. 0 for two maps with mean 0.

    Args:
        a: ``(N, *)``: a map of each image; float32, float64, bfloat16 or float16.
        b: the same shape and device.

    Returns:
        ``(N,)``; float32, or float64 for float64 input.

    Raises:
        TypeError: an argument is not a floating point tensor.
        ValueError: shapes or devices differ, or there is nothing but a batch dimension or no value in a map.
    """
    a, b = _pair(a, b)
    first, second = a.mean(1), b.mean(1)
    largest = torch.maximum(first.abs(), second.abs())
    return (first - second).abs() / torch.where(largest == 0, 1, largest)


def _pair(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    """Both as (N, values) in the dtype that sums are taken in."""
    for name, value in (("a", a), ("b", b)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor; got {type(value).__name__}")
        if not value.is_floating_point():
            raise TypeError(f"{name}: expected a floating point tensor; got {value.dtype}")
    if a.dim() < 2 or a[:1].numel() == 0 != a.shape[0]:
        raise ValueError(f"a: expected maps (N, ...) with values in them; got shape {tuple(a.shape)}")
    if b.shape != a.shape:
        raise ValueError(f"b: expected the shape of a, {tuple(a.shape)}; got {tuple(b.shape)}")
    if b.device != a.device:
        raise ValueError(f"b: expected the device of a, {a.device}; got {b.device}")
    dtype = accumulation_dtype(torch.promote_types(a.dtype, b.dtype))
    return a.to(dtype).flatten(1), b.to(dtype).flatten(1)
