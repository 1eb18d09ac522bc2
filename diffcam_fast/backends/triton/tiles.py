"""Device functions that the kernels of `cam` and of its backward share.

A tile has the dimensions (targets, channels, positions). Values beyond a tensor's edges are read as zeros, which add
nothing to any sum taken here.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from diffcam_fast.reference.cam import PLUS_PLUS_EPS as _PLUS_PLUS_EPS
from diffcam_fast.reference.cam import XGRADCAM_EPS as _XGRADCAM_EPS

# Kernels read globals only where they are declared constant.
PLUS_PLUS_EPS = tl.constexpr(_PLUS_PLUS_EPS)
XGRADCAM_EPS = tl.constexpr(_XGRADCAM_EPS)


@triton.jit
def from_bits(bits, dtype: tl.constexpr):
    """The number whose float64 bits were handed over as an integer."""
    return tl.cast(tl.cast(bits, tl.int64), tl.float64, bitcast=True).to(dtype)


@triton.jit
def position_offsets(p, size1, size2, stride0, stride1, stride2, FLAT: tl.constexpr, WIDE: tl.constexpr):
    """Offsets of positions, numbered row by row, in a tensor's memory."""
    if WIDE:
        p = p.to(tl.int64)
    if FLAT:
        return p * stride2
    plane = size1 * size2
    return p // plane * stride0 + p % plane // size2 * stride1 + p % size2 * stride2


@triton.jit
def channel_offsets(c, stride, WIDE: tl.constexpr):
    """Offsets of channels in a tensor's memory."""
    if WIDE:
        c = c.to(tl.int64)
    return c * stride


@triton.jit
def without_negatives(x):
    """ReLU that keeps NaN."""
    return tl.where(x < 0, 0, x)


@triton.jit
def plus_plus_terms(g, total):
    """What each position adds to a channel's weight in gradcam++; `total` is the sum of the channel's activations."""
    square = g * g
    alpha = square / (2 * square + total * square * g + PLUS_PLUS_EPS)
    return tl.where(g != 0, alpha, 0) * without_negatives(g)


@triton.jit
def multiple(stride, VECTOR: tl.constexpr):
    """The same number, which the caller knows to be a multiple of `VECTOR`, in a form that shows it to the compiler."""
    if VECTOR == 1:
        return stride
    return stride // VECTOR * VECTOR
