"""Calls of `cam` and of its backward that reach every path of their kernels."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from diffcam_fast.reference.cam import METHODS, NORMALIZATIONS
from diffcam_fast.reference.cam import cam as reference_cam
from diffcam_fast.reference.cam import cam_backward as reference_backward
from tests.tolerances import MAP_SHARE_OF_RANGE

from . import ops
from .cases import DEVICES, OFFSETS, Case, choices, placed, spread_out
from .device import Device

EPS = 1e-3
REPEATS = 3  # of each shape and method, with other options
FULL_LAYOUTS = ("contiguous", "channels-last", "tokens", "strided")
GRADIENT_LAYOUTS = (*FULL_LAYOUTS, "stacked", "stacked channels-last", "expanded", "constant")

# Maps of real networks, awkward sizes, one to three dimensions, one channel, one position, few and many of either.
SHAPES = (
    (2, 1, 37, 7, 7),
    (1, 3, 256, 7, 7),
    (3, 2, 64, 14, 14),
    (1, 1, 19, 23, 29),
    (2, 1, 5, 3, 4, 5),
    (1, 2, 130, 50),
    (5, 1, 96, 1, 1),
    (2, 2, 1, 9, 7),
    (1, 1, 3, 57, 61),
    (2, 1, 8, 28, 28),
    (1, 1, 1030, 7, 7),
    (7, 1, 24, 2, 2),
)

# Enough for several blocks or clusters on one map.
LARGE_SHAPES = ((1, 1, 2048, 7, 7), (1, 1, 640, 14, 14), (2, 1, 64, 56, 56), (1, 2, 32, 112, 112), (1, 1, 9000, 5, 3))

# More maps than blocks: a block has several in turn.
MANY_MAPS = (1400, 3, 2, 3, 1)

# Little shared memory cuts small maps into tiles.
SMALL_DEVICES = (
    Device(capability=90, multiprocessors=132, shared_bytes=40 << 10),
    Device(capability=80, multiprocessors=2, shared_bytes=40 << 10),
)


def channels_last(values: Tensor) -> Tensor:
    """Channels innermost in memory, whatever the rank."""
    return values.movedim(1, -1).contiguous().movedim(-1, 1)


def lay_out(values: Tensor, layout: str) -> Tensor:
    """(N, C, *S) with the same values in another layout."""
    if layout == "contiguous":
        return values.contiguous()
    if layout == "channels-last":
        return channels_last(values)
    if layout == "strided":
        return spread_out(values)
    # A transformer's tokens, channels last, behind a class token that is cut off.
    flat = values.flatten(2).transpose(1, 2)
    tokens = torch.cat([torch.full_like(flat[:, :1], torch.nan), flat], 1)
    return tokens[:, 1:].transpose(1, 2).unflatten(2, values.shape[2:])


@dataclass
class CamCase(Case):
    """A call of `cam`: shape is (images, targets, channels, *spatial)."""

    most_launches = 2

    shape: tuple[int, ...]
    dtype: torch.dtype
    method: str
    activations_layout: str
    gradients_layout: str
    relu: bool
    normalize: str
    offset: int
    device: Device
    poison: float | None = None

    @property
    def on(self) -> Device:
        return self.device

    @property
    def is_large(self) -> bool:
        return self.shape == MANY_MAPS

    def prepare(self) -> None:
        images, targets, channels, *spatial = self.shape
        activations = torch.rand((images, channels, *spatial), generator=self.generator, dtype=torch.float64)
        gradients = torch.randn((images, targets, channels, *spatial), generator=self.generator, dtype=torch.float64)
        if self.poison is not None:
            activations[images // 2].view(-1)[activations[0].numel() // 3] = self.poison
        self.activations = placed(lay_out(activations.to(self.dtype), self.activations_layout), self.offset)
        self.gradients = placed(self.lay_out_gradients(gradients.to(self.dtype)), self.offset // 3)
        self.prepare_expected()

    def lay_out_gradients(self, gradients: Tensor) -> Tensor:
        layout = self.gradients_layout
        images, targets = gradients.shape[:2]
        if layout in ("constant", "expanded"):
            weights = gradients.flatten(3)[..., 0].contiguous()
            expanded = weights.reshape(*weights.shape, *[1] * (gradients.dim() - 3)).expand_as(gradients)
            return weights if layout == "constant" else expanded
        if layout.startswith("stacked"):
            kind = "channels-last" if "last" in layout else "contiguous"
            return torch.stack([lay_out(gradients[:, t], kind) for t in range(targets)]).transpose(0, 1)
        return lay_out(gradients.flatten(0, 1), layout).unflatten(0, (images, targets))

    def prepare_expected(self) -> None:
        arguments = self.activations.double(), self.gradients.double(), self.method
        self.expected = reference_cam(*arguments, self.relu, self.normalize, EPS)
        # In units of the range that the map had before ReLU, which may leave but its tip, and magnify its rounding.
        raw = reference_cam(*arguments, False, "none", EPS).flatten(2)
        spread = raw.abs().amax(2) if self.normalize == "none" else raw.amax(2) - raw.amin(2)
        divisor = 1.0
        if self.normalize != "none":
            finished = raw.relu() if self.relu else raw
            low = finished.amin(2) if self.normalize == "minmax" else 0
            divisor = finished.amax(2) - low + EPS
        floor = 1e-12 if self.normalize == "none" else 1
        # Where a map has an infinity, what is finite of it is compared as it is.
        self.unit = (
            (spread / divisor)
            .nan_to_num(floor, floor, floor)
            .clamp_min(floor)
            .reshape(*raw.shape[:2], *[1] * (self.expected.dim() - 2))
        )

    def run(self, library: ctypes.CDLL, device: Device) -> tuple[Tensor, ...]:
        options = (self.method, self.relu, self.normalize, EPS)
        return (ops.cam(library, device, self.activations, self.gradients, *options),)

    def verify(self, found: tuple[Tensor, ...]) -> None:
        (maps,) = found
        assert torch.equal(maps.isfinite(), self.expected.isfinite()), "finite elsewhere than the reference"
        finite = self.expected.isfinite()
        error = ((maps.double() - self.expected).abs() / self.unit)[finite]
        allowed = MAP_SHARE_OF_RANGE[maps.dtype]
        assert error.numel() == 0 or error.amax() <= allowed, f"error {error.amax():.2e} of range, allowed {allowed}"


def cam_cases() -> list[CamCase]:
    """The sweep; every pair of method and layout on every shape would take too long, so they take turns."""
    cases = []
    dtypes = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
    for number, (shape, _, method) in enumerate(product(SHAPES, range(REPEATS), METHODS)):
        choice = choices(number)
        small = number % 4 == 3
        # Nearly nothing divides the maps under "max" without ReLU: that ratio is no measure of the kernel.
        normalize = choice(NORMALIZATIONS)
        cases.append(
            CamCase(
                shape,
                choice(dtypes),
                method,
                choice(FULL_LAYOUTS),
                choice(GRADIENT_LAYOUTS),
                choice((True, False)) or normalize == "max",
                normalize,
                choice(OFFSETS),
                choice(SMALL_DEVICES if small else DEVICES),
            )
        )
    for number, (method, layout) in enumerate(product(METHODS, ("contiguous", "channels-last"))):
        choice = choices(1000 + number)
        shape = LARGE_SHAPES[number % len(LARGE_SHAPES)]
        dtype = choice((torch.float32, torch.bfloat16))
        device = DEVICES[number % 3]
        cases.append(CamCase(shape, dtype, method, layout, layout, True, "minmax", 0, device))
    for method in ("gradcam", "hirescam"):
        cases.append(
            CamCase(MANY_MAPS, torch.float32, method, "contiguous", "contiguous", True, "minmax", 0, DEVICES[-1])
        )
    for number, method in enumerate(METHODS):
        layout = ("contiguous", "channels-last", "strided")[number % 3]
        poison = (torch.nan, torch.inf)[number % 2]
        cases.append(
            CamCase((3, 2, 21, 7, 7), torch.float32, method, layout, layout, True, "minmax", 0, DEVICES[0], poison)
        )
    return cases


@dataclass
class CamBackwardCase(CamCase):
    """A call of `cam_backward`; relu and normalize do not matter."""

    for_activations: bool = True
    for_gradients: bool = True

    def prepare_expected(self) -> None:
        images, targets, _, *spatial = self.shape
        grad_raw = torch.randn((images, targets, *spatial), generator=self.generator, dtype=torch.float64)
        self.grad_raw = grad_raw.to(torch.float64 if self.dtype == torch.float64 else torch.float32)
        exact = reference_backward(
            self.grad_raw.double(),
            self.activations.double(),
            self.gradients.double(),
            self.method,
            self.for_activations,
            self.for_gradients,
        )
        wanted = (self.for_activations, self.for_gradients)
        self.expected = tuple(gradient for gradient, is_wanted in zip(exact, wanted, strict=True) if is_wanted)

    def run(self, library: ctypes.CDLL, device: Device) -> tuple[Tensor, ...]:
        found = ops.cam_backward(
            library,
            device,
            self.grad_raw,
            self.activations,
            self.gradients,
            self.method,
            self.for_activations,
            self.for_gradients,
        )
        return tuple(gradient for gradient in found if gradient is not None)

    def verify(self, found: tuple[Tensor, ...]) -> None:
        for got, exact in zip(found, self.expected, strict=True):
            assert torch.equal(got.isfinite(), exact.to(got.dtype).isfinite()), "finite elsewhere than the reference"
            finite = exact.isfinite()
            scale = exact[finite].abs().amax().clamp_min(1e-6)
            error = ((got.double() - exact).abs() / scale)[finite].amax()
            accurate = torch.float64 if self.dtype == torch.float64 else torch.float32
            # A result in a narrow type is rounded to it, once.
            rounding = 0.0 if got.dtype == accurate else torch.finfo(got.dtype).eps / 2
            allowed = MAP_SHARE_OF_RANGE[accurate] + rounding
            assert error <= allowed, f"error {error:.2e} of the largest gradient, allowed {allowed:.2e}"


def cam_backward_cases() -> list[CamBackwardCase]:
    """The sweep of the backward."""
    cases = []
    dtypes = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
    wanted = ((True, True), (True, True), (True, False), (False, True))
    for number, (shape, _, method) in enumerate(product(SHAPES, range(REPEATS - 1), METHODS)):
        choice = choices(2000 + number)
        cases.append(
            CamBackwardCase(
                shape,
                choice(dtypes),
                method,
                choice(FULL_LAYOUTS),
                choice(GRADIENT_LAYOUTS),
                True,
                "none",
                choice(OFFSETS),
                choice(SMALL_DEVICES if number % 4 == 3 else DEVICES),
                None,
                *choice(wanted),
            )
        )
    for number, method in enumerate(METHODS):
        layout = ("contiguous", "channels-last")[number % 2]
        shape = LARGE_SHAPES[number % 3]
        device = DEVICES[number % 3]
        cases.append(CamBackwardCase(shape, torch.float32, method, layout, layout, True, "none", 0, device))
    for method in ("gradcam", "hirescam"):
        cases.append(
            CamBackwardCase(MANY_MAPS, torch.float32, method, "contiguous", "contiguous", True, "none", 0, DEVICES[-1])
        )
    return cases
