"""One call of `diffcam_fast.cam`: its inputs, the check of its maps, and its share of the read ceiling."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import diffcam_fast
from diffcam_fast.benchmark.measure import (
    COLD_CACHES,
    Candidate,
    Clock,
    Effort,
    GpuClock,
    ReadCeiling,
    Timing,
    WallClock,
    cold_copies,
    compare,
    in_words,
)
from diffcam_fast.benchmark.report import Column, Report, Row, Table
from diffcam_fast.reference.cam import cam as reference_cam

Shape = tuple[int, int, int, int]

SHAPES: tuple[Shape, ...] = (
    (1, 2048, 7, 7),
    (32, 2048, 7, 7),
    (32, 512, 14, 14),
    (64, 1280, 7, 7),
    (8, 64, 112, 112),
    (128, 2048, 7, 7),
)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
DTYPES = (torch.float32, torch.bfloat16)

#: ReLU, normalisation and its epsilon, as `diffcam_fast.cam` has them by default.
OPTIONS = (True, "minmax", 1e-7)

#: What a map may err, as a share of its range, before it counts as another map: in half precision the inputs' own
#: rounding shows.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}

INTRODUCTION = """\
One call of `diffcam_fast.cam` (gradcam, with ReLU and min-max) on a batch of activations and as many gradients, neither
of them in a cache. *GB/s*: bytes of both, each read once, by the median time. *of read*: what is read a second, as a
share of what the fastest of several plain readers ({reader}) reads in the same round: the median over rounds. Maps
were checked against the float64 reference before anything was timed."""


class Inputs:
    """Copies of random activations and gradients, enough of them to be cold.

    Args:
        shape: of the activations.
        layout: a name in `LAYOUTS`.
        dtype: of both.
        copies: how many; None: enough.
        device: where they are.
    """

    def __init__(
        self,
        shape: Shape,
        layout: str,
        dtype: torch.dtype,
        copies: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        # Positive and heavy-tailed, like the output of a ReLU, but without zeros. Gradients with a positive mean keep
        # the maps off the zero of their own ReLU.
        activations = torch.randn(shape, generator=generator).square_().add_(0.01)
        gradients = torch.randn(shape, generator=generator).add_(0.02)
        pair = [
            values.to(device, dtype).contiguous(memory_format=LAYOUTS[layout]) for values in (activations, gradients)
        ]
        self.bytes = sum(values.numel() * values.element_size() for values in pair)
        self.copies = [
            (activations.clone(), gradients.clone())
            for activations, gradients in [pair] * (copies or cold_copies(self.bytes, device))
        ]
        # The reference takes gradients with a target dimension: given here, so that no competitor pays for it.
        self.canonical = [(activations, gradients.unsqueeze(1)) for activations, gradients in self.copies]


def check_of(method: str, inputs: Inputs) -> Callable[[Tensor], float]:
    """The error of maps of copy 0, as a share of range, against the float64 reference."""
    activations, gradients = inputs.canonical[0]
    exact = reference_cam(activations.double(), gradients.double(), method, *OPTIONS)
    if not (exact.amax((2, 3)) > 0.5).all():
        raise ValueError(f"{method}: these inputs give an empty map, and too much would pass for right")
    return lambda found: (found.double().reshape(exact.shape) - exact).abs().max().item() / exact.max().item()


def ours(method: str, inputs: Inputs, tolerance: float) -> Candidate:
    """The op, with the check of its maps.

    Args:
        method: of `diffcam_fast.cam`.
        inputs: what it is called on.
        tolerance: what its maps may err, as a share of range.
    """
    return Candidate(lambda copy: diffcam_fast.cam(*inputs.copies[copy], method), check_of(method, inputs), tolerance)


def columns(inputs: Inputs, mine: Timing, ceiling: ReadCeiling, read: Timing | None) -> Row:
    """A call's time and what it reads a second, beside the ceiling's time in the same comparison, if it was in it."""
    gb_per_s = 1e-9 * inputs.bytes / mine.median
    row = {"bytes": inputs.bytes, "rounds": mine.rounds, **mine.milliseconds(), "gb_per_s": gb_per_s}
    if read is not None:
        row["ceiling_gb_per_s"] = 1e-9 * ceiling.bytes_per_call / read.median
        # A machine may change its speed between rounds, and the reader's with it.
        quotient = read.multiple("share", mine)["share"]
        row["share_of_read"] = inputs.bytes / ceiling.bytes_per_call * quotient
    return row


def run(device: torch.device, *, quick: bool = False) -> Report:
    """The op at every shape, layout and dtype, on one device with the threads that PyTorch has.

    Args:
        device: where.
        quick: one shape in a few rounds.

    Raises:
        WrongResult: maps that are wrong.
    """
    effort = Effort(seconds=0.0, minimum_rounds=3) if quick else Effort(seconds=0.2)
    clock: Clock = GpuClock(device) if device.type == "cuda" else WallClock()
    caches = 1 if quick else 8
    with torch.no_grad():
        ceiling = ReadCeiling(caches=caches, effort=effort, device=device, clock=clock)
        rows = list(_rows(device, ceiling, effort, clock, SHAPES[:1] if quick else SHAPES))
    return Report(
        name="kernels",
        title="cam against the read ceiling",
        introduction=INTRODUCTION.format(reader=ceiling.reader),
        rows=rows,
        tables=[
            Table(
                f"{dtype} on {device}" + (f", {in_words(ceiling.threads)}" if device.type == "cpu" else ""),
                [row for row in rows if row["dtype"] == dtype],
                [
                    Column("shape", "shape"),
                    Column("layout", "layout"),
                    Column("of read", "share_of_read", ".0%"),
                    Column("GB/s", "gb_per_s", ".1f"),
                    Column("ms", "ms", ".3g"),
                    Column("p20", "ms_p20", ".3g"),
                    Column("p80", "ms_p80", ".3g"),
                ],
            )
            for dtype in dict.fromkeys(row["dtype"] for row in rows)
        ],
        bars=[],
        label=lambda row: f"{row['shape']}, {row['layout']}, {row['dtype']}",
        details={"read_ceilings": [ceiling.record()], "cold_caches": COLD_CACHES},
    )


def _rows(
    device: torch.device, ceiling: ReadCeiling, effort: Effort, clock: Clock, shapes: tuple[Shape, ...]
) -> Iterator[Row]:
    for dtype in DTYPES:
        for shape in shapes:
            for layout in LAYOUTS:
                inputs = Inputs(shape, layout, dtype, device=device)
                place = {"shape": "x".join(map(str, shape)), "layout": layout, "dtype": str(dtype).split(".")[1]}
                timings, errors = compare(
                    {"ours": ours("gradcam", inputs, TOLERANCES[dtype]), "ceiling": ceiling.candidate},
                    what=", ".join(place.values()),
                    copies=len(inputs.copies),
                    effort=effort,
                    clock=clock,
                )
                yield {
                    **place,
                    "threads": ceiling.threads,
                    "error": errors["ours"],
                    **columns(inputs, timings["ours"], ceiling, timings["ceiling"]),
                }
