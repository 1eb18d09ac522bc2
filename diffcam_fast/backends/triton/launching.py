"""What the host side of the Triton kernels shares: block sizes, strides, scalars, devices.

Block sizes follow from shapes alone, never from the device or from timing: the same call gives the same bits
everywhere. Shapes may be symbolic while `torch.compile` traces, so they are compared and multiplied, not read.
"""

from __future__ import annotations

import struct
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

#: Enough programs to keep the largest GPUs busy, several on each multiprocessor.
ENOUGH_PROGRAMS = 512

#: Offsets beyond this do not fit into 32 bits.
NARROW = 2**31

#: Elements that each thread of a program holds of one tensor's tile.
_ELEMENTS_PER_THREAD = 16


def block(size: int, most: int, least: int = 1) -> int:
    """The smallest power of two that holds `size`, within bounds that are powers of two."""
    power = least
    while power < size and power < most:
        power *= 2
    return power


def quotient(count: int, size: int) -> int:
    """How many blocks of `size` hold `count`."""
    return (count + size - 1) // size


def warps(elements: int) -> int:
    """Warps of a program whose tile has so many elements."""
    return block(elements // (32 * _ELEMENTS_PER_THREAD), 8)


def float_bits(value: float) -> int:
    """A number's float64 bits: kernels take floating-point arguments as float32, which is not enough for float64."""
    bits: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return bits


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes a tensor's device the current one: Triton launches there, on its current stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


class SpatialView(NamedTuple):
    """Strides of a tensor (leading dimensions, *S), in elements, its spatial rank filled up to three."""

    leading: tuple[int, ...]
    spatial: tuple[int, int, int]
    flat: bool
    """Whether the last of `spatial` alone leads from each position to the next."""
    wide: bool
    """Whether offsets within an image and a target need 64 bits."""

    @property
    def strides(self) -> tuple[int, ...]:
        """All strides in order, as kernels take them."""
        return (*self.leading, *self.spatial)

    def rows_start_at_multiples_of(self, elements: int) -> bool:
        """Whether positions lie side by side and the first of each channel at a multiple of so many elements."""
        return self.flat and self.spatial[2] == 1 and all(stride % elements == 0 for stride in self.leading)


def spatial_view(tensor: Tensor, leading: int) -> SpatialView:
    """Describe a tensor whose first `leading` dimensions are images, targets if any, and channels."""
    sizes, strides = tensor.shape, tensor.stride()
    rows = [(size, stride) for size, stride in zip(sizes[leading:], strides[leading:], strict=True) if size != 1]
    flat = all(outer[1] == inner[0] * inner[1] for outer, inner in pairwise(rows))
    last = rows[-1][1] if rows else 1
    full = (0, 0, *strides[leading:])
    reach = sum((size - 1) * stride for size, stride in zip(sizes[leading - 1 :], strides[leading - 1 :], strict=True))
    spatial = (0, 0, last) if flat else (full[-3], full[-2], full[-1])
    return SpatialView(tuple(strides[:leading]), spatial, flat, bool(reach >= NARROW))


def inner_sizes(tensor: Tensor, leading: int) -> tuple[int, int]:
    """The last two of a tensor's spatial sizes, filled up with ones."""
    spatial = (1, 1, *tensor.shape[leading:])
    return spatial[-2], spatial[-1]
