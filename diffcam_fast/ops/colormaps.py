"""Colormaps by name, as tables of colours on a device."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffcam_fast.reference.overlay import LEVELS

BUILTIN_COLORMAPS = ("jet", "hot")
"""Names that are known without matplotlib."""

_tables: dict[tuple[str, torch.device], Tensor] = {}


def color_table(name: str) -> Tensor:
    """Colours of a colormap at 256 equally spaced levels.

    Args:
        name: "jet" (OpenCV's, which is coarser than matplotlib's) or "hot", both computed here, or the name of any
            other colormap of matplotlib.

    Returns:
        float32 tensor (256, 3): red, green and blue from 0 to 1.

    Raises:
        TypeError: the name is not a string.
        ImportError: the name is not built in and matplotlib is not installed.
        ValueError: matplotlib does not know the name either.
    """
    if not isinstance(name, str):
        raise TypeError(f"colormap: expected the name of a colormap; got {type(name).__name__}")
    return torch.from_numpy(_colors(name).copy())


def table_on(name: str, device: torch.device) -> Tensor:
    """`color_table` on a device, made once; not to be written to."""
    found = _tables.get((name, device))
    if found is None:
        with torch.inference_mode(False):
            found = color_table(name).to(device)
        if type(found) is Tensor:  # a tracer's tensors must not outlive its trace
            _tables[name, device] = found
    return found


# What torch.compiler.assume_constant_result does, which would import the compiler with this package.
table_on._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _colors(name: str) -> np.ndarray:
    place = np.arange(LEVELS)
    level = place / (LEVELS - 1)
    if name == "jet":
        # Trapezoids of slope 4, centred on 3/4 (red), 1/2 (green) and 1/4 (blue), in bytes as OpenCV has them.
        trapezoids = np.stack([382.5 - abs(4.0 * place - 255.0 * center) for center in (3, 2, 1)], 1)
        colors = np.rint(trapezoids.clip(0, 255))
        colors[159, 2] = 1  # the one half that OpenCV does not round to the even number
        return _float32(colors / 255)
    if name == "hot":
        return _float32(np.stack([3.0 * level - start for start in (0.0, 1.0, 2.0)], 1).clip(0, 1))
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            f"colormap: {name!r} comes from matplotlib (pip install 'diffcam_fast[cli]'); "
            f"without it there are {', '.join(BUILTIN_COLORMAPS)}"
        ) from error
    if name not in matplotlib.colormaps:
        raise ValueError(f"colormap: expected 'jet', 'hot' or a colormap of matplotlib, such as 'turbo'; got {name!r}")
    return _float32(matplotlib.colormaps[name](level)[:, :3])


def _float32(colors: Any) -> np.ndarray:
    return np.ascontiguousarray(colors, dtype=np.float32)
