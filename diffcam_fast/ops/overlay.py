"""Maps laid over images as heat: schema, shape inference and the public function."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from diffcam_fast.backends.library import NAMESPACE, define
from diffcam_fast.ops.colormaps import table_on
from diffcam_fast.reference import overlay as reference
from diffcam_fast.reference.cam import NORMALIZATIONS
from diffcam_fast.reference.overlay import BLENDS, LEVELS

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = ("NCHW", "NHWC")

_SLACK = 1e-2  # half precisions and interpolation overshoot a little


def overlay(
    maps: Tensor,
    images: Tensor,
    *,
    colormap: str | Tensor = "jet",
    opacity: float = 0.5,
    normalize: str | None = "minmax",
    blend: str = "proportional",
    layout: str | None = None,
    eps: float = 1e-7,
) -> Tensor:
    """Maps laid over the images they explain, as heat: resize, normalise, colour and blend in one pass.

    Each map is resized to its image (bilinear, corners not aligned) and normalised, which gives every pixel a level
    from 0 to 1. The level takes a colour from the table of the colormap, and the colour is mixed with the pixel:

    ==============  ===================================================================================================
    blend           picture
    ==============  ===================================================================================================
    proportional    ``pixel + opacity * level * (colour - pixel)``, with the colour whose place in the table is nearest:
                    heat is as opaque as the map is high, and the image stays readable where the map is low
    uniform         ``(1 - opacity) * pixel + opacity * colour``, divided by its largest value over the picture, with
                    levels and results rounded down: what pytorch-grad-cam's ``show_cam_on_image`` draws with
                    ``image_weight = 1 - opacity``, for maps with ``normalize=None``
    ==============  ===================================================================================================

    Where a level is NaN the picture is magenta, which occurs in none of the usual colormaps; a NaN in an image is
    black. Not differentiable. Nothing waits for a device, so only on the CPU are values checked before they are used;
    elsewhere those out of range are taken for the nearest within.

    Args:
        maps: ``(N, h, w)``, or ``(N, T, h, w)`` for T maps an image; float32, float64, bfloat16 or float16.
        images: ``(N, 3, H, W)`` or ``(N, H, W, 3)``, red, green and blue, or grey images with one channel in their
            place; float32, float64, bfloat16 or float16 from 0 to 1, or uint8. On the device of the maps.
        colormap: "jet", "hot", the name of a colormap of matplotlib, or a table of 256 colours for levels from 0 to
            1: ``(256, 3)``, uint8, or floating point from 0 to 1.
        opacity: of the heat, from 0 (the image alone) to 1.
        normalize: ``"minmax"``: ``(M - min) / (max - min + eps)``; ``"max"``: ``M / (max + eps)``; None: maps
            are from 0 to 1 already. Each map by itself, after resizing.
        blend: see the table.
        layout: ``"NCHW"`` or ``"NHWC"``; None: dimension 1 holds the channels if it has size 3 or 1, and otherwise
            dimension 3.
        eps: see ``normalize``; positive.

    Returns:
        uint8 ``(N, H, W, 3)``, or ``(N, T, H, W, 3)`` where maps have a target dimension; contiguous.

    Raises:
        TypeError: an argument is not of the type, or a tensor not of a dtype, described above.
        ValueError: shapes or devices that do not go together, an option that is not valid or, on the CPU, values out
            of range.
        ImportError: the colormap is one of matplotlib's, and matplotlib is not installed.
    """
    _check_options(opacity, normalize, blend, eps)
    canonical_images = _canonical_images(images, layout)
    _check_maps(maps, canonical_images)
    table = _canonical_table(colormap, maps.device)
    if images.is_floating_point():
        _check_range("images", images, "pixels as they were before they were normalised for a network")
    if normalize is None:
        _check_range("maps", maps, "or normalize='minmax'")
    op = getattr(torch.ops, NAMESPACE).overlay.default
    pictures: Tensor = op(
        maps.detach() if maps.dim() == 4 else maps.detach().unsqueeze(1),
        canonical_images.detach(),
        table.detach(),
        float(opacity),
        "none" if normalize is None else normalize,
        blend,
        float(eps),
    )
    return pictures if maps.dim() == 4 else pictures.squeeze(1)


def _check_options(opacity: Any, normalize: Any, blend: Any, eps: Any) -> None:
    for name, value in (("opacity", opacity), ("eps", eps)):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name}: expected a number; got {type(value).__name__}")
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity: expected a number from 0 to 1; got {opacity!r}")
    if not 0 < eps < float("inf"):
        raise ValueError(f"eps: expected a positive number; got {eps!r}")
    if normalize is not None and (normalize not in NORMALIZATIONS or normalize == "none"):
        raise ValueError(f"normalize: expected None, 'max' or 'minmax'; got {normalize!r}")
    if blend not in BLENDS:
        raise ValueError(f"blend: expected one of {', '.join(BLENDS)}; got {blend!r}")


def _check_maps(maps: Any, images: Tensor) -> None:
    if not isinstance(maps, Tensor):
        raise TypeError(f"maps: expected a torch.Tensor; got {type(maps).__name__}")
    if maps.dtype not in DTYPES:
        raise TypeError(f"maps: expected dtype {_names(DTYPES)}; got {_names([maps.dtype])}")
    if maps.dim() not in (3, 4):
        raise ValueError(f"maps: expected shape (N, h, w) or (N, T, h, w); got {tuple(maps.shape)}")
    if maps.shape[0] != images.shape[0]:
        raise ValueError(f"maps: expected maps of {images.shape[0]} images; got {tuple(maps.shape)}")
    if maps.shape[-1] == 0 or maps.shape[-2] == 0:
        raise ValueError(f"maps: expected at least one position; got {tuple(maps.shape)}")
    if maps.device != images.device:
        raise ValueError(f"maps: expected the device of images, {images.device}; got {maps.device}")


def _canonical_images(images: Any, layout: Any) -> Tensor:
    """Any of the accepted images as (N, 3, H, W), without a copy."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images: expected a torch.Tensor; got {type(images).__name__}")
    if images.dtype not in (*DTYPES, torch.uint8):
        raise TypeError(f"images: expected dtype {_names(DTYPES)} or uint8; got {_names([images.dtype])}")
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"layout: expected None, 'NCHW' or 'NHWC'; got {layout!r}")
    if images.dim() == 4:
        if layout != "NHWC" and images.shape[1] in (1, 3):
            return images.expand(-1, 3, -1, -1)
        if layout != "NCHW" and images.shape[3] in (1, 3):
            return images.permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
    expected = {"NCHW": "(N, 3, H, W)", "NHWC": "(N, H, W, 3)", None: "(N, 3, H, W) or (N, H, W, 3)"}[layout]
    raise ValueError(f"images: expected shape {expected}, or one channel instead of 3; got {tuple(images.shape)}")


