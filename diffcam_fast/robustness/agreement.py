"""How alike two maps are: structural similarity, correlation, distance, and the overlap of what stands out.

Each function compares the maps of two batches pair by pair and returns one number a pair. What one map alone is like
is `diffcam_fast.robustness.hoax.map_entropy`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffcam_fast.ops.arguments import check_number, check_positive
from diffcam_fast.reference.cam import accumulation_dtype
from diffcam_fast.robustness.structural_similarity import structural_similarity


def ssim(first: Tensor, second: Tensor, *, data_range: float = 1.0) -> Tensor:
    """Structural similarity of maps (Wang et al. 2004): 1 for equal maps, around 0 for unrelated ones.

    Mean over all positions of a comparison of local means, variances and the covariance, in a Gaussian window of
    standard deviation 1.5 positions; at the border the map is reflected. Such a window is 11 positions wide. Where a
    side has fewer the window shrinks with the shorter side, to a standard deviation of ``1.5 * side / 11``, so that it
    spans about the map and not more: 0.95 positions and a width of 7 for a 7x7 map, 0.55 and 5 for 4x4.

    Args:
        first: ``(N, H, W)``, ``(N, T, H, W)``, or more dimensions before H and W; floating point.
        second: the same shape, or one that broadcasts to it, such as ``(H, W)``.
        data_range: from the least to the largest value that the maps could have; 1 for normalised maps.

    Returns:
        One number a map, ``(N,)`` or ``(N, T)``; float32, or float64 where both are float64.

    Raises:
        TypeError: not floating point tensors, or a range that is no number.
        ValueError: shapes that do not go together, or a range that is not positive.
    """
    first, second = _pairs(first, second)
    check_positive("data_range", data_range)
    shape = first.shape
    first, second = first.reshape(-1, *shape[-2:]), second.reshape(-1, *shape[-2:])
    return structural_similarity(first, second, float(data_range)).reshape(shape[:-2])


def pearson(first: Tensor, second: Tensor) -> Tensor:
    """Pearson's correlation of two maps over their positions, from -1 to 1.

    Args:
        first: as in `ssim`.
        second: as in `ssim`.

    Returns:
        One number a map; NaN where a map is constant, which correlates with nothing.

    Raises:
        TypeError, ValueError: as `ssim`.
    """
    first, second = (maps.flatten(-2) for maps in _pairs(first, second))
    # A constant map stays exactly constant: its mean need not be its value in floating point.
    varies = (first.amax(-1) > first.amin(-1)) & (second.amax(-1) > second.amin(-1))
    first, second = first - first.mean(-1, keepdim=True), second - second.mean(-1, keepdim=True)
    first = first / first.abs().amax(-1, keepdim=True)
    second = second / second.abs().amax(-1, keepdim=True)
    found = (first * second).sum(-1) / (first.norm(dim=-1) * second.norm(dim=-1))
    return torch.where(varies, found.clamp(-1, 1), torch.full_like(found, torch.nan))


def rmse(first: Tensor, second: Tensor) -> Tensor:
    """Root of the mean squared difference of two maps over their positions, in the maps' unit.

    Args:
        first: as in `ssim`.
        second: as in `ssim`.

    Returns:
        One number a map.

    Raises:
        TypeError, ValueError: as `ssim`.
    """
    first, second = _pairs(first, second)
    return (first - second).square().flatten(-2).mean(-1).sqrt()


def top_overlap(first: Tensor, second: Tensor, fraction: float = 0.1) -> Tensor:
    """The share of the positions that stand out most in one map that do so in the other, from 0 to 1.

    Args:
        first: as in `ssim`.
        second: as in `ssim`.
        fraction: of the positions, above 0 up to 1: the ``round(fraction * H * W)`` largest values of each map, one at
            least, ties to the earlier position.

    Returns:
        One number a map.

    Raises:
        TypeError, ValueError: as `ssim`, or a fraction out of range.
    """
    first, second = (maps.flatten(-2) for maps in _pairs(first, second))
    chosen = top_positions(first, fraction)
    return (chosen & top_positions(second, fraction)).sum(-1) / chosen.sum(-1).to(first.dtype)


def top_positions(values: Tensor, fraction: float) -> Tensor:
    """Where the largest values are, along the last dimension: the same shape, bool.

    Args:
        values: ``(..., S)``.
        fraction: as in `top_overlap`.

    Raises:
        TypeError: the fraction is no number.
        ValueError: it is out of range.
    """
    check_fraction(fraction)
    count = max(1, round(fraction * values.shape[-1]))
    order = values.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros_like(values, dtype=torch.bool).scatter(-1, order, True)


def check_fraction(fraction: Any) -> None:
    """Raise unless it is a number above 0 and up to 1."""
    check_number("fraction", fraction)
    if not 0 < float(fraction) <= 1:
        raise ValueError(f"fraction: expected a number above 0 and up to 1; got {fraction!r}")


def _pairs(first: Any, second: Any) -> tuple[Tensor, Tensor]:
    """Maps of one shape and dtype, to be compared pair by pair."""
    for name, maps in (("first", first), ("second", second)):
        if not isinstance(maps, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor; got {type(maps).__name__}")
        if not maps.is_floating_point():
            raise TypeError(f"{name}: expected a floating point tensor; got {maps.dtype}")
        if maps.dim() < 2 or maps.shape[-2:].numel() == 0:
            raise ValueError(f"{name}: expected shape (N, H, W) or (N, T, H, W); got {tuple(maps.shape)}")
    if first.shape[-2:] != second.shape[-2:]:
        raise ValueError(
            f"second: expected maps of the size of first, {tuple(first.shape[-2:])}; got {tuple(second.shape[-2:])}"
        )
    if first.device != second.device:
        raise ValueError(f"second: expected the device of first, {first.device}; got {second.device}")
    try:
        shape = torch.broadcast_shapes(first.shape, second.shape)
    except RuntimeError as error:
        raise ValueError(
            f"second: expected the shape of first, {tuple(first.shape)}, or one that broadcasts to it; "
            f"got {tuple(second.shape)}"
        ) from error
    both = torch.promote_types(accumulation_dtype(first.dtype), accumulation_dtype(second.dtype))
    dtype = both if first.dtype == second.dtype else torch.float32
    return first.to(dtype).expand(shape), second.to(dtype).expand(shape)
