"""Gradient of raw class activation maps in Triton.

A first kernel takes the sums over positions that weighted methods and constant gradients need; a second writes the
gradients, position by position. Methods that work position by position need the second alone.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from diffcam_fast.backends.triton.cam import WEIGHTED, layout_options
from diffcam_fast.backends.triton.launching import (
    block,
    inner_sizes,
    on_device_of,
    quotient,
    spatial_view,
    warps,
)
from diffcam_fast.backends.triton.tiles import (
    PLUS_PLUS_EPS,
    XGRADCAM_EPS,
    channel_offsets,
    multiple,
    plus_plus_terms,
    position_offsets,
    without_negatives,
)
from diffcam_fast.reference.cam import accumulation_dtype

_CHANNELS = 32
_POSITIONS = 64
_LARGE_POSITIONS = 256


@triton.jit
def _slope(g, total):
    """Derivative of `plus_plus_terms` in the gradients."""
    positive = without_negatives(g)
    square = positive * positive
    divisor = 2 * square + total * square * positive + PLUS_PLUS_EPS
    return square * (2 * square + 3 * PLUS_PLUS_EPS) / (divisor * divisor)


@triton.jit
def _counted(evidence):
    """1 where the evidence is positive, else 0."""
    return tl.where(evidence > 0, 1, 0).to(evidence.dtype)


@triton.jit
def _load_tile(start, channel_stride, c, channels, p, positions, size1, size2, stride0, stride1, stride2,
               FLAT: tl.constexpr, WIDE: tl.constexpr, VECTOR: tl.constexpr, ACCUMULATOR: tl.constexpr):  # fmt: skip
    """A tile (channels, positions) of one image's activations or one target's gradients."""
    rows = channel_offsets(c, multiple(channel_stride, VECTOR), WIDE)
    offsets = position_offsets(p, size1, size2, stride0, stride1, stride2, FLAT, WIDE)
    mask = (c < channels)[:, None] & (p < positions)[None, :]
    return tl.load(start + (rows[:, None] + offsets[None, :]), mask=mask, other=0).to(ACCUMULATOR)


@triton.jit
def _sum_up(
    grad_raw, activations, gradients, sums, grad_gradients, images, targets, channels, positions, size1, size2,
    a_image, a_channel, a_stride0, a_stride1, a_stride2,
    g_image, g_target, g_channel, g_stride0, g_stride1, g_stride2, dg_image, dg_target, dg_channel,
    METHOD: tl.constexpr, CONSTANT: tl.constexpr, WRITE: tl.constexpr, A_FLAT: tl.constexpr, G_FLAT: tl.constexpr,
    WIDE: tl.constexpr, VECTOR: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Four sums, each (images, targets, channels).

    The weight, its gradient, the sum of activations, and in gradcam++ the derivative of the weight in that sum. Where
    gradients are constant, `WRITE` asks for theirs, complete.
    """
    ACCUMULATOR: tl.constexpr = grad_raw.dtype.element_ty
    G_VECTOR: tl.constexpr = 1 if CONSTANT else VECTOR
    positions = multiple(positions, VECTOR)
    target = tl.program_id(0) % targets
    program = tl.program_id(0) // targets
    blocks = tl.cdiv(channels, CHANNELS)
    c = program % blocks * CHANNELS + tl.arange(0, CHANNELS)
    image = (program // blocks).to(tl.int64)
    c_inside = c < channels
    row = image * targets + target

    a_start = activations + image * multiple(a_image, VECTOR)
    g_start = gradients + image * multiple(g_image, G_VECTOR) + target.to(tl.int64) * multiple(g_target, G_VECTOR)
    if CONSTANT:
        g = tl.load(g_start + channel_offsets(c, g_channel, WIDE), mask=c_inside, other=0).to(ACCUMULATOR)[:, None]

    totals = tl.zeros((CHANNELS, POSITIONS), ACCUMULATOR)
    grad_weights = tl.zeros((CHANNELS, POSITIONS), ACCUMULATOR)
    weights = tl.zeros((CHANNELS, POSITIONS), ACCUMULATOR)
    by_total = tl.zeros((CHANNELS, POSITIONS), ACCUMULATOR)
    for start in range(0, positions, POSITIONS):
        p = start + tl.arange(0, POSITIONS)
        a = _load_tile(a_start, a_channel, c, channels, p, positions, size1, size2, a_stride0, a_stride1, a_stride2,
                       A_FLAT, WIDE, VECTOR, ACCUMULATOR)  # fmt: skip
        grad = tl.load(grad_raw + row * positions + p, mask=p < positions, other=0)[None, :]
        if METHOD == "layercam":
            grad_weights += grad * a * _counted(g)
        elif METHOD == "elementwise":
            grad_weights += grad * a * _counted(g * a)
        else:
            grad_weights += grad * a
        totals += a
        if not CONSTANT and (METHOD == "gradcam" or METHOD == "xgradcam"):
            g = _load_tile(g_start, g_channel, c, channels, p, positions, size1, size2,
                           g_stride0, g_stride1, g_stride2, G_FLAT, WIDE, VECTOR, ACCUMULATOR)  # fmt: skip
            weights += g if METHOD == "gradcam" else g * a
    total = tl.sum(totals, 1, keep_dims=True)
    grad_weight = tl.sum(grad_weights, 1, keep_dims=True)

    if METHOD == "gradcam++" and not CONSTANT:
        for start in range(0, positions, POSITIONS):
            p = start + tl.arange(0, POSITIONS)
            g = _load_tile(g_start, g_channel, c, channels, p, positions, size1, size2,
                           g_stride0, g_stride1, g_stride2, G_FLAT, WIDE, VECTOR, ACCUMULATOR)  # fmt: skip
            terms = plus_plus_terms(g, total)
            weights += terms
            by_total -= terms * terms
    weight = tl.sum(weights, 1, keep_dims=True)
    derivative = tl.sum(by_total, 1, keep_dims=True)
    if CONSTANT:
        if METHOD == "xgradcam":
            weight = g * total
        elif METHOD == "gradcam++":
            terms = plus_plus_terms(g, total)
            weight = terms * positions
            derivative = -terms * terms * positions
        else:
            weight = g
    elif METHOD == "gradcam":
        weight = weight / positions
    if METHOD == "xgradcam":
        weight = weight / (total + XGRADCAM_EPS)

    inside = c_inside[:, None]
    size = images.to(tl.int64) * targets * channels
    place = sums + row * channels + c[:, None]
    tl.store(place, weight, mask=inside)
    tl.store(place + size, grad_weight, mask=inside)
    tl.store(place + 2 * size, total, mask=inside)
    tl.store(place + 3 * size, derivative, mask=inside)
    if WRITE:
        grad_g = grad_weight
        if METHOD == "xgradcam":
            grad_g = grad_weight * total / (total + XGRADCAM_EPS)
        elif METHOD == "gradcam++":
            grad_g = grad_weight * _slope(g, total) * positions
        written = grad_gradients + image * dg_image + target.to(tl.int64) * dg_target
        written += channel_offsets(c, dg_channel, WIDE)[:, None]
        tl.store(written, grad_g.to(grad_gradients.dtype.element_ty), mask=inside)


@triton.jit
def _spread(
    grad_raw, activations, gradients, sums, grad_activations, grad_gradients,
    images, targets, channels, positions, size1, size2,
    a_image, a_channel, a_stride0, a_stride1, a_stride2,
    g_image, g_target, g_channel, g_stride0, g_stride1, g_stride2,
    da_image, da_channel, da_stride0, da_stride1, da_stride2,
    dg_image, dg_target, dg_channel, dg_stride0, dg_stride1, dg_stride2,
    METHOD: tl.constexpr, CONSTANT: tl.constexpr, FOR_ACTIVATIONS: tl.constexpr, FOR_GRADIENTS: tl.constexpr,
    A_FLAT: tl.constexpr, G_FLAT: tl.constexpr, DA_FLAT: tl.constexpr, DG_FLAT: tl.constexpr,
    WIDE: tl.constexpr, VECTOR: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Gradients of some channels and positions: with respect to activations, the sum over targets, and to gradients."""
    ACCUMULATOR: tl.constexpr = grad_raw.dtype.element_ty
    WEIGHTED: tl.constexpr = METHOD == "gradcam" or METHOD == "gradcam++" or METHOD == "xgradcam"
    G_VECTOR: tl.constexpr = 1 if CONSTANT else VECTOR
    positions = multiple(positions, VECTOR)
    position_blocks = tl.cdiv(positions, POSITIONS)
    p = tl.program_id(0) % position_blocks * POSITIONS + tl.arange(0, POSITIONS)
    program = tl.program_id(0) // position_blocks
    channel_blocks = tl.cdiv(channels, CHANNELS)
    c = program % channel_blocks * CHANNELS + tl.arange(0, CHANNELS)
    image = (program // channel_blocks).to(tl.int64)
    inside = (c < channels)[:, None] & (p < positions)[None, :]
    size = images.to(tl.int64) * targets * channels

    a = _load_tile(activations + image * multiple(a_image, VECTOR), a_channel, c, channels, p, positions, size1, size2,
                   a_stride0, a_stride1, a_stride2, A_FLAT, WIDE, VECTOR, ACCUMULATOR)  # fmt: skip
    grad_a = tl.zeros((CHANNELS, POSITIONS), ACCUMULATOR)
    for target in range(targets):
        row = image * targets + target
        grad = tl.load(grad_raw + row * positions + p, mask=p < positions, other=0)[None, :]
        g_start = (
            gradients + image * multiple(g_image, G_VECTOR) + tl.cast(target, tl.int64) * multiple(g_target, G_VECTOR)
        )
        if CONSTANT:
            g = tl.load(g_start + channel_offsets(c, g_channel, WIDE), mask=c < channels, other=0)
            g = g.to(ACCUMULATOR)[:, None]
        else:
            g = _load_tile(g_start, g_channel, c, channels, p, positions, size1, size2,
                           g_stride0, g_stride1, g_stride2, G_FLAT, WIDE, VECTOR, ACCUMULATOR)  # fmt: skip
        if WEIGHTED:
            place = sums + row * channels + c[:, None]
            mask = (c < channels)[:, None]
            weight = tl.load(place, mask=mask, other=0)
            grad_weight = tl.load(place + size, mask=mask, other=0)
            total = tl.load(place + 2 * size, mask=mask, other=0)
            grad_a += grad * weight
            if METHOD == "gradcam":
                grad_g = tl.broadcast_to(grad_weight / positions, (CHANNELS, POSITIONS))
            elif METHOD == "xgradcam":
                divisor = total + XGRADCAM_EPS
                grad_a += grad_weight * (g - weight) / divisor
                grad_g = grad_weight * a / divisor
            else:
                grad_a += grad_weight * tl.load(place + 3 * size, mask=mask, other=0)
                grad_g = grad_weight * _slope(g, total) + tl.zeros_like(a)
        elif METHOD == "hirescam":
            grad_a += grad * g
            grad_g = grad * a
        else:
            counted = _counted(g if METHOD == "layercam" else g * a)
            grad_a += grad * g * counted
            grad_g = grad * a * counted
        if FOR_GRADIENTS:
            written = grad_gradients + image * dg_image + tl.cast(target, tl.int64) * dg_target
            rows = channel_offsets(c, dg_channel, WIDE)
            columns = position_offsets(p, size1, size2, dg_stride0, dg_stride1, dg_stride2, DG_FLAT, WIDE)
            grad_g = grad_g.to(grad_gradients.dtype.element_ty)
            tl.store(written + (rows[:, None] + columns[None, :]), grad_g, mask=inside)
    if FOR_ACTIVATIONS:
        rows = channel_offsets(c, da_channel, WIDE)
        columns = position_offsets(p, size1, size2, da_stride0, da_stride1, da_stride2, DA_FLAT, WIDE)
        written = grad_activations + image * da_image + (rows[:, None] + columns[None, :])
        tl.store(written, grad_a.to(grad_activations.dtype.element_ty), mask=inside)


def cam_backward(
    grad_raw: Tensor,
    activations: Tensor,
    gradients: Tensor,
    method: str,
    for_activations: bool,
    for_gradients: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of raw maps: `diffcam_fast.reference.cam.cam_backward`, its arguments and results, on a GPU."""
    with on_device_of(activations):
        return _cam_backward(grad_raw, activations, gradients, method, for_activations, for_gradients, traced=False)


@triton_op("diffcam_fast_triton::cam_backward", mutates_args=())
def cam_backward_op(
    grad_raw: Tensor,
    activations: Tensor,
    gradients: Tensor,
    method: str,
    for_activations: bool,
    for_gradients: bool,
) -> tuple[Tensor, Tensor]:
    """`cam_backward` as an op that `torch.compile` sees through."""
    return _cam_backward(grad_raw, activations, gradients, method, for_activations, for_gradients, traced=True)


def _cam_backward(
    grad_raw: Tensor,
    activations: Tensor,
    gradients: Tensor,
    method: str,
    for_activations: bool,
    for_gradients: bool,
    traced: bool,
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(activations.dtype)
    images, targets, channels = gradients.shape[:3]
    positions = math.prod(activations.shape[2:])
    constant = gradients.dim() == 3
    grad_activations = torch.empty_like(activations) if for_activations else activations.new_empty(0)
    grad_gradients = torch.empty_like(gradients) if for_gradients else gradients.new_empty(0)
    if images * channels == 0 or not (for_activations or for_gradients):
        return grad_activations, grad_gradients

    grad_raw = grad_raw.to(dtype).contiguous()
    a, g = spatial_view(activations, 2), spatial_view(gradients, 3)
    da = spatial_view(grad_activations, 2) if for_activations else a
    dg = spatial_view(grad_gradients, 3) if for_gradients else g
    options = layout_options(a, g, positions, constant)
    options["WIDE"] = a.wide or g.wide or da.wide or dg.wide
    sizes = inner_sizes(activations, 2)
    narrower = 2 if dtype == torch.float64 else 1
    depth = block(channels, _CHANNELS // narrower)
    blocks = quotient(channels, depth)

    weighted = method in WEIGHTED
    sums = grad_raw
    if (weighted or (constant and for_gradients)) and targets > 0:
        sums = activations.new_empty((4, images, targets, channels), dtype=dtype)
        across = block(positions, _LARGE_POSITIONS if blocks * images * targets < 64 else _POSITIONS, 16)
        launch = wrap_triton(_sum_up) if traced else _sum_up
        launch[(images * targets * blocks,)](
            grad_raw, activations, gradients, sums, grad_gradients, images, targets, channels, positions, *sizes,
            *a.strides, *g.strides, *dg.leading, METHOD=method, CONSTANT=constant, WRITE=constant and for_gradients,
            **options, CHANNELS=depth, POSITIONS=across, num_warps=warps(depth * across * narrower),
        )  # fmt: skip

    per_position = for_gradients and not constant and targets > 0
    if (for_activations or per_position) and positions > 0:
        # Divisions in float64 take many registers.
        across = block(positions, _POSITIONS // narrower, 16)
        launch = wrap_triton(_spread) if traced else _spread
        launch[(images * blocks * quotient(positions, across),)](
            grad_raw, activations, gradients, sums, grad_activations, grad_gradients,
            images, targets, channels, positions, *sizes, *a.strides, *g.strides, *da.strides, *dg.strides,
            METHOD=method, CONSTANT=constant, FOR_ACTIVATIONS=for_activations, FOR_GRADIENTS=per_position,
            **options, DA_FLAT=da.flat, DG_FLAT=dg.flat, CHANNELS=depth, POSITIONS=across,
            num_warps=warps(depth * across * narrower**2),
        )  # fmt: skip
    return grad_activations, grad_gradients
