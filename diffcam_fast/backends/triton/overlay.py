"""Maps laid over images in Triton: one launch draws, after others that find what maps span and what is brightest.

A program takes some bytes of a picture, each channel of a pixel by itself: what channels share is computed for each
again, which is cheap beside writing bytes that do not lie side by side.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from diffcam_fast.backends.triton.launching import NARROW, block, float_bits, on_device_of, quotient
from diffcam_fast.backends.triton.tiles import from_bits
from diffcam_fast.reference import overlay as reference
from diffcam_fast.reference.cam import accumulation_dtype
from diffcam_fast.reference.overlay import LEVELS as _LEVELS

LAST_LEVEL = tl.constexpr(_LEVELS - 1)

_BLOCK = 1024
_MOST_PARTS = 64  # of a map, whose spans every program of it reads


@triton.jit
def _place(pixel, scale, positions):
    """The two positions between which a pixel lies, corners not aligned, and the weight of the second."""
    at = (pixel.to(scale.dtype) + 0.5) * scale - 0.5
    at = tl.where(at > 0, at, 0)
    first = tl.minimum(at.to(tl.int32), positions - 1)
    return first, tl.minimum(first + 1, positions - 1), at - first.to(scale.dtype)


@triton.jit
def _values(
    map_start, p, inside, width, map_height, map_width, row_scale_bits, column_scale_bits, row_stride, column_stride,
    SAME: tl.constexpr, ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """A map, resized, at pixels numbered row by row."""
    y = p // width
    x = p % width
    if SAME:
        offsets = y.to(tl.int64) * row_stride + x.to(tl.int64) * column_stride
        return tl.load(map_start + offsets, mask=inside, other=0).to(ACCUMULATOR)
    top, bottom, down = _place(y, from_bits(row_scale_bits, ACCUMULATOR), map_height)
    left, right, across = _place(x, from_bits(column_scale_bits, ACCUMULATOR), map_width)
    upper = map_start + top.to(tl.int64) * row_stride
    lower = map_start + bottom.to(tl.int64) * row_stride
    before = left.to(tl.int64) * column_stride
    after = right.to(tl.int64) * column_stride
    # A constant map stays constant to the last bit: its normalisation must not magnify rounding.
    a = tl.load(upper + before, mask=inside, other=0).to(ACCUMULATOR)
    above = a + (tl.load(upper + after, mask=inside, other=0).to(ACCUMULATOR) - a) * across
    b = tl.load(lower + before, mask=inside, other=0).to(ACCUMULATOR)
    below = b + (tl.load(lower + after, mask=inside, other=0).to(ACCUMULATOR) - b) * across
    return above + (below - above) * down


@triton.jit
def _span(
    maps, spans, targets, pixels, width, map_height, map_width, row_scale_bits, column_scale_bits, parts, steps,
    image_stride, target_stride, row_stride, column_stride, SAME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Smallest and largest value of a part of a resized map; NaN where there is one."""
    ACCUMULATOR: tl.constexpr = spans.dtype.element_ty
    item = tl.program_id(0).to(tl.int64)
    index = item // parts
    map_start = maps + index // targets * image_stride + index % targets * target_stride
    first = (item % parts).to(tl.int32) * steps * BLOCK
    low = tl.full((BLOCK,), float("inf"), ACCUMULATOR)
    high = tl.full((BLOCK,), float("-inf"), ACCUMULATOR)
    broken = tl.zeros((BLOCK,), tl.int32)
    for step in range(steps):
        p = first + step * BLOCK + tl.arange(0, BLOCK)
        inside = p < pixels
        value = _values(
            map_start, p, inside, width, map_height, map_width, row_scale_bits, column_scale_bits,
            row_stride, column_stride, SAME, ACCUMULATOR,
        )  # fmt: skip
        low = tl.where(inside & (value < low), value, low)
        high = tl.where(inside & (value > high), value, high)
        broken = tl.where(inside & (value != value), 1, broken)
    is_broken = tl.max(broken, 0) > 0
    tl.store(spans + 2 * item, tl.where(is_broken, float("nan"), tl.min(low, 0)))
    tl.store(spans + 2 * item + 1, tl.where(is_broken, float("nan"), tl.max(high, 0)))


