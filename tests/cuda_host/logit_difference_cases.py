"""Calls of `logit_difference` that reach every path of its kernels."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from diffcam_fast.reference.logit_difference import BASELINES
from diffcam_fast.reference.logit_difference import logit_difference as reference
from tests.tolerances import LOGIT_DIFFERENCE

from . import ops
from .cases import DEVICES, OFFSETS, Case, choices, placed, spread_out
from .device import Device

LAYOUTS = ("contiguous", "transposed", "strided", "margin", "expanded")
COUNTS = (2, 3, 7, 31, 32, 33, 64, 130, 255, 1000, 1025)
LARGE_COUNTS = (4099, 21841)
SMALL_DEVICES = (
    Device(capability=90, multiprocessors=132, shared_bytes=8 << 10),
    Device(capability=80, multiprocessors=2, shared_bytes=8 << 10),
)


def lay_out(values: Tensor, layout: str) -> Tensor:
    """(N, K) with the same values in another layout; "expanded": the first image's, for every image."""
    if layout == "transposed":
        return values.t().contiguous().t()
    if layout == "strided":
        return spread_out(values)
    if layout == "margin":
        wide = torch.full((values.shape[0], values.shape[1] + 2), torch.nan, dtype=values.dtype)
        return wide[:, 1:-1].copy_(values)
    return values[:1].expand_as(values) if layout == "expanded" else values.contiguous()


@dataclass
class LogitDifferenceCase(Case):
    """A call of `logit_difference`; ties: logits are multiples of a quarter."""

    most_launches = 1

    images: int
    targets: int
    classes: int
    dtype: torch.dtype
    layout: str
    baseline: str
    top_k: int
    temperature: float
    alpha: float
    ranks: tuple[int, ...]
    ties: bool
    shift: float
    offset: int
    device: Device

    @property
    def on(self) -> Device:
        return self.device

    def prepare(self) -> None:
        shape = (self.images, self.classes)
        if self.ties:
            values = torch.randint(-60, 61, shape, generator=self.generator) / 4.0
        else:
            values = 3 * torch.randn(shape, generator=self.generator, dtype=torch.float64)
        self.logits = placed(lay_out((values + self.shift).to(self.dtype), self.layout), self.offset)
        chosen = (self.images, self.targets)
        self.chosen = torch.randint(0, self.classes, chosen, generator=self.generator)
        if self.images * self.targets > 1:
            # The class with the largest logit has other rivals than the rest.
            self.chosen[0, 0] = self.logits[0].argmax()
        self.expected = reference(self.logits.double(), self.chosen, *self.options)

    @property
    def options(self) -> tuple:
        return self.baseline, self.top_k, self.temperature, self.alpha, self.ranks

    def run(self, library: ctypes.CDLL, device: Device) -> tuple[Tensor, ...]:
        return ops.logit_difference(library, device, self.logits, self.chosen, *self.options)

    def verify(self, found: tuple[Tensor, ...]) -> None:
        accurate = torch.float64 if self.dtype == torch.float64 else torch.float32
        exact = self.logits.double()
        # Only differences between logits matter, but where their factors differ.
        size = (exact.amax() - exact.amin() if self.alpha == 1 else exact.abs().amax()).item()
        allowed = LOGIT_DIFFERENCE[accurate] * max(1.0, size / 10) * max(1.0, 1 / self.temperature)
        for name, got, want in zip(("delta", "cotangent", "rivals", "differences"), found, self.expected, strict=True):
            if name == "rivals":
                assert torch.equal(got, want), "rivals differ"
                continue
            assert not got.isnan().any(), f"{name} has elements that are not written, or NaN"
            error = (got.double() - want).abs().amax().item() if got.numel() else 0.0
            assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def logit_difference_cases() -> list[LogitDifferenceCase]:
    """The sweep."""
    cases = []
    dtypes = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
    counts = [(count, 3) for count in COUNTS] + [(count, 1) for count in LARGE_COUNTS]
    for number, ((count, repeats), baseline) in enumerate(product(counts, BASELINES)):
        for repeat in range(repeats):
            choice = choices(100 * repeat + number)
            most = count - 1
            finer = baseline == "finer"
            tempered = baseline in ("logsumexp", "expected")
            ranks = tuple(dict.fromkeys((min(3, most), 1, choice((most, most // 2 + 1))))) if finer else ()
            cases.append(
                LogitDifferenceCase(
                    choice((1, 3, 5)) if repeats > 1 else 2,
                    choice((1, 1, 2, 3)),
                    count,
                    choice(dtypes),
                    choice(LAYOUTS),
                    baseline,
                    0 if finer else choice((0, 0, 1, min(5, most), most // 2 + 1, most)),
                    choice((1.0, 0.5, 3.0)) if tempered else 1.0,
                    choice((1.0, 0.6)) if finer else 1.0,
                    ranks,
                    choice((True, False)),
                    choice((0.0, 0.0, 64.0)),
                    choice(OFFSETS),
                    choice(SMALL_DEVICES if (number + repeat) % 3 == 2 else DEVICES),
                )
            )
    return cases