def _canonical_table(colormap: Any, device: torch.device) -> Tensor:
    """A name or table as float32 (256, 3) from 0 to 1 on the device."""
    if isinstance(colormap, str):
        return table_on(colormap, device)
    if not isinstance(colormap, Tensor):
        raise TypeError(f"colormap: expected the name of a colormap or a torch.Tensor; got {type(colormap).__name__}")
    if colormap.dtype not in (*DTYPES, torch.uint8):
        raise TypeError(f"colormap: expected dtype {_names(DTYPES)} or uint8; got {_names([colormap.dtype])}")
    if colormap.shape != (LEVELS, 3):
        raise ValueError(f"colormap: expected shape ({LEVELS}, 3); got {tuple(colormap.shape)}")
    if colormap.device != device:
        raise ValueError(f"colormap: expected the device of maps, {device}; got {colormap.device}")
    if colormap.dtype == torch.uint8:
        return colormap.to(torch.float32) / 255
    _check_range("colormap", colormap, "or uint8")
    return colormap.to(torch.float32).clamp(0, 1).contiguous()


def _check_range(name: str, values: Tensor, hint: str) -> None:
    """Raise where finite values on the CPU are not from 0 to 1."""
    # Only where values are at hand: reading them would wait for another device; a tracer's tensors have none.
    if torch.compiler.is_compiling() or type(values) is not Tensor:
        return
    if values.device.type != "cpu" or values.numel() == 0:
        return
    values = values.detach()
    low, high = float(values.amin()), float(values.amax())
    if not (abs(low) < float("inf") and abs(high) < float("inf")):
        finite = values[values.isfinite()]
        if finite.numel() == 0:
            return
        low, high = float(finite.amin()), float(finite.amax())
    if low < -_SLACK or high > 1 + _SLACK:
        raise ValueError(f"{name}: expected values from 0 to 1 ({hint}); got {low:.4g} to {high:.4g}")


def _names(dtypes: Any) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


define(
    "overlay",
    "(Tensor maps, Tensor images, Tensor table, float opacity, str normalize, str blend, float eps) -> Tensor",
    reference.overlay,
)


@torch.library.register_fake(f"{NAMESPACE}::overlay")
def _fake(
    maps: Tensor, images: Tensor, table: Tensor, opacity: float, normalize: str, blend: str, eps: float
) -> Tensor:
    return maps.new_empty((*maps.shape[:2], *images.shape[2:], 3), dtype=torch.uint8)
