"""`overlay` on a batch of photos: beside a copy, Triton and eager PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import diffcam_fast as dcf
from benchmarks.gpu.case import Case
from benchmarks.gpu.timing import CopyCeiling, Settings, compare
from benchmarks.report import Row
from benchmarks.speed.measure import Candidate
from diffcam_fast.backends import serving
from diffcam_fast.ops.colormaps import table_on
from diffcam_fast.reference.overlay import overlay as reference

OPACITY, NORMALIZE, EPS = 0.5, "minmax", 1e-7

#: A level between two colours falls to either, by rounding; a pixel may then be off by a step of the table.
SHARE_OF_PIXELS_OFF = 2e-3

#: Pictures that are compared with the float64 reference at a time.
CHECKED_AT_A_TIME = 16


@dataclass(frozen=True)
class Kind:
    """A blend on images of one batch, layout and dtype."""

    images: int
    size: int
    layout: str
    dtype: torch.dtype
    blend: str

    @property
    def bytes(self) -> int:
        """Images read once, pictures written once."""
        return self.images * 3 * self.size**2 * (self.dtype.itemsize + 1)

    def columns(self) -> Row:
        """As columns of a row."""
        return {
            "shape": f"{self.images}x3x{self.size}x{self.size}",
            "layout": self.layout,
            "dtype": str(self.dtype).removeprefix("torch."),
            "blend": self.blend,
            "bytes": self.bytes,
        }

    @property
    def label(self) -> str:
        """For a person."""
        return ", ".join(str(value) for key, value in self.columns().items() if key != "bytes")


def cases(settings: Settings) -> list[Case]:
    """Ours, eager and the copy."""
    ceiling = CopyCeiling(settings)
    count, size = (2, 16) if settings.quick else (256, 224)
    kinds = [
        Kind(count, size, layout, dtype, blend)
        for blend in ("proportional", "uniform")
        for dtype in (torch.float32, torch.uint8)
        for layout in ("contiguous", "channels-last")
    ]
    return [Case(kind.label, partial(_measure, kind, ceiling, settings)) for kind in kinds]


def _measure(kind: Kind, ceiling: CopyCeiling, settings: Settings) -> Row:
    source = torch.Generator(settings.device).manual_seed(0)
    copies = settings.cold_copies(kind.bytes)

    def images() -> Tensor:
        found = torch.rand(kind.images, 3, kind.size, kind.size, generator=source, device=settings.device)
        found = (found * 255).to(torch.uint8) if kind.dtype == torch.uint8 else found
        return found.contiguous(memory_format=torch.channels_last) if kind.layout == "channels-last" else found

    inputs = [
        (torch.rand(kind.images, 1, 7, 7, generator=source, device=settings.device), images()) for _ in range(copies)
    ]
    options = (table_on("jet", inputs[0][0].device), OPACITY, NORMALIZE, kind.blend, EPS)

    def error(found: Tensor) -> float:
        off, pixels = 0, 0
        maps, photos = inputs[0]
        for start in range(0, kind.images, CHECKED_AT_A_TIME):
            some = slice(start, start + CHECKED_AT_A_TIME)
            exact = reference(maps[some].double(), photos[some], *options)
            off += ((found[some].int() - exact.int()).abs() > 1).sum().item()
            pixels += exact.numel()
        return off / pixels

    contenders = {
        "ours": Candidate(
            lambda copy: dcf.overlay(*inputs[copy], opacity=OPACITY, blend=kind.blend), error, SHARE_OF_PIXELS_OFF
        ),
        "eager": Candidate(lambda copy: reference(*inputs[copy], *options), error, SHARE_OF_PIXELS_OFF),
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
