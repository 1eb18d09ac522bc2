"""Calls of `overlay` that reach every path of its kernels."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from diffcam_fast.ops.colormaps import color_table
from diffcam_fast.reference.cam import NORMALIZATIONS
from diffcam_fast.reference.overlay import BLENDS
from tests.ops.test_overlay import LAYOUTS, assert_right, random_images, random_maps

from . import ops
from .cases import DEVICES, OFFSETS, Case, choices, placed
from .device import Device

SIZES = ((1, 1), (3, 5), (7, 7), (16, 33), (96, 90), (67, 125))


@dataclass
class OverlayCase(Case):
    """A call of `overlay`."""

    most_launches = 3

    images: int
    targets: int
    map_size: tuple[int, int]
    size: tuple[int, int]
    map_dtype: torch.dtype
    image_dtype: torch.dtype
    map_layout: str
    image_layout: str
    normalize: str
    blend: str
    opacity: float
    offset: int
    device: Device

    @property
    def on(self) -> Device:
        return self.device

    def prepare(self) -> None:
        seed = int(torch.randint(2**31, (), generator=self.generator))
        maps = random_maps(self.images, self.targets, *self.map_size, dtype=self.map_dtype, seed=seed)
        pixels = random_images(self.images, 3, *self.size, dtype=self.image_dtype, seed=seed)
        self.maps = placed(LAYOUTS[self.map_layout](maps), self.offset)
        self.pixels = placed(LAYOUTS[self.image_layout](pixels), self.offset)

    @property
    def options(self) -> dict:
        return {"opacity": self.opacity, "normalize": self.normalize, "blend": self.blend}

    def run(self, library: ctypes.CDLL, device: Device) -> tuple[Tensor, ...]:
        return (ops.overlay(library, device, self.maps, self.pixels, color_table("jet"), **self.options),)

    def verify(self, found: tuple[Tensor, ...]) -> None:
        assert_right(found[0], self.maps, self.pixels, color_table("jet"), **self.options)


def overlay_cases() -> list[OverlayCase]:
    """The sweep."""
    cases = []
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    for number, (size, normalize, blend, _) in enumerate(product(SIZES, NORMALIZATIONS, BLENDS, range(2))):
        choice = choices(3000 + number)
        cases.append(
            OverlayCase(
                choice((1, 2)),
                choice((1, 3)),
                choice((size, (7, 7), (3, 4))),
                size,
                choice(dtypes),
                choice((*dtypes, torch.uint8, torch.uint8)),
                choice(tuple(LAYOUTS)),
                choice(tuple(LAYOUTS)),
                normalize,
                blend,
                choice((0.3, 1.0)),
                choice(OFFSETS),
                choice(DEVICES),
            )
        )
    return cases
