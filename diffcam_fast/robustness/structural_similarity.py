"""Structural similarity of many small maps at a time, as matrix products."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

_SIGMA = 1.5
"""Standard deviation of the window in positions (Wang et al. 2004)."""

_WIDTH = 11
"""Width of that window: maps with fewer positions a side get a smaller one."""

_CUTOFF = 3.5
"""Where the window ends, in its standard deviations."""

_VALUES_AT_A_TIME = 2**16
"""Of one map's kind, so that all that is made of them stays in a processor's cache."""


def structural_similarity(first: Tensor, second: Tensor, data_range: float = 1.0) -> Tensor:
    """Mean structural similarity of maps, pair by pair (Wang et al., IEEE Transactions on Image Processing, 2004).

    The same measure as `diffcam_fast.robustness.agreement.ssim`: Gaussian window of 1.5 positions, smaller for maps of
    less than 11 positions a side, reflection at the border, constants ``(0.01 range)^2`` and ``(0.03 range)^2``. A
    separable window over a map is a matrix on either side of it, which for maps of some tens of positions a side takes
    a tenth of the time of a convolution.

    Args:
        first: (P, H, W), float32 or float64.
        second: the same shape, dtype and device.
        data_range: from the least to the largest value that the maps could have.

    Returns:
        (P,), the same dtype: exactly 1 where the two maps are equal.
    """
    height, width = first.shape[-2:]
    sigma = window_sigma(height, width)
    down = _window(height, sigma, first.dtype, first.device)
    across = _window(width, sigma, first.dtype, first.device).T.contiguous()
    share = max(1, _VALUES_AT_A_TIME // (height * width))
    small, smaller = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    found = [
        _similarity(one, other, down, across, small, smaller)
        for one, other in zip(first.split(share), second.split(share), strict=True)
    ]
    return torch.cat(found) if found else first.new_zeros(0)


def window_sigma(height: int, width: int) -> float:
    """Standard deviation of the window for maps of this size, in positions."""
    return _SIGMA * min(1.0, min(height, width) / _WIDTH)


def _similarity(
    first: Tensor, second: Tensor, down: Tensor, across: Tensor, luminance_constant: float, contrast_constant: float
) -> Tensor:
    maps = torch.stack((first, second, first * first, second * second, first * second))
    mean_first, mean_second, square_first, square_second, product = torch.matmul(down, torch.matmul(maps, across))
    both = mean_first * mean_second
    squares = mean_first * mean_first + mean_second * mean_second
    luminance = (2 * both + luminance_constant) / (squares + luminance_constant)
    # The sum of both variances; as in 2 x covariance, nothing is clamped, so that equal maps give equal numbers.
    variances = square_first + square_second - squares
    structure = (2 * (product - both) + contrast_constant) / (variances + contrast_constant)
    found = (luminance * structure).mean((-2, -1))
    return torch.where((first == second).all(-1).all(-1), torch.ones_like(found), found)


@functools.lru_cache(maxsize=32)
def _window(length: int, sigma: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The matrix (length, length) that takes values along a line to their means in a Gaussian window, reflected."""
    reach = int(_CUTOFF * sigma + 0.5)
    weights = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-reach, reach + 1)]
    with torch.inference_mode(False):  # it is kept, and may be needed for gradients later
        matrix = torch.zeros(length, length, dtype=torch.float64)
        for position in range(length):
            for offset, weight in zip(range(-reach, reach + 1), weights, strict=True):
                inside = abs(position + offset)
                inside = min(inside, 2 * (length - 1) - inside)
                matrix[position, inside] += weight / sum(weights)
        return matrix.to(device, dtype)
