"""Contrast of saliency maps in Triton: a launch sums the squares of pieces of rows, the next divides and subtracts.

A row is what one energy is the norm of: a channel of a map, or all of its channels.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from diffcam_fast.backends.triton.launching import NARROW, block, inner_sizes, on_device_of, quotient, spatial_view
from diffcam_fast.backends.triton.tiles import channel_offsets, multiple, position_offsets, without_negatives
from diffcam_fast.reference import saliency_contrast as reference
from diffcam_fast.reference.cam import accumulation_dtype

_BLOCK = 1024
_MOST_PIECES = 64  # of a row, whose sums every program of it reads

#: Elements that one load brings, where rows allow it.
_VECTOR = 8


@triton.jit
def _small_scale(dtype: tl.constexpr):
    """What values are multiplied by whose squares are too small for the dtype; a power of two."""
    return 2.0**100 if dtype == tl.float32 else 2.0**600


@triton.jit
def _large_scale(dtype: tl.constexpr):
    """The same where squares are too large."""
    return 2.0**-80 if dtype == tl.float32 else 2.0**-600


@triton.jit
def _least_square(dtype: tl.constexpr):
    """A sum of squares below this is taken of values times the small scale."""
    return 2.0**-90 if dtype == tl.float32 else 2.0**-900


@triton.jit
def _most_square(dtype: tl.constexpr):
    """A sum of squares above this is taken of values times the large scale."""
    return 2.0**120 if dtype == tl.float32 else 2.0**1000


@triton.jit
def _values(
    maps, row, e, elements, rows, row_channels, targets, positions, size1, size2,
    image_stride, target_stride, channel_stride, stride0, stride1, stride2, ACCUMULATOR: tl.constexpr,
    FLAT: tl.constexpr, RUN: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Elements of a row, zeros beyond its end. `RUN`: they lie side by side."""
    index = row // rows
    start = maps + index // targets * multiple(image_stride, VECTOR) + index % targets * multiple(target_stride, VECTOR)
    start += row % rows * row_channels * multiple(channel_stride, VECTOR)
    if RUN:
        return tl.load(start + e, mask=e < elements, other=0).to(ACCUMULATOR)
    offsets = channel_offsets(e // positions, channel_stride, WIDE)
    offsets += position_offsets(e % positions, size1, size2, stride0, stride1, stride2, FLAT, WIDE)
    return tl.load(start + offsets, mask=e < elements, other=0).to(ACCUMULATOR)


@triton.jit
def _sum_squares(
    maps, sums, elements, pieces, steps, rows, row_channels, targets, positions, size1, size2,
    image_stride, target_stride, channel_stride, stride0, stride1, stride2,
    FLAT: tl.constexpr, RUN: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of the squares of a piece of a row: as values are, and of small and of large ones."""
    T: tl.constexpr = sums.dtype.element_ty
    item = tl.program_id(0).to(tl.int64)
    plain = tl.zeros((BLOCK,), T)
    small = tl.zeros((BLOCK,), T)
    large = tl.zeros((BLOCK,), T)
    elements = multiple(elements, VECTOR)
    for step in range(steps):
        e = ((item % pieces).to(tl.int32) * steps + step) * BLOCK + tl.arange(0, BLOCK)
        x = _values(
            maps, item // pieces, e, elements, rows, row_channels, targets, positions, size1, size2,
            image_stride, target_stride, channel_stride, stride0, stride1, stride2, T, FLAT, RUN, WIDE, VECTOR,
        )  # fmt: skip
        up = x * _small_scale(T)
        down = x * _large_scale(T)
        plain += x * x
        small += up * up
        large += down * down
    tl.store(sums + 3 * item, tl.sum(plain, 0))
    tl.store(sums + 3 * item + 1, tl.sum(small, 0))
    tl.store(sums + 3 * item + 2, tl.sum(large, 0))


@triton.jit
def _energy(sums, row, pieces, PIECES: tl.constexpr):
    """By what the values of a row are multiplied, and then divided, for energy 1; NaN where there is no such number."""
    T: tl.constexpr = sums.dtype.element_ty
    piece = tl.arange(0, PIECES)
    own = sums + 3 * (row * pieces + piece)
    inside = piece < pieces
    plain = tl.sum(tl.load(own, mask=inside, other=0), 0)
    small = tl.sum(tl.load(own + 1, mask=inside, other=0), 0)
    large = tl.sum(tl.load(own + 2, mask=inside, other=0), 0)
    is_small = plain < _least_square(T)
    fits = plain <= _most_square(T)
    square = tl.where(is_small, small, tl.where(fits, plain, large))
    scale = tl.where(is_small, _small_scale(T), tl.where(fits, 1.0, _large_scale(T))).to(T)
    # Zeros stay zeros. What shares an energy that is not finite becomes NaN.
    divisor = tl.where(square == 0, 1.0, tl.where(square <= _most_square(T), tl.sqrt(square), float("nan"))).to(T)
    return scale, divisor


@triton.jit
def _divided(values, scale, divisor):
    """Divided and rounded: products could be fused with the difference, and rounded differently."""
    scaled = values * scale
    spread = divisor + tl.zeros_like(values)
    return tl.div_rn(scaled, spread) if values.dtype == tl.float32 else scaled / spread


@triton.jit
def _subtract(
    saliency, rivals, own_sums, rival_sums, contrast, elements, pieces, steps, rows, row_channels, targets, positions,
    size1, size2, own_image, own_target, own_channel, own_stride0, own_stride1, own_stride2,
    rival_image, rival_target, rival_channel, rival_stride0, rival_stride1, rival_stride2,
    OWN_FLAT: tl.constexpr, RIVAL_FLAT: tl.constexpr, OWN_RUN: tl.constexpr, RIVAL_RUN: tl.constexpr,
    WIDE: tl.constexpr, VECTOR: tl.constexpr, PIECES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A piece of a row of the result."""
    T: tl.constexpr = contrast.dtype.element_ty
    item = tl.program_id(0).to(tl.int64)
    row = item // pieces
    own_row = row // rows // targets * rows + row % rows
    own_scale, own_divisor = _energy(own_sums, own_row, pieces, PIECES)
    rival_scale, rival_divisor = _energy(rival_sums, row, pieces, PIECES)
    elements = multiple(elements, VECTOR)
    for step in range(steps):
        e = ((item % pieces).to(tl.int32) * steps + step) * BLOCK + tl.arange(0, BLOCK)
        own = _values(
            saliency, own_row, e, elements, rows, row_channels, 1, positions, size1, size2,
            own_image, own_target, own_channel, own_stride0, own_stride1, own_stride2,
            T, OWN_FLAT, OWN_RUN, WIDE, VECTOR,
        )  # fmt: skip
        rival = _values(
            rivals, row, e, elements, rows, row_channels, targets, positions, size1, size2,
            rival_image, rival_target, rival_channel, rival_stride0, rival_stride1, rival_stride2,
            T, RIVAL_FLAT, RIVAL_RUN, WIDE, VECTOR,
        )  # fmt: skip
        difference = _divided(own, own_scale, own_divisor) - _divided(rival, rival_scale, rival_divisor)
        tl.store(contrast + row * elements + e, without_negatives(difference), mask=e < elements)


def saliency_contrast(saliency: Tensor, rivals: Tensor, per_channel: bool) -> Tensor:
    """Contrasts: `diffcam_fast.reference.saliency_contrast.saliency_contrast`, its arguments and result, on a GPU."""
    with on_device_of(saliency):
        return _saliency_contrast(saliency, rivals, per_channel, traced=False)


@triton_op("diffcam_fast_triton::saliency_contrast", mutates_args=())
def saliency_contrast_op(saliency: Tensor, rivals: Tensor, per_channel: bool) -> Tensor:
    """`saliency_contrast` as an op that `torch.compile` sees through."""
    return _saliency_contrast(saliency, rivals, per_channel, traced=True)


def _saliency_contrast(saliency: Tensor, rivals: Tensor, per_channel: bool, traced: bool) -> Tensor:
    dtype = accumulation_dtype(saliency.dtype)
    images, targets, channels = rivals.shape[:3]
    positions = math.prod(saliency.shape[2:])
    row_channels = 1 if per_channel else channels
    elements = row_channels * positions
    if images * targets * channels * positions == 0 or elements + _BLOCK >= NARROW:
        return reference.saliency_contrast(saliency, rivals, per_channel)
    contrast = rivals.new_empty(rivals.shape, dtype=dtype)
    rows = channels // row_channels
    steps = quotient(elements, _MOST_PIECES * _BLOCK)
    pieces = quotient(elements, steps * _BLOCK)
    own_sums = rivals.new_empty((images * rows, pieces, 3), dtype=dtype)
    rival_sums = rivals.new_empty((images * targets * rows, pieces, 3), dtype=dtype)

    own, other = spatial_view(saliency, 2), spatial_view(rivals, 3)
    # One row's channels follow each other without a gap, where it has several.
    side_by_side = [
        bool(
            each.flat
            and (each.spatial[2] == 1 or positions == 1)
            and (row_channels == 1 or each.leading[-1] == positions)
        )
        for each in (own, other)
    ]
    aligned = bool(elements % _VECTOR == 0) and all(
        run and each.rows_start_at_multiples_of(_VECTOR) for run, each in zip(side_by_side, (own, other), strict=True)
    )
    own_strides = (own.leading[0], 0, own.leading[1], *own.spatial)
    shape = (rows, row_channels, targets, positions, *inner_sizes(saliency, 2))
    options = {"WIDE": own.wide or other.wide, "VECTOR": _VECTOR if aligned else 1, "BLOCK": _BLOCK, "num_warps": 4}
    launch = wrap_triton(_sum_squares) if traced else _sum_squares
    launch[(images * rows * pieces,)](
        saliency, own_sums, elements, pieces, steps, rows, row_channels, 1, *shape[3:], *own_strides,
        FLAT=own.flat, RUN=side_by_side[0], **options,
    )  # fmt: skip
    launch[(images * targets * rows * pieces,)](
        rivals, rival_sums, elements, pieces, steps, *shape, *other.strides,
        FLAT=other.flat, RUN=side_by_side[1], **options,
    )  # fmt: skip
    launch = wrap_triton(_subtract) if traced else _subtract
    launch[(images * targets * rows * pieces,)](
        saliency, rivals, own_sums, rival_sums, contrast, elements, pieces, steps, *shape, *own_strides,
        *other.strides, OWN_FLAT=own.flat, RIVAL_FLAT=other.flat, OWN_RUN=side_by_side[0], RIVAL_RUN=side_by_side[1],
        PIECES=block(pieces, _MOST_PIECES), **options,
    )  # fmt: skip
    return contrast
