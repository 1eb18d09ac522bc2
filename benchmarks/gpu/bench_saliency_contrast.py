"""`saliency_contrast` of a batch of photos and their rivals: beside a copy and eager PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.case import Case
from benchmarks.gpu.timing import CopyCeiling, Settings, compare
from benchmarks.report import Row
from benchmarks.speed.measure import Candidate
from diffcam_fast.backends import serving
from diffcam_fast.ops.saliency_contrast import saliency_contrast
from diffcam_fast.reference.saliency_contrast import saliency_contrast as reference

#: Difference from the float64 reference, as a share of the largest value: float32 sums of up to 150,000 squares.
SHARE_OF_LARGEST = 2e-5

#: Images that are compared with the float64 reference at a time.
CHECKED_AT_A_TIME = 16


@dataclass(frozen=True)
class Kind:
    """Maps of one batch, layout and dtype."""

    images: int
    rivals: int
    size: int
    layout: str
    dtype: torch.dtype
    per_channel: bool

    @property
    def bytes(self) -> int:
        """Maps read once, contrasts written once."""
        return self.images * 3 * self.size**2 * (self.dtype.itemsize * (1 + self.rivals) + 4 * self.rivals)

    def columns(self) -> Row:
        """As columns of a row."""
        return {
            "shape": f"{self.images}x{self.rivals}x3x{self.size}x{self.size}",
            "layout": self.layout,
            "dtype": str(self.dtype).removeprefix("torch."),
            "energy": "of a channel" if self.per_channel else "of all channels",
            "bytes": self.bytes,
        }

    @property
    def label(self) -> str:
        """For a person."""
        return ", ".join(str(value) for key, value in self.columns().items() if key != "bytes")


def cases(settings: Settings) -> list[Case]:
    """Ours, eager and the copy."""
    ceiling = CopyCeiling(settings)
    count, size = (2, 16) if settings.quick else (64, 224)
    kinds = [
        Kind(count, 1, size, "contiguous", torch.float32, True),
        Kind(count, 5, size, "contiguous", torch.float32, True),
        Kind(count, 5, size, "contiguous", torch.float32, False),
        Kind(count, 5, size, "contiguous", torch.bfloat16, True),
        Kind(count, 5, size, "channels-last", torch.float32, True),
    ]
    return [Case(kind.label, partial(_measure, kind, ceiling, settings)) for kind in kinds]


def _measure(kind: Kind, ceiling: CopyCeiling, settings: Settings) -> Row:
    source = torch.Generator(settings.device).manual_seed(0)
    copies = settings.cold_copies(kind.bytes)

    def maps(count: int) -> Tensor:
        shape = (count, 3, kind.size, kind.size)
        found = torch.randn(shape, generator=source, device=settings.device).to(kind.dtype)
        return found.contiguous(memory_format=torch.channels_last) if kind.layout == "channels-last" else found

    inputs = [
        (maps(kind.images), maps(kind.images * kind.rivals).unflatten(0, (kind.images, kind.rivals)))
        for _ in range(copies)
    ]

    def error(found: Tensor) -> float:
        worst = 0.0
        saliency, rivals = inputs[0]
        for start in range(0, kind.images, CHECKED_AT_A_TIME):
            some = slice(start, start + CHECKED_AT_A_TIME)
            exact = reference(saliency[some].double(), rivals[some].double(), kind.per_channel)
            worst = max(worst, ((found[some] - exact).abs().amax() / exact.amax()).item())
        return worst

    contenders = {
        "ours": Candidate(
            lambda copy: saliency_contrast(*inputs[copy], per_channel=kind.per_channel), error, SHARE_OF_LARGEST
        ),
        "eager": Candidate(lambda copy: reference(*inputs[copy], kind.per_channel), error, SHARE_OF_LARGEST),
        "copy": ceiling.candidate,
    }
    timings, errors = compare(contenders, kind.label, copies, settings)
    mine = timings["ours"]
    gb_per_s = 1e-9 * kind.bytes / mine.median
    return {
        **kind.columns(),
        "backend": serving(settings.device),
        "error": errors["ours"],
        **mine.milliseconds(),
        "gb_per_s": gb_per_s,
        "copy_gb_per_s": ceiling.gb_per_s(timings["copy"]),
        "share_of_copy": gb_per_s / ceiling.gb_per_s(timings["copy"]),
        "eager_ms": 1e3 * timings["eager"].median,
        "vs_eager": mine.median / timings["eager"].median,
    }
