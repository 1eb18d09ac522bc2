"""Reading a photo that may be anything: damaged, hostile, rotated, with alpha, in CMYK or with 16 bits."""

from __future__ import annotations

import stat
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
"""Endings by which a folder is searched; a file that is named itself may end in anything."""

MAX_PIXELS = 89_478_485
"""Largest photo that is opened: Pillow's own limit, at which its decoders would merely warn (a quarter GiB in RGB)."""

MAX_BYTES = 512 * 2**20


class PhotoError(ValueError):
    """A photo cannot be read; the message says why, without the name of the file."""


def read_photo(path: str | Path) -> Image:
    """The first frame of an image file, upright, in RGB.

    The orientation that the camera recorded is applied. Transparent parts show white. 16-bit greys are reduced to 8.

    Args:
        path: a JPEG, PNG, WebP, BMP, TIFF or GIF file.

    Returns:
        A `PIL.Image.Image` in mode RGB.

    Raises:
        PhotoError: not a regular file, not such an image, damaged, or larger than `MAX_PIXELS` or `MAX_BYTES`.
        ImportError: Pillow is not installed.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise ImportError("reading photos needs Pillow: pip install 'diffcam_fast[cli]'") from error

    _check_file(Path(path))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is checked below
            with Image.open(path, formats=FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise PhotoError(f"{width} x {height} pixels, more than the {MAX_PIXELS} that are opened")
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image))
    except PhotoError:
        raise
    except Image.DecompressionBombError as error:
        raise PhotoError(f"more than the {MAX_PIXELS} pixels that are opened") from error
    except UnidentifiedImageError as error:
        raise PhotoError(f"not an image of a known format ({', '.join(FORMATS)})") from error
    except Exception as error:
        # Decoders fed with damaged or hostile bytes raise whatever they stumble over: OSError, SyntaxError ...
        raise PhotoError(f"damaged image ({type(error).__name__}: {error})") from error


def _check_file(path: Path) -> None:
    """Refuse what would block or never end (pipes, devices) before it is opened."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise PhotoError((reason or str(error)).lower()) from error
    if not stat.S_ISREG(status.st_mode):
        raise PhotoError("not a regular file")
    if status.st_size > MAX_BYTES:
        raise PhotoError(f"{status.st_size} bytes, more than the {MAX_BYTES} that are read")


def _to_rgb(image: Image) -> Image:
    from PIL import Image as ImageModule

    if image.mode.startswith("I"):
        image = _eight_bit(image)
    elif image.mode == "F":
        raise PhotoError("floating point pixels have no known white; save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = ImageModule.new("RGBA", image.size, "white")
        image = ImageModule.alpha_composite(white, image)
    return image.convert("RGB")


def _eight_bit(image: Image) -> Image:
    """Greys of 16 bits, in whichever of Pillow's modes ("I;16", "I;16B", "I"), as greys of 8."""
    from PIL import Image as ImageModule

    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise PhotoError(f"pixels from {values.min()} to {values.max()}; save it with 8 or 16 bits")
    return ImageModule.fromarray(((values + 128) // 257).astype(np.uint8))
