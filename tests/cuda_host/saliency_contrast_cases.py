"""Calls of `saliency_contrast` that reach every path of its kernels."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from tests.ops.test_saliency_contrast import DTYPES, LAYOUTS, assert_right, random_maps

from . import ops
from .cases import DEVICES, OFFSETS, Case, choices, placed
from .device import Device

#: Within one piece of a row and in several, whole groups of elements at its end or not, one to three dimensions.
SIZES = ((1,), (5, 3), (7, 7), (16, 32), (40, 52), (61, 35), (3, 7, 9))


@dataclass
class SaliencyContrastCase(Case):
    """A call of `saliency_contrast`."""

    most_launches = 2

    images: int
    targets: int
    channels: int
    size: tuple[int, ...]
    per_channel: bool
    dtype: torch.dtype
    layout: str
    rival_layout: str
    offset: int
    device: Device

    @property
    def on(self) -> Device:
        return self.device

    def prepare(self) -> None:
        seed = int(torch.randint(2**31, (), generator=self.generator))
        rest = (self.channels, *self.size)
        saliency = random_maps(self.images, *rest, dtype=self.dtype, seed=seed)
        rivals = random_maps(self.images, self.targets, *rest, dtype=self.dtype, seed=seed + 1)
        self.saliency = placed(LAYOUTS[self.layout](saliency, 1), self.offset)
        self.rivals = placed(LAYOUTS[self.rival_layout](rivals, 2), self.offset)

    def run(self, library: ctypes.CDLL, device: Device) -> tuple[Tensor, ...]:
        return (ops.saliency_contrast(library, device, self.saliency, self.rivals, self.per_channel),)

    def verify(self, found: tuple[Tensor, ...]) -> None:
        assert_right(found[0], self.saliency, self.rivals, self.per_channel)


def saliency_contrast_cases() -> list[SaliencyContrastCase]:
    """The sweep."""
    cases = []
    plain = ("contiguous", "contiguous", "channels last")
    for number, (size, per_channel, dtype, _) in enumerate(product(SIZES, (True, False), DTYPES, range(2))):
        choice = choices(5000 + number)
        cases.append(
            SaliencyContrastCase(
                choice((1, 2)),
                choice((1, 3)),
                choice((1, 2, 4)),
                size,
                per_channel,
                dtype,
                choice((*plain, *LAYOUTS)),
                choice((*plain, *LAYOUTS)),
                choice(OFFSETS),
                choice(DEVICES),
            )
        )
    return cases
