"""What is done to maps that are there already: ReLU, normalisation and resizing."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from diffcam_fast.backends import direct

EPS = 1e-7
"""Added to the denominator where maps are normalised, as in `diffcam_fast.cam`."""

_INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}

# Maps up to this side are enlarged by matrix products, which take a sixth of the time of PyTorch's interpolation.
_SMALL = 32


def finished(raw: Tensor, relu: bool, normalize: str | None) -> Tensor:
    """What `diffcam_fast.cam` makes of raw maps.

    Args:
        raw: ``(N, T, *S)``, float32 or float64.
        relu: whether negative evidence is set to zero.
        normalize: "minmax", "max" or None.

    Returns:
        Maps of the same shape.
    """
    # Each map is the one channel of an image of its own, whose gradient is 1.
    flat = raw if raw.shape[1] == 1 else raw.reshape(-1, 1, *raw.shape[2:])
    one = _one(raw.dtype) if type(raw) is Tensor and raw.device.type == "cpu" else raw.new_ones((1, 1, 1))
    gradients = one if len(flat) == 1 else one.expand(len(flat), 1, 1)
    maps = unchecked_cam(flat, gradients, "hirescam", relu, normalize)
    return maps if flat is raw else maps.reshape(raw.shape)


@lru_cache(maxsize=2)
def _one(dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.ones((1, 1, 1), dtype=dtype, device="cpu")


def unchecked_cam(
    activations: Tensor, gradients: Tensor, method: str, relu: bool, normalize: str | None, eps: float = EPS
) -> Tensor:
    """`diffcam_fast.cam` of tensors that need no gradients, without the checks of its arguments.

    Args:
        activations: ``(N, C, *S)``.
        gradients: ``(N, T, C, *S)`` or ``(N, T, C)``, of the same dtype and on the same device.
        method: see `diffcam_fast.cam`.
        relu: see there.
        normalize: see there.
        eps: see there.

    Returns:
        Maps ``(N, T, *S)``.
    """
    # A small network waits for the checks, and for PyTorch's autograd, which passes all of this by.
    served = direct.cam(activations, gradients, method, relu, normalize, eps, True)
    if served is not None:
        return served
    with torch._C._AutoDispatchBelowAutograd():
        maps: Tensor = torch.ops.diffcam_fast.cam.default(
            activations, gradients, method, relu, "none" if normalize is None else normalize, eps
        )
    return maps


def resized(maps: Tensor, size: tuple[int, ...], normalize: str | None) -> Tensor:
    """Maps at another size, by linear interpolation with corners not aligned, normalised once more.

    Args:
        maps: ``(N, T, *S)``, float32 or float64, normalised as `normalize` says.
        size: positions along each of one to three spatial dimensions.
        normalize: "minmax", "max" or None.

    Returns:
        Maps ``(N, T, *size)``.
    """
    if normalize is None:
        # Values may be infinite here and there, and must not spread.
        return _interpolated(maps, size)
    larger = _enlarged(maps, size) if _can_enlarge(maps, size) else _interpolated(maps, size)
    return finished(larger, False, normalize)


def _interpolated(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    return functional.interpolate(maps, size, mode=_INTERPOLATION[len(size)], align_corners=False)


def _can_enlarge(maps: Tensor, size: tuple[int, ...]) -> bool:
    # Elsewhere, and where the user allows it, products are rounded to fewer digits.
    return (
        type(maps) is Tensor
        and maps.dim() == 4
        and maps.device.type == "cpu"
        and max(maps.shape[2:]) <= _SMALL
        and maps.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        # `torch.backends.mkldnn.matmul.fp32_precision`, which is a long way round.
        and torch._C._get_fp32_precision_getter("mkldnn", "matmul") in ("none", "ieee")
    )


def _enlarged(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    images, targets, height, width = maps.shape
    count = images * targets
    rows, columns = _weights(height, size[0], maps.dtype), _weights(width, size[1], maps.dtype)
    wide = torch.mm(maps.reshape(count * height, width), columns.t())
    if count == 1:
        return torch.mm(rows, wide).view(images, targets, *size)
    return torch.bmm(rows.expand(count, -1, -1), wide.view(count, height, size[1])).view(images, targets, *size)


@lru_cache(maxsize=32)
def _weights(old: int, new: int, dtype: torch.dtype) -> Tensor:
    """(new, old): what each new position takes of each old one."""
    with torch.inference_mode(False), torch.no_grad():
        places = ((torch.arange(new, dtype=dtype, device="cpu") + 0.5) * (old / new) - 0.5).clamp_(min=0)
        below = places.floor().clamp_(max=old - 1)
        share = (places - below).unsqueeze(1)
        first = below.long().unsqueeze(1)
        found = torch.zeros((new, old), dtype=dtype, device="cpu")
        found.scatter_add_(1, first, 1 - share)
        return found.scatter_add_(1, (first + 1).clamp_(max=old - 1), share)
