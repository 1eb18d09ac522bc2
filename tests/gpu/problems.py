"""Inputs as networks lay them out in memory, and how far results may be from the float64 reference on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from diffcam_fast.reference.cam import cam as reference_cam
from diffcam_fast.reference.cam import raw_cam
from tests.gpu.cases import DEVICE, Failures, generator, largest
from tests.tolerances import HALF_ERROR_RATIO, MAP_SHARE_OF_RANGE

#: Sizes of real networks and awkward ones, one to three dimensions of positions.
SHAPES: tuple[tuple[int, ...], ...] = (
    (1, 2048, 7, 7),
    (13, 130, 7, 7),
    (3, 67, 14, 14),
    (2, 64, 28, 28),
    (2, 19, 57, 61),
    (1, 3, 112, 112),
    (2, 1030, 13, 14),
    (5, 13, 1, 2),
    (3, 1, 3, 3),
    (3, 33, 50),
    (2, 768, 196),
    (2, 9, 1),
    (2, 17, 3, 5, 7),
    (1, 40, 8, 8, 8),
)

#: ReLU, normalisation, eps. "max" without ReLU divides by what may be nearly nothing, and measures no kernel.
FINISHES = ((True, "minmax", 1e-7), (False, "none", 1e-7), (True, "max", 1e-3), (False, "minmax", 1e-3))


def channels_last(values: Tensor) -> Tensor:
    """Channels innermost in memory, whatever the rank."""
    return values.movedim(1, -1).contiguous().movedim(-1, 1)


def _embedded(values: Tensor) -> Tensor:
    """Every second element of a larger tensor whose other elements are NaN."""
    wide = values.new_full([2 * size for size in values.shape], math.nan)
    return wide[tuple(slice(None, None, 2) for _ in values.shape)].copy_(values)


def _tokens(values: Tensor) -> Tensor:
    """Channels last, behind a first position that is cut off: a transformer's tokens without the class token."""
    flat = values.flatten(2).transpose(1, 2)
    tokens = torch.cat([torch.full_like(flat[:, :1], math.nan), flat], 1)
    return tokens[:, 1:].transpose(1, 2).unflatten(2, values.shape[2:])


def _off_by_one(values: Tensor) -> Tensor:
    """Contiguous, but one element past an aligned address."""
    buffer = values.new_full((values.numel() + 1,), math.nan)
    return buffer[1:].view(values.shape).copy_(values)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda values: values.contiguous(),
    "channels-last": channels_last,
    "strided": _embedded,
    "tokens": _tokens,
    "off by one": _off_by_one,
}

#: Gradients may also be given once for all positions, or as an expansion of that.
GRADIENT_LAYOUTS = (*LAYOUTS, "constant", "expanded")


@dataclass(frozen=True)
class Problem:
    """Activations (N, C, *S) and gradients (N, T, C, *S) or (N, T, C) on the device, and their values on the CPU."""

    name: str
    activations: Tensor
    gradients: Tensor
    plain_activations: Tensor
    plain_gradients: Tensor


def problem(
    shape: tuple[int, ...], targets: int, dtype: torch.dtype, layout: str, gradient_layout: str, seed: int = 0
) -> Problem:
    """Random inputs, laid out in memory as asked."""
    source = generator(seed)
    images, channels, *spatial = shape
    activations = torch.rand(shape, generator=source, dtype=torch.float64).to(dtype)
    once = gradient_layout in ("constant", "expanded")
    full = (images, targets, channels) if once else (images, targets, *shape[1:])
    gradients = torch.randn(full, generator=source, dtype=torch.float64).to(dtype)
    on_device = gradients.to(DEVICE)
    if gradient_layout == "expanded":
        gradients = gradients.reshape(*full, *[1] * len(spatial)).expand(*full, *spatial)
        on_device = on_device.reshape(*full, *[1] * len(spatial)).expand(*full, *spatial)
    elif not once:
        on_device = LAYOUTS[gradient_layout](on_device.flatten(0, 1)).unflatten(0, (images, targets))
    return Problem(
        f"{'x'.join(map(str, shape))}, {targets} targets, {layout} and {gradient_layout}",
        LAYOUTS[layout](activations.to(DEVICE)),
        on_device,
        activations,
        gradients,
    )


def problems(dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> Iterator[Problem]:
    """Every shape in several pairs of layouts, every layout of gradients among them, with one and three targets."""
    layouts, gradient_layouts = list(LAYOUTS), list(GRADIENT_LAYOUTS)
    for index, shape in enumerate(shapes):
        yield problem(shape, 1, dtype, "contiguous", "contiguous", index)
        yield problem(shape, 1, dtype, "channels-last", "channels-last", index)
        for turn in range(3):
            layout = layouts[(index + turn) % len(layouts)]
            gradient_layout = gradient_layouts[(2 * index + 3 * turn) % len(gradient_layouts)]
            yield problem(shape, 1 + 2 * (turn % 2), dtype, layout, gradient_layout, index)


def compare_maps(
    failures: Failures, found: Tensor, given: Problem, method: str, finish: tuple[bool, str, float]
) -> None:
    """Compare maps with the float64 reference, in units of what each map was made from."""
    options = (method, *finish)
    what = f"{given.name}, relu {finish[0]}, {finish[1]}"
    activations, gradients = given.plain_activations, given.plain_gradients
    exact = reference_cam(activations.double(), gradients.double(), *options)
    wide = activations.dtype == torch.float64
    failures.check(found.dtype == (torch.float64 if wide else torch.float32), f"{what}: dtype {found.dtype}")
    failures.check(found.shape == exact.shape, f"{what}: shape {tuple(found.shape)}")
    failures.check(found.is_contiguous(), f"{what}: not contiguous")
    if found.shape != exact.shape:
        return
    unit = _size_of_raw_maps(activations, gradients, options)
    error = largest((found.cpu().double() - exact) / unit)
    if activations.dtype in MAP_SHARE_OF_RANGE:
        allowed = MAP_SHARE_OF_RANGE[activations.dtype]
    else:
        plain = reference_cam(activations, gradients, *options)
        allowed = HALF_ERROR_RATIO * largest((plain.double() - exact) / unit) + MAP_SHARE_OF_RANGE[torch.float32]
    failures.at_most(error, allowed, what)


def _size_of_raw_maps(activations: Tensor, gradients: Tensor, options: tuple) -> Tensor:
    """How large the values of each map were before ReLU and normalisation, in units of the finished map.

    What rounds is the raw map. Where its values differ little, or ReLU leaves but the tip of a map whose bulk is
    negative, normalisation magnifies what is left, and its rounding too.
    """
    method, relu, normalize, eps = options
    raw = raw_cam(activations.double(), gradients.double(), method)
    positions = tuple(range(2, raw.dim()))
    size = raw.abs().amax(positions, keepdim=True)
    if normalize == "none":
        return size.clamp_min(1e-12)
    finished = raw.relu() if relu else raw
    low = finished.amin(positions, keepdim=True) if normalize == "minmax" else 0
    return (size / (finished.amax(positions, keepdim=True) - low + eps)).clamp_min(1)
