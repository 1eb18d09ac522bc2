"""The compiled `logit_difference` beside torch.compile of the reference and the eager reference."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import diffcam_fast as dcf
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
from diffcam_fast.reference.logit_difference import BASELINES
from diffcam_fast.reference.logit_difference import logit_difference as reference_logit_difference

SHAPES = ((1, 1000), (64, 1000), (8, 21841))
TARGETS = (1, 5)
RANKS = (1, 2, 3)

#: Difference from the float64 reference, as a share of the largest number in each result. float32 sums over many
#: thousand classes, in whatever order.
SHARE_OF_LARGEST = 2e-5

INTRODUCTION = """\
One call of `diffcam_fast.logit_difference` on float32 logits (N, K) for T classes an image: difference, cotangent
and, where rivals are asked for, their indices and pairwise differences. Logits are small and were just computed by
a network, so caches are warm. *vs ...*: our median time by theirs; **below 1 we are faster**. torch.compile and
eager run the reference implementation. Candidates alternate in one process, each run once right before it is timed;
each was checked against the float64 reference before it was timed."""


@dataclass(frozen=True)
class Case:
    """One row of the results."""

    shape: tuple[int, int]
    targets: int
    baseline: str
    top_k: int | None
    threads: int

    @property
    def options(self) -> tuple[Any, ...]:
        """Arguments of the reference after the tensors."""
        ranks = list(RANKS) if self.baseline == "finer" else []
        return (self.baseline, self.top_k or 0, 1.0, 1.0, ranks)

    def columns(self) -> Row:
        """The case as columns of a row."""
        baseline = self.baseline if self.top_k is None else f"{self.baseline}, top {self.top_k}"
        return {
            "images": self.shape[0],
            "classes": self.shape[1],
            "targets": self.targets,
            "baseline": baseline,
            "threads": self.threads,
        }


def cases(quick: bool) -> list[Case]:
    """What is measured."""
    if quick:
        return [Case(SHAPES[0], 1, "logsumexp", None, 1)]
    folds = [*((baseline, None) for baseline in BASELINES), ("logsumexp", 5)]
    return [
        Case(shape, targets, baseline, top_k, thread_counts()[-1])
        for shape, targets, (baseline, top_k) in itertools.product(SHAPES, TARGETS, folds)
    ]


def inputs(case: Case) -> tuple[Tensor, Tensor]:
    """Logits (N, K) and classes (N, T)."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(case.shape, generator=generator)
    classes = torch.randint(case.shape[1], (case.shape[0], case.targets), generator=generator)
    return logits, classes


def ours(case: Case) -> Candidate:
    """The op, with the check of its results."""
    logits, classes = inputs(case)
    return Candidate(
        lambda copy: dcf.logit_difference(logits, classes, baseline=case.baseline, top_k=case.top_k),
        _check(case, logits, classes),
        SHARE_OF_LARGEST,
    )


def competitors(case: Case) -> dict[str, Candidate]:
    """The reference, compiled and eager, with the same check."""
    logits, classes = inputs(case)
    error = _check(case, logits, classes)
    fast = compiled(reference_logit_difference, logits, classes, *case.options)
    return {
        "compile": Candidate(lambda copy: fast(logits, classes, *case.options), error, SHARE_OF_LARGEST),
        "eager": Candidate(
            lambda copy: reference_logit_difference(logits, classes, *case.options), error, SHARE_OF_LARGEST
        ),
    }


def _check(case: Case, logits: Tensor, classes: Tensor) -> Callable[[Sequence[Tensor | None]], float]:
    exact = reference_logit_difference(logits.double(), classes, *case.options)

    def error(found: Sequence[Tensor | None]) -> float:
        return max(_error(mine, right) for mine, right in zip(found, exact, strict=True))

    return error


def _error(found: Tensor | None, exact: Tensor) -> float:
    if exact.numel() == 0 and (found is None or found.numel() == 0):
        return 0.0
    if found is None or found.shape != exact.shape:
        return float("inf")
    if not exact.is_floating_point():
        return 0.0 if torch.equal(found, exact) else float("inf")
    return (found.double() - exact).abs().max().item() / exact.abs().max().item()


def measure(case: Case, effort: Effort) -> Row:
    """One row. The number of threads is set already."""
    timings, errors = compare(
        {"ours": ours(case), **competitors(case)}, what=_label(case.columns()), warm=True, effort=effort
    )
    mine = timings["ours"]
    row = {**case.columns(), "rounds": mine.rounds, "error": errors["ours"], **mine.milliseconds()}
    return row | beside(timings, errors, ("compile", "eager"))


def run(quick: bool = False) -> Report:
    """Measure everything, or for `quick` one case in a few rounds.

    Raises:
        NotCompiled: the reference serves.
        WrongResult: somebody's differences are wrong.
    """
    require_compiled("logit_difference")
    found = []
    with torch.no_grad():
        for case in tqdm(cases(quick), desc="logit_difference", disable=None):
            with threads(case.threads):
                found.append(measure(case, QUICK if quick else Effort(seconds=0.2)))
    return report(found)


def report(found: list[Row]) -> Report:
    """The rows as a report, with the tables and the bars."""
    columns = [
        Column("T", "targets"),
        Column("baseline", "baseline"),
        Column("ms", "ms", ".3g"),
        Column("p20", "ms_p20", ".3g"),
        Column("p80", "ms_p80", ".3g"),
        Column("compile ms", "compile_ms", ".3g"),
        Column("vs compile", "vs_compile", ".2f"),
        Column("eager ms", "eager_ms", ".3g"),
        Column("vs eager", "vs_eager", ".2f"),
    ]
    shapes = dict.fromkeys((row["images"], row["classes"]) for row in found)
    return Report(
        name="logit_difference",
        title="logit_difference",
        introduction=f"{INTRODUCTION} {found[0]['threads']} threads.",
        rows=found,
        tables=[
            Table(
                f"{images} x {classes} logits",
                [row for row in found if (row["images"], row["classes"]) == (images, classes)],
                columns,
            )
            for images, classes in shapes
        ],
        bars=[
            Bar("no slower than torch.compile", "vs_compile", 1.0),
            Bar("no slower than the eager reference", "vs_eager", 1.0),
        ],
        label=_label,
    )


def _label(row: Row) -> str:
    return f"{row['baseline']}, {row['images']} x {row['classes']} logits, T = {row['targets']}"
