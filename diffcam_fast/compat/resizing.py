"""Maps at another size, as other libraries interpolate them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


def resize(maps: Tensor, size: Sequence[int], *, zero_beyond: bool = False) -> Tensor:
    """Resized maps: linear in one and two dimensions, corners not aligned; cubic splines through the corners in three.

    Two dimensions are as in OpenCV's `resize`, three as in SciPy's `ndimage.zoom`.

    Args:
        maps: ``(N, T, *S)``, float32 or float64.
        size: as many lengths as S has.
        zero_beyond: three dimensions only: SciPy puts zeros where rounding takes a position beyond the last one, at
            the far faces of some volumes. True: as there; False: it is the last one.

    Returns:
        ``(N, T, *size)``.

    Raises:
        ValueError: another number of lengths.
    """
    if len(size) != maps.dim() - 2 or not 1 <= len(size) <= 3:
        raise ValueError(f"size: expected {maps.dim() - 2} lengths for maps {tuple(maps.shape)}; got {tuple(size)}")
    if len(size) < 3:
        mode = "bilinear" if len(size) == 2 else "linear"
        return functional.interpolate(maps, tuple(size), mode=mode, align_corners=False)
    for axis, length in enumerate(size, 2):
        matrix = torch.from_numpy(_spline_matrix(maps.shape[axis], length, zero_beyond)).to(maps.device, maps.dtype)
        maps = torch.movedim(torch.movedim(maps, axis, -1) @ matrix.T, -1, axis)
    return maps


@lru_cache(maxsize=64)
def _spline_matrix(length: int, wanted: int, zero_beyond: bool) -> np.ndarray:
    """(wanted, length): interpolation by cubic B-splines, mirrored at both ends."""
    if length == 1:
        return np.ones((wanted, 1))
    # B-splines take the values 1/6, 4/6, 1/6 at the positions: coefficients that reproduce the samples.
    samples = np.zeros((length, length))
    for position in range(length):
        for shift, value in ((-1, 1 / 6), (0, 4 / 6), (1, 1 / 6)):
            samples[position, _mirrored(position + shift, length)] += value
    step = (length - 1) / (wanted - 1) if wanted > 1 else 1.0
    curve = np.zeros((wanted, length))
    for place in range(wanted):
        wished = place * step
        if wished > length - 1 and zero_beyond:
            continue
        reached = min(wished, length - 1)
        for knot in range(math.floor(reached) - 1, math.floor(reached) + 3):
            curve[place, _mirrored(knot, length)] += _cubic(abs(reached - knot))
    return curve @ np.linalg.inv(samples)


def _mirrored(index: int, length: int) -> int:
    index = abs(index) % (2 * length - 2)
    return min(index, 2 * length - 2 - index)


def _cubic(distance: float) -> float:
    if distance < 1:
        return (4 - 6 * distance**2 + 3 * distance**3) / 6
    return max(2 - distance, 0.0) ** 3 / 6