@triton.jit
def _normalized(value, spans, index, parts, eps_bits, NORMALIZE: tl.constexpr, PARTS: tl.constexpr):
    """Levels from values, not yet kept from 0 to 1."""
    if NORMALIZE == "none":
        return value
    part = tl.arange(0, PARTS)
    own = spans + 2 * (index * parts + part)
    lows = tl.load(own, mask=part < parts, other=float("inf"))
    highs = tl.load(own + 1, mask=part < parts, other=float("-inf"))
    is_broken = tl.max((lows != lows).to(tl.int32), 0) > 0
    low = tl.min(tl.where(lows == lows, lows, float("inf")), 0)
    high = tl.max(tl.where(highs == highs, highs, float("-inf")), 0)
    if NORMALIZE == "max":
        low = low * 0
    done = (value - low) / (high - low + from_bits(eps_bits, value.dtype))
    return tl.where(is_broken, float("nan"), done)


@triton.jit
def _ingredients(
    maps, images, table, spans, index, e, pixels, targets, width, map_height, map_width,
    row_scale_bits, column_scale_bits, parts, eps_bits,
    image_stride, target_stride, row_stride, column_stride,
    pixel_image, pixel_channel, pixel_row, pixel_column,
    NORMALIZE: tl.constexpr, BLEND: tl.constexpr, SAME: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Level, whether it is NaN, colour and pixel behind each byte of a picture; the last two from 0 to 255."""
    p = e // 3
    c = e % 3
    inside = p < pixels
    image = index // targets
    map_start = maps + image * image_stride + index % targets * target_stride
    value = _values(
        map_start, p, inside, width, map_height, map_width, row_scale_bits, column_scale_bits,
        row_stride, column_stride, SAME, spans.dtype.element_ty,
    )  # fmt: skip
    raw = _normalized(value, spans, index, parts, eps_bits, NORMALIZE, PARTS).to(tl.float32)
    level = tl.where(raw > 0, tl.minimum(raw, 1.0), 0.0)
    rounding: tl.constexpr = 0.5 if BLEND == "proportional" else 0.0
    place = (level * LAST_LEVEL + rounding).to(tl.int32)
    # In quarters of 1/255, as the compiled kernels have them: exact for tables of bytes.
    color = tl.floor(tl.load(table + 3 * place + c) * 1020 + 0.5) * 0.25
    offsets = (p // width).to(tl.int64) * pixel_row + (p % width).to(tl.int64) * pixel_column
    found = tl.load(images + image * pixel_image + c.to(tl.int64) * pixel_channel + offsets, mask=inside, other=0)
    pixel = found.to(tl.float32)
    if images.dtype.element_ty != tl.uint8:
        pixel = tl.where(pixel > 0, tl.minimum(pixel, 1.0), 0.0) * 255
    return level, raw != raw, color, pixel


@triton.jit
def _brightest(
    maps, images, table, spans, brightest, targets, pixels, width, map_height, map_width,
    row_scale_bits, column_scale_bits, parts, steps, opacity_bits, eps_bits,
    image_stride, target_stride, row_stride, column_stride,
    pixel_image, pixel_channel, pixel_row, pixel_column,
    NORMALIZE: tl.constexpr, SAME: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest value of a part of a picture's mixture, where levels are not NaN."""
    item = tl.program_id(0).to(tl.int64)
    opacity = from_bits(opacity_bits, tl.float32)
    found = tl.zeros((BLOCK,), tl.float32)
    for step in range(steps):
        e = ((item % parts).to(tl.int32) * steps + step) * BLOCK + tl.arange(0, BLOCK)
        _, invalid, color, pixel = _ingredients(
            maps, images, table, spans, item // parts, e, pixels, targets, width, map_height, map_width,
            row_scale_bits, column_scale_bits, parts, eps_bits,
            image_stride, target_stride, row_stride, column_stride,
            pixel_image, pixel_channel, pixel_row, pixel_column, NORMALIZE, "uniform", SAME, PARTS,
        )  # fmt: skip
        mixed = (1 - opacity) * pixel + opacity * color
        found = tl.maximum(found, tl.where(invalid | (e >= 3 * pixels), 0.0, mixed))
    tl.store(brightest + item, tl.max(found, 0))


@triton.jit
def _draw(
    maps, images, table, spans, brightest, pictures, targets, pixels, width, map_height, map_width,
    row_scale_bits, column_scale_bits, parts, blocks, opacity_bits, eps_bits,
    image_stride, target_stride, row_stride, column_stride,
    pixel_image, pixel_channel, pixel_row, pixel_column,
    NORMALIZE: tl.constexpr, BLEND: tl.constexpr, SAME: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Some bytes of a picture."""
    item = tl.program_id(0).to(tl.int64)
    index = item // blocks
    opacity = from_bits(opacity_bits, tl.float32)
    e = (item % blocks).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    level, invalid, color, pixel = _ingredients(
        maps, images, table, spans, index, e, pixels, targets, width, map_height, map_width,
        row_scale_bits, column_scale_bits, parts, eps_bits,
        image_stride, target_stride, row_stride, column_stride,
        pixel_image, pixel_channel, pixel_row, pixel_column, NORMALIZE, BLEND, SAME, PARTS,
    )  # fmt: skip
    if BLEND == "proportional":
        mixed = pixel + opacity * level * (color - pixel) + 0.5
    else:
        part = tl.arange(0, PARTS)
        divisor = tl.max(tl.load(brightest + index * parts + part, mask=part < parts, other=0.0), 0)
        mixed = (1 - opacity) * pixel + opacity * color
        mixed = tl.div_rn(mixed, tl.where(divisor > 0, divisor, 1.0) + tl.zeros_like(mixed)) * 255
    magenta = tl.where(e % 3 == 1, 0, 255)
    done = tl.where(invalid, magenta, mixed.to(tl.int32))
    tl.store(pictures + index * pixels * 3 + e, done.to(tl.uint8), mask=e < 3 * pixels)


def overlay(
    maps: Tensor, images: Tensor, table: Tensor, opacity: float, normalize: str, blend: str, eps: float
) -> Tensor:
    """Pictures: `diffcam_fast.reference.overlay.overlay`, its arguments and result, on a GPU."""
    with on_device_of(maps):
        return _overlay(maps, images, table, opacity, normalize, blend, eps, traced=False)


@triton_op("diffcam_fast_triton::overlay", mutates_args=())
def overlay_op(
    maps: Tensor, images: Tensor, table: Tensor, opacity: float, normalize: str, blend: str, eps: float
) -> Tensor:
    """`overlay` as an op that `torch.compile` sees through."""
    return _overlay(maps, images, table, opacity, normalize, blend, eps, traced=True)


def _overlay(
    maps: Tensor, images: Tensor, table: Tensor, opacity: float, normalize: str, blend: str, eps: float, traced: bool
) -> Tensor:
    count, targets, map_height, map_width = maps.shape
    height, width = images.shape[2:]
    pixels = height * width
    if count * targets * pixels == 0 or 3 * pixels + _BLOCK >= NARROW:
        return reference.overlay(maps, images, table, opacity, normalize, blend, eps)
    pictures = maps.new_empty((count, targets, height, width, 3), dtype=torch.uint8)
    steps = quotient(pixels, _MOST_PARTS * _BLOCK)
    parts = quotient(pixels, steps * _BLOCK)
    spans = maps.new_empty((count * targets, parts, 2), dtype=accumulation_dtype(maps.dtype))
    brightest = maps.new_empty((count * targets, parts), dtype=table.dtype)
    table = table.contiguous()
    shape = (targets, pixels, width, map_height, map_width)
    scales = (float_bits(map_height / height), float_bits(map_width / width))
    bits = (float_bits(opacity), float_bits(eps))
    layout = (maps.stride(), images.stride())
    same = bool((map_height, map_width) == (height, width))
    widest = block(parts, _MOST_PARTS)
    programs = count * targets * parts

    if normalize != "none":
        launch = wrap_triton(_span) if traced else _span
        launch[(programs,)](
            maps, spans, *shape, *scales, parts, steps, *layout[0], SAME=same, BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
    if blend == "uniform":
        launch = wrap_triton(_brightest) if traced else _brightest
        launch[(programs,)](
            maps, images, table, spans, brightest, *shape, *scales, parts, 3 * steps, *bits, *layout[0], *layout[1],
            NORMALIZE=normalize, SAME=same, PARTS=widest, BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
    blocks = quotient(3 * pixels, _BLOCK)
    launch = wrap_triton(_draw) if traced else _draw
    launch[(count * targets * blocks,)](
        maps, images, table, spans, brightest, pictures, *shape, *scales, parts, blocks, *bits, *layout[0], *layout[1],
        NORMALIZE=normalize, BLEND=blend, SAME=same, PARTS=widest, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    return pictures
