"""A map laid over a picture, as Pillow has them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from diffcam_fast.compat.aliases import strict_by_default
from diffcam_fast.compat.originals import attribute

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from PIL.Image import Image

__all__ = ["overlay_mask"]


def overlay_mask(
    img: Image, mask: Image, colormap: Colormap | str = "jet", alpha: float = 0.7, *, strict: bool | None = None
) -> Image:
    """A map laid over a picture as heat.

    The map is resized to the picture and squared, which leaves the cold parts colder.

    Args:
        img: grey or in colours.
        mask: one channel: floating point from 0 to 1, or bytes.
        colormap: of matplotlib, or its name.
        alpha: share of the picture, from 0 and below 1; the rest is the heat's.
        strict: square bytes as torchcam does: what exceeds 255 starts again at 0. None: what
            `diffcam_fast.compat.install` was told, otherwise False.

    Returns:
        The picture's size, in colours.

    Raises:
        ImportError: Pillow or matplotlib is not installed.
        TypeError: not pictures of Pillow's.
        ValueError: a picture with other channels; alpha is not such a number.
    """
    try:
        from matplotlib import colormaps
        from PIL import Image as images
    except ImportError as error:
        raise ImportError("overlay_mask needs Pillow and matplotlib: pip install 'diffcam_fast[viz]'") from error
    for name, picture in (("img", img), ("mask", mask)):
        if not isinstance(picture, images.Image):
            raise TypeError(f"{name}: expected a PIL.Image.Image; got {type(picture).__name__}")
    if not isinstance(alpha, float) or not 0 <= alpha < 1:
        raise ValueError(f"alpha: expected a float from 0 and below 1; got {alpha!r}")
    if len(img.getbands()) not in (1, 3):
        raise ValueError(f"img: expected one or three channels; got {img.getbands()}")
    level: Any = np.asarray(mask.resize(img.size, images.Resampling.BICUBIC))
    if level.dtype == np.uint8 and not (strict_by_default("torchcam") if strict is None else strict):
        level = level / np.float32(255)
    heat = colormaps.get_cmap(colormap)(level**2, bytes=True)[:, :, :3]
    background = img if img.mode in ("L", "RGB") else images.fromarray(_three_channels(np.asarray(img)))
    return images.blend(images.fromarray(heat), background.convert("RGB"), alpha)


def _three_channels(values: np.ndarray) -> np.ndarray:
    three = values if values.ndim == 3 else np.repeat(values[:, :, None], 3, 2)
    return three.astype(np.uint8)


def __getattr__(name: str) -> Any:
    return attribute("torchcam", "utils", name)
