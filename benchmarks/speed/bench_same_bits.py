"""Plain inference, and the same bits sooner: pooling on copies, and channels-last images as far as nothing changes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.report import Bar, Column, Report, Row, Table
from benchmarks.speed.measure import QUICK, Candidate, Effort, compare, in_words, thread_counts, threads
from benchmarks.speed.networks import Network
from diffcam_fast.benchmark.explanations import images
from diffcam_fast.explain.exact_format import NOWHERE, Restoring, exact_format
from diffcam_fast.explain.habits import SETTLING
from diffcam_fast.explain.memory_format import FasterFormat
from diffcam_fast.explain.pooling import FasterPooling, max_poolings

SIDE = 224

NETWORKS = (
    Network("resnet50", "layer4"),
    Network("vgg16", "features.29"),
    Network("densenet121", "features.denseblock4"),
    Network("googlenet", "inception5b"),
    Network("squeezenet1_0", "features.12"),
    Network("mobilenet_v2", "features"),
    Network("mobilenet_v3_large", "features"),
    Network("mnasnet1_0", "layers"),
    Network("efficientnet_b0", "features"),
    Network("shufflenet_v2_x1_0", "conv5"),
)
BATCHES = (1, 8, 32)
DTYPES = (torch.float32, torch.bfloat16)
#: bfloat16 and one thread are looked at on fewer.
FEWER = ("resnet50", "mobilenet_v2")
EFFORT = Effort(seconds=2.0)

INTRODUCTION = """\
The forward pass alone, under `inference_mode`, on torchvision's networks with seeded random weights and contiguous
images of 3 x 224 x 224. *share*: the time of the pass as explanations run it by that of the same model called plainly,
the median of the quotients of single rounds. *by*: what differs. *pooling*: max pooling of channels-last copies;
*order*: in float32, channels-last images up to where bits would change. The latter is for drop-ins alone: `Explainer`
hands such networks channels-last images throughout ([memory_format.md](memory_format.md)). Logits were checked to be
the same, bit for bit, before anything was timed. *found in*: what it takes to find out how far the order changes
nothing, as a multiple of plain inference; drop-ins do so once for a shape, when it has come {settling} times."""


@dataclass(frozen=True)
class Case:
    """One row of the results."""

    network: Network
    batch: int
    dtype: torch.dtype
    threads: int

    def columns(self) -> Row:
        """The row's first cells."""
        return {
            "network": self.network.name,
            "batch": self.batch,
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": self.threads,
        }


def cases(quick: bool) -> list[Case]:
    """What is measured; cases of the same network follow each other."""
    counts = thread_counts()
    if quick:
        return [Case(network, 1, torch.float32, 1) for network in NETWORKS if network.name in FEWER]
    return [
        Case(network, batch, dtype, count)
        for network in NETWORKS
        for dtype in DTYPES
        for count in counts
        for batch in BATCHES
        if (dtype == torch.float32 and count == counts[-1]) or (network.name in FEWER and batch < BATCHES[-1])
    ]


def measure(case: Case, model: nn.Module, side: int, effort: Effort) -> Row:
    """One row."""
    given = images(case.batch, (side, side)).to(case.dtype)
    with threads(case.threads), torch.inference_mode():
        faster = FasterFormat(model)(given)
        model(given)
        start = time.perf_counter()
        found = None if faster is None else exact_format(model, [model.get_submodule(case.network.layer)], given)
        finding = time.perf_counter() - start
        where = NOWHERE if found is None else found
        poolings = max_poolings(model)

        def ours(copy: int) -> Tensor:
            ordered = given if found is None else given.contiguous(memory_format=torch.channels_last)
            with FasterPooling(poolings), Restoring(where):
                logits: Tensor = model(ordered)
            return logits

        expected = model(given)
        candidates = {
            "plain": Candidate(lambda copy: model(given), lambda logits: 0.0, 0.0),
            "ours": Candidate(ours, lambda logits: 0.0 if torch.equal(logits, expected) else float("inf"), 0.0),
        }
        timings, _ = compare(candidates, what=_label(case.columns()), effort=effort)
    differs = [word for word, there in (("pooling", poolings), ("order", found is not None)) if there]
    row = {
        **case.columns(),
        "by": ", ".join(differs) or "nothing",
        "rounds": timings["ours"].rounds,
        **timings["ours"].multiple("share", timings["plain"]),
        **timings["plain"].milliseconds("plain_"),
        **timings["ours"].milliseconds(),
    }
    return row if found is None else row | {"finding": finding / timings["plain"].median}


def rows(chosen: list[Case], side: int, effort: Effort) -> Iterator[Row]:
    """Measure the cases; a network is built once for those that share it."""
    built: Network | None = None
    for case in tqdm(chosen, desc="same_bits", disable=None):
        if built != case.network:
            built, model = case.network, case.network.build()
        yield measure(case, model.to(case.dtype), side, effort)
        model.float()


def run(quick: bool = False) -> Report:
    """Measure everything, or for `quick` two networks in a few rounds.

    Raises:
        WrongResult: logits are not the same.
        ImportError: torchvision is missing.
    """
    return report(list(rows(cases(quick), 64 if quick else SIDE, QUICK if quick else EFFORT)))


def report(found: list[Row]) -> Report:
    """The rows as a report."""
    kinds = dict.fromkeys((row["dtype"], row["threads"]) for row in found)
    return Report(
        name="same_bits",
        title="The same bits sooner",
        introduction=INTRODUCTION.format(settling=SETTLING),
        rows=found,
        tables=[
            Table(
                f"{dtype}, {in_words(count)}",
                [row for row in found if (row["dtype"], row["threads"]) == (dtype, count)],
                [
                    Column("network", "network"),
                    Column("images", "batch", "d"),
                    Column("by", "by"),
                    Column("share", "share", ".3f"),
                    Column("p20", "share_p20", ".3f"),
                    Column("p80", "share_p80", ".3f"),
                    Column("plain ms", "plain_ms", ".3g"),
                    Column("found in", "finding", ".1f"),
                    Column("rounds", "rounds", "d"),
                ],
            )
            for dtype, count in kinds
        ],
        bars=[Bar("not slower than the model called plainly: at most 1.02", "share", 1.02)],
        label=_label,
    )


def _label(row: Row) -> str:
    return f"{row['network']}, batch {row['batch']}, {row['dtype']}, {in_words(row['threads'])}"
