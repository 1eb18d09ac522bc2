"""Class activation maps in Triton.

One kernel weights activations and pools them over channels, each program over some channels of some positions. Where
a program has all channels and all positions of a map it finishes the map too; otherwise a second kernel adds up and
finishes. Where a weight takes a sum over more positions than a program holds, a kernel before these computes weights.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from diffcam_fast.backends.triton.launching import (
    ENOUGH_PROGRAMS,
    SpatialView,
    block,
    float_bits,
    inner_sizes,
    on_device_of,
    quotient,
    spatial_view,
    warps,
)
from diffcam_fast.backends.triton.tiles import (
    XGRADCAM_EPS,
    channel_offsets,
    from_bits,
    multiple,
    plus_plus_terms,
    position_offsets,
    without_negatives,
)
from diffcam_fast.reference.cam import accumulation_dtype

#: Methods that weight each channel by a sum over positions.
WEIGHTED = ("gradcam", "gradcam++", "xgradcam")

# Tiles: positions that one program holds where it needs all of them, and elements that it holds at most.
_MOST_POSITIONS = 4096
_MOST_POSITIONS_CHANNELS_LAST = 256
_TILE = 2048
_LARGE_TILE = 8192
_POSITIONS = 64
_CHANNELS = 32


@triton.jit
def _finished(raw, inside, eps, RELU: tl.constexpr, NORMALIZE: tl.constexpr):
    """ReLU and normalisation of whole maps (targets, positions)."""
    if RELU:
        raw = without_negatives(raw)
    if NORMALIZE == "none":
        return raw
    high, low, broken = _extrema(raw, inside)
    return _normalized(raw, high, low, broken, eps, NORMALIZE)


@triton.jit
def _extrema(maps, inside):
    """Maximum and minimum over positions, and whether there is a NaN, which these two do not tell."""
    high = tl.max(tl.where(inside, maps, float("-inf")), 1, keep_dims=True)
    low = tl.min(tl.where(inside, maps, float("inf")), 1, keep_dims=True)
    broken = tl.max((inside & (maps != maps)).to(tl.int32), 1, keep_dims=True)
    return high, low, broken


@triton.jit
def _normalized(maps, high, low, broken, eps, NORMALIZE: tl.constexpr):
    high = tl.where(broken > 0, float("nan"), high)
    if NORMALIZE == "max":
        return maps / (high + eps)
    return (maps - low) / (high - low + eps)


@triton.jit
def _pool(
    activations, gradients, out, targets, channels, positions, splits, tiles, eps_bits, size1, size2,
    a_image, a_channel, a_stride0, a_stride1, a_stride2,
    g_image, g_target, g_channel, g_stride0, g_stride1, g_stride2,
    METHOD: tl.constexpr, CONSTANT: tl.constexpr, FINISH: tl.constexpr, RELU: tl.constexpr, NORMALIZE: tl.constexpr,
    A_FLAT: tl.constexpr, G_FLAT: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr,
    TARGETS: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Sums over a split of the channels, (images, targets, splits, positions), or finished maps where there is one.

    Weighted methods need all positions in one tile, unless a constant gradient is the weight itself.
    """
    ACCUMULATOR: tl.constexpr = tl.float64 if activations.dtype.element_ty == tl.float64 else tl.float32
    positions = multiple(positions, VECTOR)
    # Programs on the same activations follow each other, so that all but the first find them in the cache.
    groups = tl.cdiv(targets, TARGETS)
    blocks = tl.cdiv(positions, POSITIONS)
    program = tl.program_id(0)
    group = program % groups
    program = program // groups
    position_block = program % blocks
    program = program // blocks
    split = program % splits
    image = (program // splits).to(tl.int64)

    t = group * TARGETS + tl.arange(0, TARGETS)
    p = position_block * POSITIONS + tl.arange(0, POSITIONS)
    p_inside = p < positions
    t_inside = t < targets
    a_offsets = position_offsets(p, size1, size2, a_stride0, a_stride1, a_stride2, A_FLAT, WIDE)
    a_start = activations + image * multiple(a_image, VECTOR)
    G_VECTOR: tl.constexpr = 1 if CONSTANT else VECTOR
    g_start = gradients + image * multiple(g_image, G_VECTOR) + t.to(tl.int64)[:, None] * multiple(g_target, G_VECTOR)

    sums = tl.zeros((TARGETS, CHANNELS, POSITIONS), ACCUMULATOR)
    for tile in range(tiles):
        c = (split * tiles + tile) * CHANNELS + tl.arange(0, CHANNELS)
        c_inside = c < channels
        a_tile = a_start + (channel_offsets(c, multiple(a_channel, VECTOR), WIDE)[:, None] + a_offsets[None, :])
        a = tl.load(a_tile, mask=c_inside[:, None] & p_inside[None, :], other=0).to(ACCUMULATOR)[None, :, :]
        g_rows = g_start + channel_offsets(c, multiple(g_channel, G_VECTOR), WIDE)[None, :]
        g_inside = t_inside[:, None] & c_inside[None, :]
        if CONSTANT:
            g = tl.load(g_rows, mask=g_inside, other=0).to(ACCUMULATOR)[:, :, None]
        else:
            g_offsets = position_offsets(p, size1, size2, g_stride0, g_stride1, g_stride2, G_FLAT, WIDE)
            g_mask = g_inside[:, :, None] & p_inside[None, None, :]
            g = tl.load(g_rows[:, :, None] + g_offsets[None, None, :], mask=g_mask, other=0).to(ACCUMULATOR)

        if METHOD == "hirescam":
            sums += g * a
        elif METHOD == "layercam":
            sums += without_negatives(g) * a
        elif METHOD == "elementwise":
            sums += without_negatives(g * a)
        elif METHOD == "gradcam":
            sums += (g if CONSTANT else tl.sum(g, 2, keep_dims=True) / positions) * a
        else:
            total = tl.sum(a, 2, keep_dims=True)
            if METHOD == "xgradcam":
                product = g * total if CONSTANT else tl.sum(g * a, 2, keep_dims=True)
                sums += product / (total + XGRADCAM_EPS) * a
            else:
                terms = plus_plus_terms(g, total)
                sums += (terms * positions if CONSTANT else tl.sum(terms, 2, keep_dims=True)) * a

    raw = tl.sum(sums, 1)
    inside = t_inside[:, None] & p_inside[None, :]
    if FINISH:
        raw = _finished(raw, inside, from_bits(eps_bits, ACCUMULATOR), RELU, NORMALIZE)
    rows = ((image * targets + t)[:, None] * splits + split) * positions
    tl.store(out + rows + p[None, :], raw, mask=inside)


@triton.jit
def _weigh(
    activations, gradients, out, targets, channels, positions, size1, size2,
    a_image, a_channel, a_stride0, a_stride1, a_stride2,
    g_image, g_target, g_channel, g_stride0, g_stride1, g_stride2,
    METHOD: tl.constexpr, CONSTANT: tl.constexpr, A_FLAT: tl.constexpr, G_FLAT: tl.constexpr, WIDE: tl.constexpr,
    VECTOR: tl.constexpr, TARGETS: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Weights (images, targets, channels) of weighted methods, over any number of positions."""
    ACCUMULATOR: tl.constexpr = tl.float64 if activations.dtype.element_ty == tl.float64 else tl.float32
    positions = multiple(positions, VECTOR)
    groups = tl.cdiv(targets, TARGETS)
    channel_blocks = tl.cdiv(channels, CHANNELS)
    program = tl.program_id(0)
    group = program % groups
    program = program // groups
    c = program % channel_blocks * CHANNELS + tl.arange(0, CHANNELS)
    image = (program // channel_blocks).to(tl.int64)

    t = group * TARGETS + tl.arange(0, TARGETS)
    c_inside = c < channels
    g_inside = (t < targets)[:, None] & c_inside[None, :]
    a_start = activations + image * multiple(a_image, VECTOR)
    a_rows = a_start + channel_offsets(c, multiple(a_channel, VECTOR), WIDE)
    G_VECTOR: tl.constexpr = 1 if CONSTANT else VECTOR
    g_start = gradients + image * multiple(g_image, G_VECTOR) + t.to(tl.int64)[:, None] * multiple(g_target, G_VECTOR)
    g_rows = g_start + channel_offsets(c, multiple(g_channel, G_VECTOR), WIDE)[None, :]

    total = tl.zeros((1, CHANNELS, 1), ACCUMULATOR)
    if METHOD == "gradcam++" or CONSTANT:
        totals = tl.zeros((CHANNELS, POSITIONS), ACCUMULATOR)
        for start in range(0, positions, POSITIONS):
            p = start + tl.arange(0, POSITIONS)
            a_offsets = position_offsets(p, size1, size2, a_stride0, a_stride1, a_stride2, A_FLAT, WIDE)
            a_mask = c_inside[:, None] & (p < positions)[None, :]
            totals += tl.load(a_rows[:, None] + a_offsets[None, :], mask=a_mask, other=0).to(ACCUMULATOR)
        total = tl.sum(totals, 1)[None, :, None]

    if CONSTANT:
        g = tl.load(g_rows, mask=g_inside, other=0).to(ACCUMULATOR)[:, :, None]
        weights = plus_plus_terms(g, total) * positions
        if METHOD == "xgradcam":
            weights = g * total / (total + XGRADCAM_EPS)
    else:
        sums = tl.zeros((TARGETS, CHANNELS, POSITIONS), ACCUMULATOR)
        totals = tl.zeros((CHANNELS, POSITIONS), ACCUMULATOR)
        for start in range(0, positions, POSITIONS):
            p = start + tl.arange(0, POSITIONS)
            p_inside = p < positions
            g_offsets = position_offsets(p, size1, size2, g_stride0, g_stride1, g_stride2, G_FLAT, WIDE)
            g_mask = g_inside[:, :, None] & p_inside[None, None, :]
            g = tl.load(g_rows[:, :, None] + g_offsets[None, None, :], mask=g_mask, other=0).to(ACCUMULATOR)
            if METHOD == "gradcam":
                sums += g
            elif METHOD == "xgradcam":
                a_offsets = position_offsets(p, size1, size2, a_stride0, a_stride1, a_stride2, A_FLAT, WIDE)
                a_mask = c_inside[:, None] & p_inside[None, :]
                a = tl.load(a_rows[:, None] + a_offsets[None, :], mask=a_mask, other=0).to(ACCUMULATOR)
                totals += a
                sums += g * a[None, :, :]
            else:
                sums += plus_plus_terms(g, total)
        weights = tl.sum(sums, 2, keep_dims=True)
        if METHOD == "gradcam":
            weights = weights / positions
        elif METHOD == "xgradcam":
            weights = weights / (tl.sum(totals, 1)[None, :, None] + XGRADCAM_EPS)
    rows = (image * targets + t)[:, None] * channels + c[None, :]
    tl.store(out + rows[:, :, None], weights, mask=g_inside[:, :, None])


@triton.jit
def _added_up(partial, p, inside, splits, positions, SPLITS: tl.constexpr, POSITIONS: tl.constexpr):
    """One map's sums over all splits, (1, positions)."""
    sums = tl.zeros((SPLITS, POSITIONS), partial.dtype.element_ty)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        mask = (split < splits)[:, None] & inside
        sums += tl.load(partial + split[:, None] * positions + p[None, :], mask=mask, other=0)
    return tl.sum(sums, 0, keep_dims=True)


@triton.jit
def _finish(
    partials, maps, splits, positions, eps_bits,
    RELU: tl.constexpr, NORMALIZE: tl.constexpr, WHOLE: tl.constexpr, SPLITS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Finished maps from (maps, splits, positions), each map by one program, or by several where nothing is shared.

    Adding up again for the second pass over a map that exceeds one tile gives the same bits as reading back what the
    program's other threads have written, and needs no barrier.
    """
    eps = from_bits(eps_bits, partials.dtype.element_ty)
    row = tl.program_id(0).to(tl.int64)
    partial = partials + row * splits * positions
    lanes = tl.arange(0, POSITIONS)
    if WHOLE:
        p = tl.program_id(1) * POSITIONS + lanes
        inside = (p < positions)[None, :]
        raw = _added_up(partial, p, inside, splits, positions, SPLITS, POSITIONS)
        done = _finished(raw, inside, eps, RELU, NORMALIZE)
        tl.store(maps + row * positions + p[None, :], done, mask=inside)
    else:
        high = tl.full((1, POSITIONS), float("-inf"), partials.dtype.element_ty)
        low = tl.full((1, POSITIONS), float("inf"), partials.dtype.element_ty)
        broken = tl.zeros((1, POSITIONS), tl.int32)
        for start in range(0, positions, POSITIONS):
            p = start + lanes
            inside = (p < positions)[None, :]
            raw = _added_up(partial, p, inside, splits, positions, SPLITS, POSITIONS)
            if RELU:
                raw = without_negatives(raw)
            high = tl.where(inside & (raw > high), raw, high)
            low = tl.where(inside & (raw < low), raw, low)
            broken = tl.where(inside & (raw != raw), 1, broken)
        high = tl.max(high, 1, keep_dims=True)
        low = tl.min(low, 1, keep_dims=True)
        broken = tl.max(broken, 1, keep_dims=True)
        for start in range(0, positions, POSITIONS):
            p = start + lanes
            inside = (p < positions)[None, :]
            raw = _added_up(partial, p, inside, splits, positions, SPLITS, POSITIONS)
            if RELU:
                raw = without_negatives(raw)
            done = _normalized(raw, high, low, broken, eps, NORMALIZE)
            tl.store(maps + row * positions + p[None, :], done, mask=inside)


def cam(activations: Tensor, gradients: Tensor, method: str, relu: bool, normalize: str, eps: float) -> Tensor:
    """Finished maps: `diffcam_fast.reference.cam.cam`, its arguments and results, on a GPU."""
    with on_device_of(activations):
        return _cam(activations, gradients, method, relu, normalize, eps, traced=False)


@triton_op("diffcam_fast_triton::cam", mutates_args=())
def cam_op(activations: Tensor, gradients: Tensor, method: str, relu: bool, normalize: str, eps: float) -> Tensor:
    """`cam` as an op that `torch.compile` sees through."""
    return _cam(activations, gradients, method, relu, normalize, eps, traced=True)


def _cam(
    activations: Tensor, gradients: Tensor, method: str, relu: bool, normalize: str, eps: float, traced: bool
) -> Tensor:
    dtype = accumulation_dtype(activations.dtype)
    images, targets = gradients.shape[:2]
    maps = activations.new_empty((images, targets, *activations.shape[2:]), dtype=dtype)
    if maps.numel() == 0:
        return maps
    channels = activations.shape[1]
    positions = math.prod(activations.shape[2:])
    constant = gradients.dim() == 3
    a = spatial_view(activations, 2)
    g = spatial_view(gradients, 3)
    options = layout_options(a, g, positions, constant)
    narrower = 2 if dtype == torch.float64 else 1
    sizes = inner_sizes(activations, 2)
    eps_bits = float_bits(eps)
    group = block(targets, 4)

    # Where positions lie side by side, a tile may hold few channels; elsewhere it needs some for each access.
    rows = a.spatial[2] == 1 and g.spatial[2] == 1
    weigh = method in WEIGHTED and not (constant and method == "gradcam")
    if weigh and positions > (_MOST_POSITIONS if rows else _MOST_POSITIONS_CHANNELS_LAST) // narrower:
        weights = activations.new_empty((images, targets, channels), dtype=dtype)
        most_channels, across = (4, 512) if rows else (32, 64)
        across, group = across // narrower, min(group, 2)
        blocks = quotient(channels, most_channels)
        if channels > 0:
            launch = wrap_triton(_weigh) if traced else _weigh
            launch[(images * blocks * quotient(targets, group),)](
                activations, gradients, weights, targets, channels, positions, *sizes, *a.strides, *g.strides,
                METHOD=method, CONSTANT=constant, **options,
                TARGETS=group, CHANNELS=most_channels, POSITIONS=across, num_warps=4 * group,
            )  # fmt: skip
        gradients, method, constant, weigh = weights, "gradcam", True, False
        g = spatial_view(weights, 3)
        options = layout_options(a, g, positions, constant)

    if weigh:
        across = block(positions, _MOST_POSITIONS, 16)
        elements, least = (_TILE, 1) if rows else (_LARGE_TILE, _CHANNELS // 2)
        group = min(group, max(elements // across // least, 1))
        depth = min(max(elements // across // group // narrower, 1), _CHANNELS)
    else:
        across = block(positions, _POSITIONS, 16)
        depth = _CHANNELS // max(group // 2, 1) // narrower
    depth = min(depth, block(channels, depth))
    blocks = 1 if weigh else quotient(positions, across)

    tiles = quotient(channels, depth)
    programs = images * quotient(targets, group) * blocks
    splits = 1
    while programs * splits < ENOUGH_PROGRAMS and splits < tiles:
        splits *= 2
    tiles = quotient(tiles, splits)
    finish = splits == 1 and (blocks == 1 or normalize == "none")
    out = maps if finish else activations.new_empty((images, targets, splits, positions), dtype=dtype)
    launch = wrap_triton(_pool) if traced else _pool
    launch[(programs * splits,)](
        activations, gradients, out, targets, channels, positions, splits, tiles, eps_bits, *sizes,
        *a.strides, *g.strides, METHOD=method, CONSTANT=constant, FINISH=finish, RELU=relu, NORMALIZE=normalize,
        **options, TARGETS=group, CHANNELS=depth, POSITIONS=across, num_warps=warps(group * depth * across * narrower),
    )  # fmt: skip
    if finish:
        return maps

    across = block(positions, 1024, 16)
    whole = positions <= across or normalize == "none"
    launch = wrap_triton(_finish) if traced else _finish
    launch[(images * targets, quotient(positions, across) if whole else 1)](
        out, maps, splits, positions, eps_bits,
        RELU=relu, NORMALIZE=normalize, WHOLE=whole, SPLITS=block(splits, _TILE // across), POSITIONS=across,
        num_warps=4,
    )  # fmt: skip
    return maps


def layout_options(a: SpatialView, g: SpatialView, positions: int, constant: bool) -> dict[str, bool | int]:
    """What the kernels are compiled for, of the layouts of activations and gradients."""
    # Multiples of 16 are seen anyway.
    vector = 4 if positions % 4 == 0 and positions % 16 != 0 else 1
    if not a.rows_start_at_multiples_of(vector) or not (constant or g.rows_start_at_multiples_of(vector)):
        vector = 1
    return {"A_FLAT": a.flat, "G_FLAT": g.flat, "WIDE": a.wide or g.wide, "VECTOR": vector}
