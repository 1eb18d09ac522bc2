"""`logit_difference` beside a copy, the reference under torch.compile aside: launch after launch in a graph."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import diffcam_fast as dcf
from benchmarks.gpu.case import Case
from benchmarks.gpu.timing import CopyCeiling, Run, Settings, captured, in_turns
from benchmarks.report import Row
from benchmarks.speed.measure import Candidate, check
from diffcam_fast.backends import serving
from diffcam_fast.reference.logit_difference import logit_difference as reference

#: The shapes that a limit is set for, and the prediction of one image.
SHAPES = ((4096, 1000), (256, 262144), (1, 1000))
JUDGED = SHAPES[:2]

#: The share of the copy bandwidth that is asked for, or this many microseconds where they are more.
SHARE_OF_COPY = 0.75
ENOUGH_MICROSECONDS = 8.0

#: Difference from the float64 reference, as a share of the largest number in each result, or of 1. float32 sums over up
#: to a quarter of a million classes, in whatever order.
SHARE_OF_LARGEST = 5e-5

#: Logits that are compared with the float64 reference at a time.
CHECKED_AT_A_TIME = 1 << 22

RANKS = (1, 2, 3)


@dataclass(frozen=True)
class Kind:
    """A baseline on logits of one shape and dtype."""

    shape: tuple[int, int]
    baseline: str
    top_k: int | None
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Logits read once, cotangents written once; what else there is, is next to nothing."""
        return self.shape[0] * self.shape[1] * (self.dtype.itemsize + 4)

    @property
    def options(self) -> tuple[Any, ...]:
        """Arguments of the reference after the tensors."""
        return self.baseline, self.top_k or 0, 1.0, 1.0, list(RANKS) if self.baseline == "finer" else []

    def columns(self) -> Row:
        """As columns of a row."""
        return {
            "shape": "x".join(map(str, self.shape)),
            "baseline": self.baseline if self.top_k is None else f"{self.baseline}, top {self.top_k}",
            "dtype": str(self.dtype).removeprefix("torch."),
            "bytes": self.bytes,
            "judged": self.shape in JUDGED,
        }

    @property
    def label(self) -> str:
        """For a person."""
        columns = self.columns()
        return f"{columns['shape']}, {columns['baseline']}, {columns['dtype']}"


def kinds(settings: Settings) -> list[Kind]:
    """What is measured, the default first."""
    if settings.quick:
        return [Kind((4, 50), "logsumexp", 3, torch.float32)]
    baselines = (
        ("logsumexp", None),
        ("logsumexp", 5),
        ("max", None),
        ("mean", None),
        ("expected", None),
        ("finer", None),
    )
    return [
        Kind(shape, baseline, top_k, dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for baseline, top_k in baselines
        for shape in SHAPES
        if (dtype, baseline) != (torch.bfloat16, "finer")
    ]


def cases(settings: Settings) -> list[Case]:
    """Ours, eager and the copy."""
    ceiling = CopyCeiling(settings)
    return [Case(kind.label, partial(_measure, kind, ceiling, settings)) for kind in kinds(settings)]


def _inputs(kind: Kind, copies: int, settings: Settings) -> list[tuple[Tensor, Tensor]]:
    source = torch.Generator(settings.device).manual_seed(0)
    images, count = kind.shape
    found = []
    for _ in range(copies):
        logits = 3 * torch.randn(kind.shape, generator=source, device=settings.device)
        if kind.baseline == "finer":
            # Exact differences: classes have one order, whatever the precision.
            logits = (64 * logits).round() / 64
        classes = torch.randint(0, count, (images,), generator=source, device=settings.device)
        found.append((logits.to(kind.dtype), classes))
    return found


def _ours(kind: Kind, inputs: list[tuple[Tensor, Tensor]]) -> Candidate:
    ranks = {"ranks": RANKS} if kind.baseline == "finer" else {}

    def run(copy: int) -> tuple[Tensor | None, ...]:
        return dcf.logit_difference(*inputs[copy], baseline=kind.baseline, top_k=kind.top_k, **ranks)

    return Candidate(run, lambda found: _error(kind, found, inputs[0]), SHARE_OF_LARGEST)


def _error(kind: Kind, found: tuple[Tensor | None, ...], inputs: tuple[Tensor, Tensor]) -> float:
    """The largest of all results; infinite for wrong rivals."""
    worst = 0.0
    images = max(1, CHECKED_AT_A_TIME // kind.shape[1])
    for start in range(0, kind.shape[0], images):
        some = slice(start, start + images)
        exact = reference(inputs[0][some].double(), inputs[1][some].unsqueeze(1), *kind.options)
        for got, want in zip(found, exact, strict=True):
            if got is None:
                continue
            want = want.squeeze(1)
            if want.dtype == torch.int64:
                worst = max(worst, 0.0 if torch.equal(got[some], want) else float("inf"))
            else:
                error = (got[some].double() - want).abs().max() / want.abs().max().clamp_min(1)
                worst = max(worst, error.item())
                if error.isnan():
                    return float("nan")
    return worst


def _measure(kind: Kind, ceiling: CopyCeiling, settings: Settings) -> Row:
    copies = settings.cold_copies(kind.shape[0] * kind.shape[1] * kind.dtype.itemsize)
    # Logits of one image were just written by a network: they are measured warm.
    copies = 1 if kind.shape[0] == 1 else copies
    inputs = _inputs(kind, copies, settings)
    ours = _ours(kind, inputs)
    errors = check({"ours": ours}, kind.label)
    launches = 3 if settings.quick else 300 if copies == 1 else 2 * copies

    def eager(copy: int) -> Any:
        logits, classes = inputs[copy]
        return reference(logits, classes.unsqueeze(1), *kind.options)

    graph = captured(ours.run, copies, launches, settings)
    mine = in_turns({"ours": graph}, 1, settings, launches)["ours"]
    runs: dict[str, Run] = {"eager": eager, "copy": ceiling.candidate.run}
    others = in_turns(runs, copies, settings)
    gb_per_s = 1e-9 * kind.bytes / mine.median
    copy_gb_per_s = ceiling.gb_per_s(others["copy"])
    allowed = max(1e-3 * kind.bytes / (SHARE_OF_COPY * copy_gb_per_s), ENOUGH_MICROSECONDS)
    return {
        **kind.columns(),
        "backend": serving(settings.device),
        "error": errors["ours"],
        "gpu_us": 1e6 * mine.median,
        "gpu_us_p20": 1e6 * mine.p20,
        "gpu_us_p80": 1e6 * mine.p80,
        "gb_per_s": gb_per_s,
        "copy_gb_per_s": copy_gb_per_s,
        "share_of_copy": gb_per_s / copy_gb_per_s,
        "allowed_us": allowed,
        "vs_allowed": 1e6 * mine.median / allowed,
        "eager_us": 1e6 * others["eager"].median,
        "vs_eager": mine.median / others["eager"].median,
    }
