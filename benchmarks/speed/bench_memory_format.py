"""Plain inference on contiguous and on channels-last images, and which of the two explanations choose by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from benchmarks.report import Bar, Column, Report, Row, Table
from benchmarks.speed.measure import QUICK, Candidate, Effort, compare, in_words, thread_counts, threads
from benchmarks.speed.networks import Network
from diffcam_fast.benchmark.explanations import LOGITS_TOLERANCE, images
from diffcam_fast.explain.memory_format import FasterFormat

NETWORKS = (
    "mobilenet_v2",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "shufflenet_v2_x1_0",
    "convnext_tiny",
    "regnet_y_400mf",
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "densenet121",
    "vgg11_bn",
    "squeezenet1_0",
    "vit_b_16",
)
DTYPES = (torch.float32, torch.bfloat16)
#: Side and number of images.
IMAGES = ((224, 1), (224, 2), (224, 8), (64, 8), (64, 128))
#: bfloat16 and one thread are looked at on fewer.
FEWER = ("mobilenet_v2", "efficientnet_b0", "resnet50")
EFFORT = Effort(seconds=1.0)

INTRODUCTION = """\
The forward pass alone, under `inference_mode`, on torchvision's networks with seeded random weights. *channels-last*:
the time on channels-last images by that on contiguous ones, which no copy of the images is counted in; the median of
the quotients of single rounds. *chosen*: the order that `memory_format="auto"` hands contiguous images on in:
channels-last for networks with depthwise separable convolutions. *logits*: the largest difference, as a share of the
largest logit; they were compared before anything was timed."""


@dataclass(frozen=True)
class Case:
    """One row of the results."""

    network: str
    side: int
    batch: int
    dtype: torch.dtype
    threads: int

    def columns(self) -> Row:
        """The row's first cells."""
        return {
            "network": self.network,
            "side": self.side,
            "batch": self.batch,
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": self.threads,
        }


def cases(quick: bool) -> list[Case]:
    """What is measured; cases of the same network follow each other."""
    counts = thread_counts()
    if quick:
        return [Case("mobilenet_v2", 64, 1, torch.float32, 1)]
    return [
        Case(network, side, batch, dtype, count)
        for network in NETWORKS
        for dtype in DTYPES
        for count in counts
        for side, batch in IMAGES
        if (dtype == torch.float32 and count == counts[-1]) or (network in FEWER and (side, batch) != (64, 128))
        if network != "vit_b_16" or side == 224
    ]


def measure(case: Case, model: nn.Module, effort: Effort) -> Row:
    """One row."""
    given = images(case.batch, (case.side, case.side)).to(case.dtype)
    orders = {"contiguous": given, "channels_last": given.contiguous(memory_format=torch.channels_last)}
    with threads(case.threads), torch.inference_mode():
        expected = model(given)
        # Two ways of rounding, half precision's being coarse.
        tolerance = LOGITS_TOLERANCE if case.dtype == torch.float32 else 0.2

        def error(found: torch.Tensor) -> float:
            return float((found - expected).abs().amax() / expected.abs().amax())

        candidates = {
            name: Candidate(lambda copy, batch=batch: model(batch), error, tolerance) for name, batch in orders.items()
        }
        timings, errors = compare(candidates, what=_label(case.columns()), effort=effort)
    chosen = FasterFormat(model)(given) is not None
    return {
        **case.columns(),
        "rounds": timings["contiguous"].rounds,
        **timings["channels_last"].multiple("channels_last", timings["contiguous"]),
        "chosen": "channels-last" if chosen else "as it comes",
        **timings["contiguous"].milliseconds("contiguous_"),
        **timings["channels_last"].milliseconds("channels_last_"),
        "error": errors["channels_last"],
    }


def rows(chosen: list[Case], effort: Effort) -> Iterator[Row]:
    """Measure the cases; a network is built once for those that share it."""
    built: str | None = None
    for case in tqdm(chosen, desc="memory_format", disable=None):
        if built != case.network:
            built, model = case.network, Network(case.network, "", tokens=case.network == "vit_b_16").build()
        yield measure(case, model.to(case.dtype), effort)
        model.float()


def run(quick: bool = False) -> Report:
    """Measure everything, or for `quick` one network in a few rounds.

    Raises:
        WrongResult: logits depend on the order.
        ImportError: torchvision is missing.
    """
    return report(list(rows(cases(quick), QUICK if quick else EFFORT)))


def report(found: list[Row]) -> Report:
    """The rows as a report."""
    kinds = dict.fromkeys((row["dtype"], row["threads"]) for row in found)
    return Report(
        name="memory_format",
        title="Contiguous and channels-last images",
        introduction=INTRODUCTION,
        rows=found,
        tables=[
            Table(
                f"{dtype}, {in_words(count)}",
                [row for row in found if (row["dtype"], row["threads"]) == (dtype, count)],
                [
                    Column("network", "network"),
                    Column("side", "side", "d"),
                    Column("images", "batch", "d"),
                    Column("channels-last", "channels_last", ".2f"),
                    Column("p20", "channels_last_p20", ".2f"),
                    Column("p80", "channels_last_p80", ".2f"),
                    Column("chosen", "chosen"),
                    Column("logits", "error", ".1e"),
                    Column("contiguous ms", "contiguous_ms", ".3g"),
                    Column("rounds", "rounds", "d"),
                ],
            )
            for dtype, count in kinds
        ],
        bars=[
            Bar(
                "where channels-last is chosen it is not slower: at most 1.02 of contiguous",
                "channels_last",
                1.02,
                applies=lambda row: row["chosen"] == "channels-last",
            )
        ],
        label=_label,
    )


def _label(row: Row) -> str:
    return (
        f"{row['network']}, {row['batch']} of {row['side']} x {row['side']}, {row['dtype']}, {in_words(row['threads'])}"
    )
