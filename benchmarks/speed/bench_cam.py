"""The compiled `cam` beside torch.compile, eager PyTorch, the bmm form and torch.dot, against the read ceiling."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import figures
from benchmarks.report import Bar, Column, Report, Row, Table
from benchmarks.speed.measure import (
    COLD_CACHES,
    QUICK,
    Candidate,
    Effort,
    ReadCeiling,
    beside,
    compare,
    compiled,
    in_words,
    require_compiled,
    thread_counts,
    threads,
)
from diffcam_fast.benchmark import kernels
from diffcam_fast.benchmark.kernels import DTYPES, LAYOUTS, OPTIONS, SHAPES, Inputs, Shape, check_of
from diffcam_fast.reference.cam import METHODS, finish
from diffcam_fast.reference.cam import cam as reference_cam
from tests.tolerances import HALF_ERROR_RATIO, MAP_SHARE_OF_RANGE, PEER_SHARE_OF_RANGE

#: torch.bmm rounds weights and maps to the inputs' dtype: a few units in the last place of bfloat16, which are 2^-8.
ROUNDED_MAPS = 4 * 2.0**-8

LARGEST_BATCH = max(shape[0] for shape in SHAPES)

#: The least share of the read ceiling that is asked for, and of inputs of more than so many bytes.
SHARE_OF_READ = 0.7
SHARE_OF_READ_LARGE, LARGE_BYTES = 0.85, 50e6

#: Many rounds, for medians that judge by single rounds' quotients.
EFFORT = Effort(seconds=2.0)

CAPTION = "gradcam, inputs not in a cache: share of the machine's read bandwidth, by shape."

INTRODUCTION = """\
One call of `diffcam_fast.cam` (ReLU and min-max included) on a batch of activations and as many gradients.
*cold*: the inputs rotate over copies that fill the last-level cache {cold_caches} times. *warm*: the same copy, read
just before. *GB/s*: bytes of activations and gradients, read once, by the median time. *of read*: what is read a
second, as a share of the read ceiling in the same round, the median over rounds; the ceiling is the fastest of several
plain readers, which go through {ceiling_bytes} MiB, timed in turns with the candidates. *vs ...*: our median time by
theirs; **below 1 we are faster**. torch.compile and eager run the reference implementation; bmm is the product of mean
gradients and activations in eager PyTorch, which in bfloat16 also rounds its maps; dot is torch.dot of the same
activations and gradients, whatever their dtype read as float32: a plain reader of the very same memory, in a call as
short. Candidates alternate in one process; each was checked against the float64 reference before it was timed.
Read ceilings: {ceilings}."""


@dataclass(frozen=True)
class Case:
    """One row of the results."""

    method: str
    shape: Shape
    layout: str
    dtype: torch.dtype
    threads: int
    warm: bool

    def columns(self) -> Row:
        """The case as columns of a row."""
        return {
            "method": self.method,
            "shape": "x".join(map(str, self.shape)),
            "layout": self.layout,
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": self.threads,
            "cache": "warm" if self.warm else "cold",
        }


def cases(quick: bool) -> list[Case]:
    """What is measured; cases with the same inputs follow each other."""
    if quick:
        shape = SHAPES[0]
        return [Case("gradcam", shape, "channels-last", torch.float32, 1, warm) for warm in (False, True)]
    found = []
    counts = thread_counts()
    for shape in SHAPES:
        for layout in LAYOUTS:
            for dtype in DTYPES:
                for count in counts:
                    found.append(Case("gradcam", shape, layout, dtype, count, False))
                    if shape[0] == 1:
                        found.append(Case("gradcam", shape, layout, dtype, count, True))
                # gradcam stands for all of them where only the batch is larger.
                if dtype == torch.float32 and shape[0] < LARGEST_BATCH:
                    others = (method for method in METHODS if method != "gradcam")
                    found += [Case(method, shape, layout, dtype, counts[-1], False) for method in others]
    return found


def bmm_form(activations: Tensor, gradients: Tensor) -> Tensor:
    """Grad-CAM as it is usually written by hand for speed: one batched matrix product."""
    weights = gradients.mean((2, 3)).unsqueeze(1)
    raw = torch.bmm(weights, activations.flatten(2)).unflatten(2, activations.shape[2:])
    return finish(raw, *OPTIONS)


def ours(method: str, inputs: Inputs) -> Candidate:
    """The op, with the check of its maps."""
    error = check_of(method, inputs)
    return kernels.ours(method, inputs, MAP_SHARE_OF_RANGE[torch.float32] + _allowance(method, inputs, error))


def competitors(method: str, inputs: Inputs) -> dict[str, Candidate]:
    """The reference, compiled and eager, and the bmm form of gradcam, with the check that suits another's maps."""
    copies, canonical = inputs.copies, inputs.canonical
    error = check_of(method, inputs)
    allowance = _allowance(method, inputs, error)
    tolerance = PEER_SHARE_OF_RANGE + allowance
    fast = compiled(reference_cam, *canonical[0], method, *OPTIONS)
    found = {
        "compile": Candidate(lambda copy: fast(*canonical[copy], method, *OPTIONS), error, tolerance),
        "eager": Candidate(lambda copy: reference_cam(*canonical[copy], method, *OPTIONS), error, tolerance),
    }
    if method == "gradcam":
        rounded = ROUNDED_MAPS if allowance else tolerance
        found["bmm"] = Candidate(lambda copy: bmm_form(*copies[copy]), error, rounded)
    return found


