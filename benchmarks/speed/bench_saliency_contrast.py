"""The compiled `saliency_contrast` beside what one would write with PyTorch, torch.compile and the reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.report import Bar, Column, Report, Row, Table
from benchmarks.speed.measure import (
    QUICK,
    Candidate,
    Effort,
    beside,
    compare,
    compiled,
    require_compiled,
    thread_counts,
    threads,
)
from diffcam_fast.ops.saliency_contrast import saliency_contrast
from diffcam_fast.reference.saliency_contrast import saliency_contrast as reference

#: Error against the float64 reference, as a share of the largest value. Plain norms in bfloat16 err as its input does.
ALLOWED = 1e-5

COMPARED = {"plain": "plain PyTorch", "compile": "torch.compile", "eager": "eager"}

INTRODUCTION = """\
One call of `saliency_contrast` for a batch of maps with three channels and the rivals of each, checks included.
*Plain PyTorch* divides by `torch.linalg.vector_norm`, subtracts and applies ReLU; it gives NaN where an energy is zero
or its square leaves float32. torch.compile is of that. *Eager* is the reference, which scales first. *vs ...*: our
median time by theirs; **below 1 we are faster**. Candidates alternate in one process, each run once right before it
is timed; each was checked against the float64 reference before it was timed."""


@dataclass(frozen=True)
class Case:
    """One row of the results."""

    images: int
    rivals: int
    size: int
    layout: str
    dtype: torch.dtype
    per_channel: bool
    threads: int

    def columns(self) -> Row:
        """The case as columns of a row."""
        return {
            "images": self.images,
            "rivals": self.rivals,
            "size": self.size,
            "layout": self.layout,
            "dtype": str(self.dtype).removeprefix("torch."),
            "energy": "of a channel" if self.per_channel else "of all channels",
            "threads": self.threads,
        }


def cases(quick: bool) -> list[Case]:
    """What is measured."""
    count = thread_counts()[-1]
    if quick:
        return [
            Case(2, 2, 32, "contiguous", torch.float32, True, 1),
            Case(2, 1, 32, "channels-last", torch.bfloat16, False, 1),
        ]
    return [
        Case(1, 1, 224, "contiguous", torch.float32, True, count),
        Case(1, 5, 224, "contiguous", torch.float32, True, count),
        Case(16, 1, 224, "contiguous", torch.float32, True, count),
        Case(16, 5, 224, "contiguous", torch.float32, True, count),
        Case(16, 5, 224, "contiguous", torch.float32, False, count),
        Case(16, 5, 224, "contiguous", torch.bfloat16, True, count),
        Case(16, 5, 224, "channels-last", torch.float32, True, count),
        Case(256, 5, 32, "contiguous", torch.float32, True, count),
    ]


class Inputs:
    """Maps of a case, and the contrasts that are right."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (case.images, 1 + case.rivals, 3, case.size, case.size)
        maps = torch.randn(shape, generator=generator).to(case.dtype)
        own, others = maps[:, 0].contiguous(), maps[:, 1:].contiguous()
        if case.layout == "channels-last":
            own = own.movedim(1, -1).contiguous().movedim(-1, 1)
            others = others.movedim(2, -1).contiguous().movedim(-1, 2)
        self.case, self.saliency, self.rivals = case, own, others
        self.expected = reference(own.double(), others.double(), case.per_channel)

    def error(self, found: Tensor) -> float:
        """The largest error, as a share of the largest value."""
        return ((found.double() - self.expected).abs().amax() / self.expected.amax()).item()


def plain(saliency: Tensor, rivals: Tensor, per_channel: bool) -> Tensor:
    """What the definition says, in PyTorch, for maps with two spatial dimensions."""
    axes = (-2, -1) if per_channel else (-3, -2, -1)
    own = saliency.float() / torch.linalg.vector_norm(saliency, dim=axes, keepdim=True, dtype=torch.float32)
    others = rivals.float() / torch.linalg.vector_norm(rivals, dim=axes, keepdim=True, dtype=torch.float32)
    return (own.unsqueeze(1) - others).relu()


def ours(inputs: Inputs) -> Candidate:
    """The op, with the check of its results."""
    per_channel = inputs.case.per_channel
    return Candidate(
        lambda copy: saliency_contrast(inputs.saliency, inputs.rivals, per_channel=per_channel), inputs.error, ALLOWED
    )


def competitors(inputs: Inputs) -> dict[str, Candidate]:
    """What a user could write instead, and the reference, with the same check."""
    arguments = (inputs.saliency, inputs.rivals, inputs.case.per_channel)
    fast = compiled(plain, *arguments)
    return {
        "plain": Candidate(lambda copy: plain(*arguments), inputs.error, ALLOWED),
        "compile": Candidate(lambda copy: fast(*arguments), inputs.error, ALLOWED),
        "eager": Candidate(lambda copy: reference(*arguments), inputs.error, ALLOWED),
    }


def measure(case: Case, effort: Effort) -> Row:
    """One row. The number of threads is set already."""
    inputs = Inputs(case)
    contenders = {"ours": ours(inputs), **competitors(inputs)}
    timings, errors = compare(contenders, what=_label(case.columns()), warm=True, effort=effort)
    mine = timings["ours"]
    moved = inputs.saliency.nbytes + inputs.rivals.nbytes + inputs.rivals.numel() * 4
    row = {**case.columns(), "rounds": mine.rounds, "error": errors["ours"], **mine.milliseconds()}
    return row | {"gb_per_s": 1e-9 * moved / mine.median} | beside(timings, errors, COMPARED)


def run(quick: bool = False) -> Report:
    """Measure everything, or for `quick` two small cases in a few rounds.

    Raises:
        NotCompiled: the reference serves.
        WrongResult: somebody's contrasts are wrong.
    """
    require_compiled("saliency_contrast")
    found = []
    with torch.no_grad():
        for case in tqdm(cases(quick), desc="saliency_contrast", disable=None):
            with threads(case.threads):
                found.append(measure(case, QUICK if quick else Effort(seconds=1.0)))
    return report(found)


def report(found: list[Row]) -> Report:
    """The rows as a report, with the table and the bars."""
    columns = [
        *(Column(name, name) for name in ("images", "rivals", "size", "layout", "dtype", "energy")),
        Column("ms", "ms", ".3g"),
        Column("p20", "ms_p20", ".3g"),
        Column("p80", "ms_p80", ".3g"),
        Column("GB/s", "gb_per_s", ".1f"),
    ]
    for name, title in COMPARED.items():
        columns += [Column(f"{title} ms", f"{name}_ms", ".3g"), Column(f"vs {title}", f"vs_{name}", ".3f")]
    return Report(
        name="saliency_contrast",
        title="saliency_contrast",
        introduction=f"{INTRODUCTION} {found[0]['threads']} threads.",
        rows=found,
        tables=[Table("Maps with three channels", found, columns)],
        bars=[
            Bar("no slower than plain PyTorch", "vs_plain", 1.0),
            Bar("no slower than torch.compile", "vs_compile", 1.0),
            Bar("no slower than the eager reference", "vs_eager", 1.0),
        ],
        label=_label,
    )


def _label(row: Row) -> str:
    return (
        f"{row['images']} x {row['rivals']} rivals, {row['size']} x {row['size']} {row['layout']} {row['dtype']}, "
        f"energy {row['energy']}"
    )
