"""A simulated CUDA device, and what it takes to call a kernel on it with tensors in host memory."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from diffcam_fast.reference.cam import METHODS

from .structs import SPATIAL_RANK, CamShapeStruct, DeviceStruct, ViewStruct

SCALAR_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Shared memory that a block of each architecture may ask for.
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


@dataclass(frozen=True)
class Device:
    """A device as the launchers see it; the seed says in which order its threads run.

    A device with less shared memory than any real one cuts small problems as a real one cuts large problems.
    """

    capability: int = 90
    multiprocessors: int = 4
    shared_bytes: int | None = None
    seed: int = 0

    def struct(self) -> DeviceStruct:
        shared_bytes = SHARED_BYTES[self.capability] if self.shared_bytes is None else self.shared_bytes
        return DeviceStruct(self.multiprocessors, self.capability, shared_bytes, self.seed)


class KernelError(RuntimeError):
    """A launch that the simulated device refused, or a kernel that misbehaved on it."""


@cache
def load(path: Path) -> ctypes.CDLL:
    """A library that build() made."""
    library = ctypes.CDLL(str(path))
    library.shim_error_text.restype = ctypes.c_char_p
    library.shim_sites.restype = ctypes.c_char_p
    return library


def check(library: ctypes.CDLL, error: int) -> None:
    """Raise what went wrong, if anything."""
    if error != 0:
        raise KernelError(f"error {error}: {library.shim_error_text().decode()}")


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    """The address of the first element."""
    return ctypes.c_void_p(tensor.data_ptr())


def scalar_type(tensor: Tensor) -> int:
    """The number that C++ has for the dtype."""
    return SCALAR_TYPES.index(tensor.dtype)


def extent(spatial: torch.Size) -> ctypes.Array[ctypes.c_int64]:
    """Sizes with leading ones."""
    return (ctypes.c_int64 * SPATIAL_RANK)(*([1] * (SPATIAL_RANK - len(spatial))), *spatial)


def view(tensor: Tensor | None, has_targets: bool, constant: bool = False) -> ViewStruct:
    """A strided view of (N, C, *S) or (N, T, C, *S), of (N, T, C) when constant; of nothing for None."""
    if tensor is None:
        return ViewStruct()
    strides = list(tensor.stride())
    leading = [strides.pop(0), strides.pop(0) if has_targets else 0, strides.pop(0)]
    assert not (constant and strides), "constant gradients have no spatial dimensions"
    spatial = [0] * (SPATIAL_RANK - len(strides)) + strides
    return ViewStruct(tensor.data_ptr(), *leading, (ctypes.c_int64 * SPATIAL_RANK)(*spatial))


def cam_shape(activations: Tensor, gradients: Tensor) -> CamShapeStruct:
    """The shape that `cam` and its backward take."""
    images, targets, channels = gradients.shape[:3]
    constant = gradients.dim() == 3
    return CamShapeStruct(images, targets, channels, extent(activations.shape[2:]), scalar_type(activations), constant)


def method_number(method: str) -> int:
    """The number that C++ has for the method."""
    return METHODS.index(method)
