"""What the calls of every op's sweep have in common: made once, run under several seeds, checked."""

from __future__ import annotations

import ctypes
import random
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from .device import Device

DEVICES = (
    Device(capability=90, multiprocessors=132),
    Device(capability=100, multiprocessors=4),
    Device(capability=80, multiprocessors=108),
    Device(capability=80, multiprocessors=1),
)

# Elements by which the first one lies off a multiple of 16 bytes.
OFFSETS = (0, 0, 1, 3)


@dataclass
class Case(ABC):
    """A call of one op on one device. Fields say which; the same fields always give the same tensors."""

    most_launches: ClassVar[int]

    def __str__(self) -> str:
        return " ".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))

    @cached_property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(str(self).encode()))

    @property
    def is_large(self) -> bool:
        """Whether it takes so long that one seed has to do."""
        return False

    @property
    @abstractmethod
    def on(self) -> Device:
        """The device."""

    @abstractmethod
    def prepare(self) -> None:
        """Make tensors and what is expected of them."""

    @abstractmethod
    def run(self, library: ctypes.CDLL, device: Device) -> tuple[Tensor, ...]:
        """Call the op."""

    @abstractmethod
    def verify(self, found: tuple[Tensor, ...]) -> None:
        """Raise AssertionError where `found` is not what the float64 reference gives."""

    def examine(self, library: ctypes.CDLL, seeds: Sequence[int]) -> None:
        """Run under every seed, check the first result, and that the others are the same bit for bit."""
        self.prepare()
        first: tuple[Tensor, ...] | None = None
        for seed in seeds[:1] if self.is_large else seeds:
            found = self.run(library, replace(self.on, seed=seed))
            launches = library.shim_launches()
            assert launches <= self.most_launches, f"{launches} launches, expected at most {self.most_launches}"
            if first is None:
                first = found
                self.verify(found)
            for one, other in zip(first, found, strict=True):
                assert torch.equal(bits(one), bits(other)), f"seed {seed} gives other bits than seed {seeds[0]}"


def bits(tensor: Tensor) -> Tensor:
    """Integers that are equal where the bits are, NaN included."""
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
    return tensor.contiguous().view(integers[tensor.element_size()])


def choices(seed: int) -> Callable[[Sequence[Any]], Any]:
    """Picks one of what it is given, the same ones in every run."""
    return random.Random(seed).choice


def placed(values: Tensor, offset: int = 0) -> Tensor:
    """The same values with the same strides, in memory that ends with them and begins `offset` elements late.

    The allocation begins on a multiple of 64 bytes. What lies before is NaN; the address sanitizer sees what is read
    behind.
    """
    reach = 1 + sum((size - 1) * stride for size, stride in zip(values.shape, values.stride(), strict=True))
    if values.numel() == 0:
        return values
    poison = torch.nan if values.is_floating_point() else 255
    memory = torch.full((offset + reach,), poison, dtype=values.dtype)
    result = memory.as_strided(values.shape, values.stride(), offset)
    # Elements that share memory hold the same value.
    first = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in values.stride())
    result[first] = values[first]
    return result


def spread_out(values: Tensor) -> Tensor:
    """The same values as every second element of a larger tensor whose other elements are NaN."""
    wide = torch.full([2 * size for size in values.shape], torch.nan, dtype=values.dtype)
    view = wide[tuple(slice(None, None, 2) for _ in values.shape)]
    return view.copy_(values)
