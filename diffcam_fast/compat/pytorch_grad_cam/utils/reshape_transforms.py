"""From what layers of transformers and feature pyramids put out to channels at positions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional


def fasterrcnn_reshape_transform(x: Mapping[str, Tensor]) -> Tensor:
    """Magnitudes of all levels of a feature pyramid, at the size of the level named "pool", side by side.

    Args:
        x: ``(N, C, h, w)`` by level.

    Returns:
        ``(N, levels * C, h, w)``.
    """
    size = x["pool"].shape[-2:]
    return torch.cat([functional.interpolate(level.abs(), size, mode="bilinear") for level in x.values()], 1)


def swinT_reshape_transform(tensor: Tensor, height: int = 7, width: int = 7) -> Tensor:
    """Tokens ``(N, height * width, C)`` as ``(N, C, height, width)``, without a copy."""
    return tensor.reshape(len(tensor), height, width, tensor.shape[2]).movedim(3, 1)


def vit_reshape_transform(tensor: Tensor, height: int = 14, width: int = 14) -> Tensor:
    """The same, after a class token that is left out: ``(N, 1 + height * width, C)``."""
    return swinT_reshape_transform(tensor[:, 1:], height, width)