def plain_reader(inputs: Inputs) -> Candidate:
    """torch.dot of activations and gradients as they lie in memory, read as float32."""
    pairs = [[_as_stored(values) for values in pair] for pair in inputs.copies]
    right = float(pairs[0][0].double() @ pairs[0][1].double())
    # Two elements of bfloat16 make one of float32, whose size is that of the second. A sum of millions of such products
    # is not exact; that all of them were read is what matters.
    return Candidate(lambda copy: torch.dot(*pairs[copy]), lambda found: abs(float(found) / right - 1), 1e-2)


def _as_stored(values: Tensor) -> Tensor:
    return values.as_strided((values.numel(),), (1,)).view(torch.float32)


def _allowance(method: str, inputs: Inputs, error: Callable[[Tensor], float]) -> float:
    """What half precision may err in addition: a multiple of what the reference itself errs in it."""
    activations, gradients = inputs.canonical[0]
    if activations.dtype == torch.float32:
        return 0.0
    return HALF_ERROR_RATIO * error(reference_cam(activations, gradients, method, *OPTIONS))


def measure(case: Case, inputs: Inputs, ceiling: ReadCeiling, effort: Effort) -> Row:
    """One row. The number of threads is set already."""
    contenders = {
        "ours": ours(case.method, inputs),
        **competitors(case.method, inputs),
        "dot": plain_reader(inputs),
    }
    if not case.warm:
        contenders["ceiling"] = ceiling.candidate
    timings, errors = compare(
        contenders, what=_label(case.columns()), copies=len(inputs.copies), warm=case.warm, effort=effort
    )
    mine = timings["ours"]
    row = {
        **case.columns(),
        "error": errors["ours"],
        **kernels.columns(inputs, mine, ceiling, timings.get("ceiling")),
    }
    return row | beside(timings, errors, ("compile", "eager", "bmm", "dot"))


def rows(chosen: list[Case], ceilings: dict[int, ReadCeiling], effort: Effort) -> Iterator[Row]:
    """Measure the cases; inputs are made once for those that share them."""
    key: tuple[Any, ...] = ()
    for case in tqdm(chosen, desc="cam", disable=None):
        if key != (case.shape, case.layout, case.dtype):
            key = (case.shape, case.layout, case.dtype)
            inputs = Inputs(*key)
        with threads(case.threads):
            yield measure(case, inputs, ceilings[case.threads], effort)


