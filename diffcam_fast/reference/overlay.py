"""Maps laid over images in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from diffcam_fast.reference.cam import accumulation_dtype, finish

BLENDS = ("proportional", "uniform")

LEVELS = 256
"""Colours in a table."""

INVALID_COLOR = (255, 0, 255)
"""Magenta occurs in none of the usual colormaps: a NaN must not pass for "no heat"."""


def overlay(
    maps: Tensor,
    images: Tensor,
    table: Tensor,
    opacity: float,
    normalize: str,
    blend: str,
    eps: float,
) -> Tensor:
    """Pictures of the images with the maps over them.

    Args:
        maps: (N, T, h, w), floating point.
        images: (N, 3, H, W) in any memory layout, floating point from 0 to 1 or uint8.
        table: (256, 3), float32: red, green and blue from 0 to 1 of equally spaced levels.
        opacity: from 0 to 1.
        normalize: one of `diffcam_fast.reference.cam.NORMALIZATIONS`, applied after resizing.
        blend: one of `BLENDS`.
        eps: added to the denominator of the normalisation.

    Returns:
        uint8 (N, T, H, W, 3), contiguous.
    """
    size = images.shape[2:]
    result = maps.new_empty((*maps.shape[:2], *size, 3), dtype=torch.uint8)
    if result.numel() == 0:
        return result
    pixels = pixel_values(images)
    level = levels(maps, size, normalize, eps)
    for target in range(maps.shape[1]):  # a thousand targets never need a thousand float pictures
        result[:, target] = blended(level[:, target], pixels, table, opacity, blend)
    return result


def levels(maps: Tensor, size: torch.Size, normalize: str, eps: float) -> Tensor:
    """Maps (N, T, h, w) resized to `size` (bilinear, corners not aligned) and normalised; float32 or float64."""
    maps = maps.to(accumulation_dtype(maps.dtype))
    if maps.shape[2:] != size:
        if normalize == "minmax":
            # Changes nothing but rounding, which the normalisation of a constant map would magnify.
            maps = maps - maps.amin((2, 3), keepdim=True)
        maps = functional.interpolate(maps, size, mode="bilinear", align_corners=False)
    return finish(maps, False, normalize, eps)


def pixel_values(images: Tensor) -> Tensor:
    """Images (N, 3, H, W) as (N, H, W, 3), from 0 to 255 and not rounded; NaN is black."""
    pixels = images.permute(0, 2, 3, 1)
    if images.dtype == torch.uint8:
        return pixels.to(torch.float32)
    return pixels.to(accumulation_dtype(images.dtype)).nan_to_num(0.0).clamp(0, 1) * 255


def blended(level: Tensor, pixels: Tensor, table: Tensor, opacity: float, blend: str) -> Tensor:
    """Pictures uint8 (N, H, W, 3) from levels (N, H, W) and pixels (N, H, W, 3) from 0 to 255."""
    invalid = level.isnan()
    level = level.masked_fill(invalid, 0.0).clamp(0, 1)
    position = level * (LEVELS - 1)
    if blend == "proportional":
        color = (table * 255)[(position + 0.5).long()]
        mixed = pixels + (opacity * level).unsqueeze(-1) * (color - pixels) + 0.5
    else:
        color = (table * 255)[position.long()]
        mixed = (1 - opacity) * pixels + opacity * color
        brightest = mixed.masked_fill(invalid.unsqueeze(-1), 0.0).amax((1, 2, 3), keepdim=True)
        mixed = mixed / torch.where(brightest > 0, brightest, torch.ones_like(brightest)) * 255
    # Filled on the device: a copy from the host would have to wait for it.
    invalid_color = torch.stack([level.new_full((), value, dtype=torch.uint8) for value in INVALID_COLOR])
    return torch.where(invalid.unsqueeze(-1), invalid_color, mixed.to(torch.uint8))
