"""`saliency_contrast` on a GPU, every backend, against the float64 reference on the CPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffcam_fast.reference.saliency_contrast import saliency_contrast as reference
from tests.gpu.cases import BACKENDS, DEVICE, DTYPES, Failures, each, forced, generator, largest, poisoned_memory
from tests.gpu.problems import LAYOUTS
from tests.tolerances import HALF_ERROR_RATIO, MAP_SHARE_OF_RANGE

OP = torch.ops.diffcam_fast.saliency_contrast.default

#: Images, rivals, channels and positions: photos, odd ones, one piece of a row and many, one to three dimensions.
SIZES = (
    (2, 5, 3, (224, 224)),
    (3, 1, 3, (61, 33)),
    (2, 2, 67, (7, 7)),
    (1, 3, 2, (300, 301)),
    (5, 2, 4, (50,)),
    (2, 2, 3, (5, 7, 9)),
    (70, 1, 1, (1,)),
)


def _inputs(index: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    images, targets, channels, size = SIZES[index]
    saliency = torch.randn(images, channels, *size, generator=generator(index))
    rivals = torch.randn(images, targets, channels, *size, generator=generator(index + 100))
    # Channels of one image differ in size, as those of gradients do.
    scale = 10 ** torch.rand(channels, *[1] * len(size), generator=generator(index + 200))
    return (saliency * scale).to(dtype), (rivals * scale).to(dtype)


def _compare(failures: Failures, found: Tensor, saliency: Tensor, rivals: Tensor, per_channel: bool, what: str) -> None:
    exact = reference(saliency.double(), rivals.double(), per_channel)
    wide = saliency.dtype == torch.float64
    failures.check(found.dtype == (torch.float64 if wide else torch.float32), f"{what}: dtype {found.dtype}")
    failures.check(found.shape == exact.shape and found.is_contiguous(), f"{what}: {tuple(found.shape)}")
    if found.shape != exact.shape:
        return
    # Maps of energy 1 have values of this size, also where their difference has none.
    usual = math.prod(exact.shape[3 if per_channel else 2 :]) ** -0.5
    span = exact.amax(tuple(range(2, exact.dim())), keepdim=True).clamp_min(usual)
    allowed = MAP_SHARE_OF_RANGE.get(saliency.dtype)
    if allowed is None:
        plain = reference(saliency, rivals, per_channel)
        allowed = HALF_ERROR_RATIO * largest((plain.double() - exact) / span) + MAP_SHARE_OF_RANGE[torch.float32]
    failures.at_most(largest((found.cpu().double() - exact) / span), allowed, what)


@each(backend=BACKENDS, dtype=DTYPES, per_channel=(True, False))
def test_agrees_with_float64_reference(backend: str, dtype: torch.dtype, per_channel: bool) -> None:
    failures = Failures()
    layouts = list(LAYOUTS)
    with forced(backend), poisoned_memory(), torch.no_grad():
        for index, (images, targets, _, _) in enumerate(SIZES):
            saliency, rivals = _inputs(index, dtype)
            for turn in range(3):
                layout, rival_layout = layouts[(index + turn) % len(layouts)], layouts[(index * turn) % len(layouts)]
                own = LAYOUTS[layout](saliency.to(DEVICE))
                others = LAYOUTS[rival_layout](rivals.to(DEVICE).flatten(0, 1)).unflatten(0, (images, targets))
                what = f"{SIZES[index]}, {layout} and {rival_layout}"
                _compare(failures, OP(own, others, per_channel), saliency, rivals, per_channel, what)
    failures.report()


@each(backend=BACKENDS)
def test_same_bits_from_run_to_run(backend: str) -> None:
    failures = Failures()
    with forced(backend), torch.no_grad():
        saliency, rivals = (values.to(DEVICE) for values in _inputs(0, torch.float32))
        first = OP(saliency, rivals, True)
        for _ in range(10):
            failures.same(OP(saliency, rivals, True), first, "again")
    failures.report()


@each(backend=BACKENDS)
def test_itself_nothing_and_what_is_not_finite(backend: str) -> None:
    failures = Failures()
    with forced(backend), torch.no_grad():
        saliency, rivals = (values.to(DEVICE) for values in _inputs(1, torch.float32))
        nothing = torch.zeros_like(saliency)
        for per_channel in (True, False):
            itself = OP(saliency, saliency.unsqueeze(1), per_channel)
            failures.same(itself, torch.zeros_like(itself), "of a map with itself")
            failures.same(OP(nothing, nothing.unsqueeze(1), per_channel), torch.zeros_like(itself), "of nothing")
        clean = OP(saliency, rivals, True)
        for value in (math.nan, math.inf):
            broken = rivals.clone()
            broken[1, 0, 2, 3, 4] = value
            found = OP(saliency, broken, True)
            failures.check(bool(found[1, 0, 2].isnan().all()), f"{value}: not NaN")
            found[1, 0, 2] = clean[1, 0, 2]
            failures.same(found, clean, f"{value}: the others")
        tiny = OP(saliency * 2.0**-110, rivals * 2.0**100, True)
        failures.at_most(largest(tiny - clean), 1e-6, "of very small and very large values")
    failures.report()