def run(quick: bool = False) -> Report:
    """Measure everything, or for `quick` one shape in a few rounds.

    Raises:
        NotCompiled: the reference serves.
        WrongResult: somebody's maps are wrong.
    """
    require_compiled("cam")
    chosen = cases(quick)
    effort = QUICK if quick else EFFORT
    ceilings = {}
    for count in sorted({case.threads for case in chosen}):
        with threads(count):
            ceilings[count] = ReadCeiling(caches=1, effort=QUICK) if quick else ReadCeiling()
    with torch.no_grad():
        return report(list(rows(chosen, ceilings, effort)), ceilings)


def report(found: list[Row], ceilings: dict[int, ReadCeiling]) -> Report:
    """The rows as a report, with the tables and the bars."""
    first = next(iter(ceilings.values()))
    introduction = INTRODUCTION.format(
        cold_caches=COLD_CACHES,
        ceiling_bytes=first.PIECES * first.bytes_per_call >> 20,
        ceilings="; ".join(
            f"{in_words(count)} {max(ceiling.gb_per_s.values()):.1f} GB/s ({ceiling.reader})"
            for count, ceiling in ceilings.items()
        ),
    )
    return Report(
        name="cam",
        title="cam",
        introduction=introduction,
        rows=found,
        tables=_tables(found),
        bars=[
            bar.because(found, partial(_why, found) if bar.column == "share_of_read" else _why_not_faster)
            for bar in _bars()
        ],
        label=_label,
        details={"read_ceilings": [ceiling.record() for ceiling in ceilings.values()]},
        figures={"cam.png": (CAPTION, figure(found))},
    )


def _tables(found: list[Row]) -> list[Table]:
    timing = [
        Column("ms", "ms", ".3g"),
        Column("p20", "ms_p20", ".3g"),
        Column("p80", "ms_p80", ".3g"),
        Column("GB/s", "gb_per_s", ".1f"),
        Column("of read", "share_of_read", ".0%"),
        Column("compile ms", "compile_ms", ".3g"),
        Column("vs compile", "vs_compile", ".2f"),
        Column("vs eager", "vs_eager", ".2f"),
        Column("vs dot", "vs_dot", ".2f"),
    ]
    place = [Column("shape", "shape"), Column("layout", "layout")]
    gradcam = [row for row in found if row["method"] == "gradcam"]
    others = [row for row in found if row["method"] != "gradcam"]
    tables = [
        Table(
            f"gradcam, {dtype}, {in_words(count)}",
            [row for row in gradcam if (row["dtype"], row["threads"]) == (dtype, count)],
            [*place, Column("cache", "cache"), *timing, Column("vs bmm", "vs_bmm", ".2f")],
        )
        for dtype, count in sorted(
            {(row["dtype"], row["threads"]) for row in gradcam}, key=lambda group: (group[0] != "float32", group)
        )
    ]
    for method in dict.fromkeys(row["method"] for row in others):
        chosen = [row for row in others if row["method"] == method]
        title = f"{method}, {chosen[0]['dtype']}, {in_words(chosen[0]['threads'])}, cold"
        tables.append(Table(title, chosen, [*place, *timing]))
    return tables


def _bars() -> list[Bar]:
    found = []
    for text, of_group in (
        ("gradcam", lambda row: row["method"] == "gradcam"),
        ("the other methods", lambda row: row["method"] != "gradcam"),
    ):
        found += [
            Bar(f"{text}: no slower than torch.compile", "vs_compile", 1.0, applies=of_group),
            Bar(
                f"{text}: at least {SHARE_OF_READ:.0%} of read bandwidth, cold, all but the single image",
                "share_of_read",
                SHARE_OF_READ,
                at_least=True,
                applies=lambda row, of_group=of_group: of_group(row) and not row["shape"].startswith("1x"),
                show=".1%",
            ),
            Bar(
                f"{text}: at least {SHARE_OF_READ_LARGE:.0%} of read bandwidth, cold, inputs over 50 MB",
                "share_of_read",
                SHARE_OF_READ_LARGE,
                at_least=True,
                applies=lambda row, of_group=of_group: of_group(row) and row["bytes"] > LARGE_BYTES,
                show=".1%",
            ),
        ]
    return found


