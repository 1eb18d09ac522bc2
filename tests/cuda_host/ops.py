"""The ops as the CUDA launchers and kernels compute them, on tensors in host memory.

Outputs start as NaN (indices as the least integer, bytes as given), so that an element that is not written is seen.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from diffcam_fast.reference.cam import NORMALIZATIONS, accumulation_dtype
from diffcam_fast.reference.logit_difference import BASELINES
from diffcam_fast.reference.overlay import BLENDS

from .device import SCALAR_TYPES, Device, cam_shape, check, extent, method_number, pointer, scalar_type, view
from .structs import (
    LogitDifferenceOptionsStruct,
    LogitDifferenceResultStruct,
    LogitDifferenceShapeStruct,
    OverlayOptionsStruct,
    OverlayShapeStruct,
    SaliencyContrastShapeStruct,
)

UNWRITTEN_INDEX = torch.iinfo(torch.int64).min


def cam(
    library: ctypes.CDLL,
    device: Device,
    activations: Tensor,
    gradients: Tensor,
    method: str = "gradcam",
    relu: bool = True,
    normalize: str = "minmax",
    eps: float = 1e-7,
) -> Tensor:
    """diffcam_fast::cam."""
    shape = (*gradients.shape[:2], *activations.shape[2:])
    maps = torch.full(shape, torch.nan, dtype=accumulation_dtype(activations.dtype))
    error = library.run_cam(
        ctypes.byref(cam_shape(activations, gradients)),
        ctypes.byref(view(activations, has_targets=False)),
        ctypes.byref(view(gradients, has_targets=True, constant=gradients.dim() == 3)),
        method_number(method),
        ctypes.c_bool(relu),
        NORMALIZATIONS.index(normalize),
        ctypes.c_double(eps),
        pointer(maps),
        ctypes.byref(device.struct()),
    )
    check(library, error)
    return maps


def cam_backward(
    library: ctypes.CDLL,
    device: Device,
    grad_raw: Tensor,
    activations: Tensor,
    gradients: Tensor,
    method: str = "gradcam",
    for_activations: bool = True,
    for_gradients: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """diffcam_fast::cam_backward; None for what is not wanted."""
    constant = gradients.dim() == 3
    grad_activations = torch.empty_like(activations).fill_(torch.nan) if for_activations else None
    grad_gradients = torch.empty_like(gradients).fill_(torch.nan) if for_gradients else None
    error = library.run_cam_backward(
        ctypes.byref(cam_shape(activations, gradients)),
        pointer(grad_raw),
        ctypes.byref(view(activations, has_targets=False)),
        ctypes.byref(view(gradients, has_targets=True, constant=constant)),
        method_number(method),
        ctypes.byref(view(grad_activations, has_targets=False)),
        ctypes.byref(view(grad_gradients, has_targets=True, constant=constant)),
        ctypes.byref(device.struct()),
    )
    check(library, error)
    return grad_activations, grad_gradients


def logit_difference(
    library: ctypes.CDLL,
    device: Device,
    logits: Tensor,
    classes: Tensor,
    baseline: str = "max",
    top_k: int = 0,
    temperature: float = 1.0,
    alpha: float = 1.0,
    ranks: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """diffcam_fast::logit_difference."""
    dtype = accumulation_dtype(logits.dtype)
    count = len(ranks) if baseline == "finer" else top_k
    delta = torch.full(classes.shape, torch.nan, dtype=dtype)
    cotangent = torch.full((*classes.shape, logits.shape[1]), torch.nan, dtype=dtype)
    rivals = torch.full((*classes.shape, count), UNWRITTEN_INDEX)
    differences = torch.full((*classes.shape, count), torch.nan, dtype=dtype)
    shape = LogitDifferenceShapeStruct(*classes.shape, logits.shape[1], scalar_type(logits))
    options = LogitDifferenceOptionsStruct(
        BASELINES.index(baseline), top_k, temperature, alpha, (ctypes.c_int64 * len(ranks))(*ranks), len(ranks)
    )
    result = LogitDifferenceResultStruct(
        delta.data_ptr(), cotangent.data_ptr(), rivals.data_ptr(), differences.data_ptr()
    )
    error = library.run_logit_difference(
        ctypes.byref(shape),
        pointer(logits),
        ctypes.c_int64(logits.stride(0)),
        ctypes.c_int64(logits.stride(1)),
        pointer(classes.contiguous()),
        ctypes.byref(options),
        ctypes.byref(result),
        ctypes.byref(device.struct()),
    )
    check(library, error)
    return delta, cotangent, rivals, differences


def overlay(
    library: ctypes.CDLL,
    device: Device,
    maps: Tensor,
    images: Tensor,
    table: Tensor,
    opacity: float = 0.5,
    normalize: str = "minmax",
    blend: str = "proportional",
    eps: float = 1e-7,
    unwritten: int = 0xA5,
) -> Tensor:
    """diffcam_fast::overlay. Images are (N, 3, H, W) in any memory layout."""
    pictures = torch.full((*maps.shape[:2], *images.shape[2:], 3), unwritten, dtype=torch.uint8)
    pixel_types = (*SCALAR_TYPES, torch.uint8)
    shape = OverlayShapeStruct(*maps.shape, *images.shape[2:], scalar_type(maps), pixel_types.index(images.dtype))
    options = OverlayOptionsStruct(opacity, NORMALIZATIONS.index(normalize), BLENDS.index(blend), eps)
    error = library.run_overlay(
        ctypes.byref(shape),
        # A map has no channels.
        ctypes.byref(view(maps.unsqueeze(2), has_targets=True)),
        ctypes.byref(view(images, has_targets=False)),
        pointer(table),
        ctypes.byref(options),
        pointer(pictures),
        ctypes.byref(device.struct()),
    )
    check(library, error)
    return pictures


def saliency_contrast(
    library: ctypes.CDLL, device: Device, saliency: Tensor, rivals: Tensor, per_channel: bool = True
) -> Tensor:
    """diffcam_fast::saliency_contrast."""
    contrast = torch.full(rivals.shape, torch.nan, dtype=accumulation_dtype(saliency.dtype))
    shape = SaliencyContrastShapeStruct(*rivals.shape[:3], extent(rivals.shape[3:]), scalar_type(saliency), per_channel)
    error = library.run_saliency_contrast(
        ctypes.byref(shape),
        ctypes.byref(view(saliency, has_targets=False)),
        ctypes.byref(view(rivals, has_targets=True)),
        pointer(contrast),
        ctypes.byref(device.struct()),
    )
    check(library, error)
    return contrast
