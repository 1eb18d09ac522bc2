"""From a photo to what a model sees: which part of the photo, at which size, normalised how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

FITS = ("crop", "stretch")
"""Ways to fit a photo into the model's input: the central part, as the model was evaluated, or the whole, stretched."""

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


@dataclass(frozen=True)
class Preprocessing:
    """What a model expects of its images.

    Attributes:
        size: height and width of the input, in pixels.
        crop_fraction: side of the central crop, relative to the largest part of the photo of the input's aspect ratio.
        mean: subtracted from red, green and blue, which run from 0 to 1.
        std: what they are then divided by.
        interpolation: "nearest", "bilinear", "bicubic" or "lanczos"; all but the first low-pass what they shrink.
    """

    size: tuple[int, int] = (224, 224)
    crop_fraction: float = 0.875
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        """Check the attributes.

        Raises:
            ValueError: a size below 1, a fraction outside (0, 1], a std that is not positive, an unknown interpolation.
        """
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"size: got {self.size}, expected a height and a width of at least 1")
        if not 0.0 < self.crop_fraction <= 1.0:
            raise ValueError(f"crop_fraction: got {self.crop_fraction}, expected more than 0 and at most 1")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0.0:
            raise ValueError(f"mean, std: got {self.mean}, {self.std}, expected three numbers each, std positive")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation: got {self.interpolation!r}, expected one of {', '.join(INTERPOLATIONS)}")

    def box(self, width: int, height: int, fit: str = "crop") -> tuple[float, float, float, float]:
        """The part of a photo that the model sees: left, top, right and bottom, in pixels of the photo.

        Raises:
            ValueError: an unknown `fit`.
        """
        if fit == "stretch":
            return (0.0, 0.0, float(width), float(height))
        if fit != "crop":
            raise ValueError(f"fit: got {fit!r}, expected one of {', '.join(FITS)}")
        scale = self.crop_fraction * min(width / self.size[1], height / self.size[0])
        crop_width, crop_height = scale * self.size[1], scale * self.size[0]
        left, top = (width - crop_width) / 2, (height - crop_height) / 2
        return (left, top, left + crop_width, top + crop_height)

    def pixels(self, photo: Image, fit: str = "crop") -> Tensor:
        """The pixels that the model sees, before normalisation.

        Args:
            photo: an image in mode RGB.
            fit: "crop" (the model's own central crop) or "stretch" (the whole photo, whatever its aspect ratio).

        Returns:
            uint8 (3, height, width) of `size`.
        """
        from PIL.Image import Resampling

        resampling = Resampling[self.interpolation.upper()]
        box = self.box(*photo.size, fit)
        resized = photo.resize((self.size[1], self.size[0]), resampling, box=box)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()

    def normalize(self, pixels: Tensor) -> Tensor:
        """What the model is given: float32, same shape, of uint8 pixels (3, H, W) or (N, 3, H, W)."""
        mean = torch.tensor(self.mean, device=pixels.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=pixels.device).view(3, 1, 1)
        return (pixels.float() / 255 - mean) / std