def _why(found: list[Row], missed: list[Row]) -> str:
    """What the results themselves say about rows that miss a share of bandwidth."""

    def rate(row: Row) -> float:
        """Elements a nanosecond, of activations and gradients."""
        itemsize: int = getattr(torch, row["dtype"]).itemsize
        return float(1e-6 * row["bytes"] / itemsize / row["ms"])

    dots = [row["share_of_read"] * row["vs_dot"] for row in missed]
    known = [f"torch.dot of the same inputs reaches {min(dots):.0%} to {max(dots):.0%} of read bandwidth"]
    same = ("method", "shape", "layout", "threads", "cache")
    halves = [row for row in missed if getattr(torch, row["dtype"]).itemsize == 2]
    pairs = [
        (rate(row), rate(other))
        for row in halves
        for other in found
        if other["dtype"] == "float32" and all(row[key] == other[key] for key in same)
    ]
    if pairs:
        mine, theirs = zip(*pairs, strict=True)
        known.append(
            f"{halves[0]['dtype']} has two elements where float32 has one: {min(mine):.1f} to {max(mine):.1f} a "
            f"nanosecond in these rows, {min(theirs):.1f} to {max(theirs):.1f} in those of float32"
        )
    twice = [row["share_of_read"] for row in missed if row["method"] in ("gradcam++", "xgradcam")]
    if twice:
        known.append(
            "gradcam++ and xgradcam read activations once for the weights and once for the map; with both readings "
            f"counted, {1.5 * min(twice):.0%} to {1.5 * max(twice):.0%} of read bandwidth"
        )
    return "; ".join(known)


def _why_not_faster(missed: list[Row]) -> str:
    """Times of rows that miss torch.compile's, where the two overlap."""
    even = [row for row in missed if row["ms_p20"] <= row["compile_ms_p80"]]
    if not even:
        return ""
    ours, theirs = (
        [f"{row[f'{name}ms_p20']:.3g} to {row[f'{name}ms_p80']:.3g}" for row in even] for name in ("", "compile_")
    )
    each = "; ".join(f"{mine} ms beside {other}" for mine, other in zip(ours, theirs, strict=True))
    return f"p20 to p80 of the two overlap in {len(even)} of {len(missed)}: {each}"


def figure(found: list[Row]) -> bytes:
    """Share of the read ceiling by shape: a panel for each number of threads, a bar for each dtype and layout."""
    shown = [row for row in found if row["method"] == "gradcam" and row["cache"] == "cold"]
    counts = sorted({row["threads"] for row in shown})
    shapes = list(dict.fromkeys(row["shape"] for row in shown))
    kinds = sorted({(row["dtype"], row["layout"]) for row in shown}, reverse=True)
    width = 0.84 / len(kinds)
    picture, panels = figures.empty(rows=len(counts), height=1.0 + 2.2 * len(counts))
    for axes, count in zip(panels, counts, strict=True):
        shares = {
            (row["shape"], row["dtype"], row["layout"]): row["share_of_read"]
            for row in shown
            if row["threads"] == count
        }
        for index, kind in enumerate(kinds):
            places = [place + (index - (len(kinds) - 1) / 2) * width for place in range(len(shapes))]
            heights = [100 * shares.get((shape, *kind), math.nan) for shape in shapes]
            axes.bar(places, heights, width, color=figures.COLORS[index], label=", ".join(kind))
        axes.axhline(100, color="k", linewidth=0.8)
        axes.axhline(100 * SHARE_OF_READ_LARGE, color="k", linewidth=0.8, linestyle="--")
        axes.set_xticks(range(len(shapes)), shapes, fontsize=8)
        axes.set(ylabel=f"% of read bandwidth,\n{in_words(count)}", ylim=(0, 112))
    panels[0].legend(ncols=len(kinds), fontsize=7, loc="upper center", bbox_to_anchor=(0.5, 1.18), frameon=False)
    return figures.png(picture)


def _label(row: Row) -> str:
    keys = ("method", "shape", "layout", "dtype")
    return ", ".join([*(row[key] for key in keys), in_words(row["threads"]), row["cache"]])
