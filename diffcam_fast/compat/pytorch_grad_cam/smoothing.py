"""Test-time augmentation: what an image is turned into, and how the maps are turned back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class FlipTimesFactor:
    """One augmentation, with the names that ttach has for it."""

    flip: bool
    factor: float

    def augment_image(self, images: Tensor) -> Tensor:
        """Images ``(N, C, H, W)``, mirrored or not, and multiplied."""
        return self.deaugment_mask(images) * self.factor

    def deaugment_mask(self, maps: Tensor) -> Tensor:
        """Maps ``(N, T, H, W)``, mirrored back. Of volumes it is the dimension before the last that is mirrored."""
        return maps.flip(3) if self.flip else maps


@dataclass(frozen=True)
class FlipsTimesFactors:
    """Mirrored and not, each times each factor."""

    factors: Sequence[float] = (0.9, 1.0, 1.1)

    def __iter__(self) -> Iterator[FlipTimesFactor]:
        for flip in (False, True):
            for factor in self.factors:
                yield FlipTimesFactor(flip, factor)
