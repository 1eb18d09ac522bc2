"""ReLU and normalisation of maps that are there already, in one pass."""

from __future__ import annotations

from torch import Tensor

from diffcam_fast.ops.cam import cam

EPS = 1e-7
"""Added to the denominator where maps are normalised, as in `diffcam_fast.cam`."""


def finished(raw: Tensor, relu: bool, normalize: str | None) -> Tensor:
    """What `diffcam_fast.cam` makes of raw maps.

    Args:
        raw: ``(N, T, *S)``, float32 or float64.
        relu: whether negative evidence is set to zero.
        normalize: "minmax", "max" or None.

    Returns:
        Maps of the same shape.
    """
    # Each map is the one channel of an image of its own, whose gradient is 1.
    flat = raw.reshape(-1, 1, *raw.shape[2:])
    one = raw.new_ones(()).expand(len(flat), 1)
    return cam(flat, one, "hirescam", relu=relu, normalize=normalize, eps=EPS).reshape(raw.shape)
