"""One row of explained inference beside plain inference, and the table of such rows for a model of one's own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffcam_fast.benchmark import peers
from diffcam_fast.benchmark.explanations import Work, bare_pull_back, classes_with_evidence, inference, ours
from diffcam_fast.benchmark.measure import QUICK, Candidate, Effort, WallClock, compare, in_words
from diffcam_fast.benchmark.report import Column, Report, Row, Table

INTRODUCTION = """\
Prediction and finished maps at the size of the images (Grad-CAM of one logit an image, at layer {layer}), as a multiple
of plain inference under `inference_mode`. *floor*: plain inference plus the bare pull-back from the logits to the
layer, of a graph that is there already. *channels-last*: plain inference on images in that order in memory, and *vs
faster*: our time by that of plain inference in the faster order; by itself the explainer hands contiguous images on
channels-last on a CPU where a network has depthwise separable convolutions. All alternate in one process; multiples
are medians of the quotients of single rounds, with their p20 and p80. Everybody's maps were checked against ours, ours
against plain PyTorch, before anything was timed.{absent}"""


@dataclass(frozen=True)
class Floor:
    """The least that an explanation could cost."""

    candidate: Candidate
    contains_inference: bool = False
    """Whether it runs the model, or comes on top of that."""


def row(
    work: Work,
    floor: Floor,
    others: Mapping[str, Candidate],
    *,
    what: str,
    effort: Effort,
    device: torch.device | str = "cpu",
) -> Row:
    """Plain inference, ours, the floor and others in turns.

    Args:
        work: what is explained.
        floor: the least that it could cost.
        others: by the names of `peers.PEERS`.
        what: names the row where a result is wrong.
        effort: how many rounds.
        device: where the model is.

    Returns:
        `multiple` of plain inference, `floor` as another, `vs_floor` by that, and `beyond_floor_us` in microseconds;
        `channels_last`, plain inference on channels-last images, as another multiple, and `vs_faster`, ours by the
        faster of both;
        each other's own multiple under its name and ours by it as `vs_NAME`; times in milliseconds.

    Raises:
        WrongResult: somebody's maps are not ours, or ours not those of plain PyTorch.
    """
    candidates = {
        "inference": inference(work),
        "channels_last": inference(work, channels_last=True),
        "ours": ours(work),
        "floor": floor.candidate,
        **others,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what other libraries warn of in each call
        timings, errors = compare(candidates, what=what, effort=effort, clock=WallClock(device))
    plain, last, mine, least = (timings[name] for name in ("inference", "channels_last", "ours", "floor"))
    faster = min(plain, last, key=lambda timing: timing.median)
    parts = (least,) if floor.contains_inference else (plain, least)
    bare = least.multiple("bare", plain)["bare"]
    found: Row = {
        "threads": torch.get_num_threads(),
        "rounds": plain.rounds,
        **mine.multiple("multiple", plain),
        "floor": bare if floor.contains_inference else 1 + bare,
        **mine.multiple("vs_floor", *parts),
        "beyond_floor_us": 1e6 * mine.beyond(*parts),
        **last.multiple("channels_last", plain),
        **mine.multiple("vs_faster", faster),
        **plain.milliseconds("inference_"),
        **mine.milliseconds("ours_"),
        **least.milliseconds("bare_"),
        "error": errors["ours"],
    }
    for name in others:
        found |= timings[name].multiple(name, plain)
        found |= mine.multiple(f"vs_{name}", timings[name]) | mine.interval(f"vs_{name}", timings[name])
        found |= timings[name].milliseconds(f"{name}_")
        found[f"{name}_error"] = errors[name]
    return found


def columns(present: Sequence[str]) -> list[Column]:
    """Of the table: ratios first.

    Args:
        present: the peers that there is something of.
    """
    return [
        Column("ours", "multiple", ".3f"),
        Column("p20", "multiple_p20", ".3f"),
        Column("p80", "multiple_p80", ".3f"),
        Column("floor", "floor", ".3f"),
        Column("vs floor", "vs_floor", ".3f"),
        Column("channels-last", "channels_last", ".3f"),
        Column("vs faster", "vs_faster", ".3f"),
        *(Column(peers.PEERS[name].title, name, ".2f") for name in present),
        Column("inference ms", "inference_ms", ".3g"),
        Column("rounds", "rounds", "d"),
    ]


def absent_peers() -> dict[str, str]:
    """The peers that cannot be compared with here, and why."""
    reasons = {name: peers.absent_because(name) for name in peers.PEERS}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def absence_line(absent: Mapping[str, str]) -> str:
    """What a report says of them; empty where there are none."""
    listed = "; ".join(f"{peers.PEERS[name].title} ({reason.splitlines()[0]})" for name, reason in absent.items())
    return f" Left out, because not to be had here: {listed}." if listed else ""


def run(
    model: nn.Module,
    batches: Sequence[Tensor],
    layer: str,
    reshape: Callable[[Tensor], Tensor] | None = None,
    *,
    device: torch.device,
    quick: bool = False,
) -> Report:
    """A model of one's own, at several batch sizes.

    Args:
        model: a classifier in evaluation mode, on the device.
        batches: images, there too.
        layer: the name of the one that is explained.
        reshape: see `diffcam_fast.Explainer`.
        device: where both are.
        quick: few rounds.

    Raises:
        WrongResult: somebody's maps are wrong.
        ValueError: there is no evidence at the layer.
    """
    absent = absent_peers()
    present = [name for name in peers.PEERS if name not in absent]
    rows = []
    for images in batches:
        classes = classes_with_evidence(model, images, layer, reshape)
        work = Work(model, images, classes, (layer,), reshape)
        others = {name: peers.candidate(name, work) for name in present if peers.PEERS[name].can(work)}
        place = {"layer": layer, "batch": len(images)}
        effort = QUICK if quick else Effort(seconds=10.0)
        floor = Floor(bare_pull_back(work))
        rows.append({**place, **row(work, floor, others, what=f"batch {len(images)}", effort=effort, device=device)})
    on = f"{device}, {in_words(torch.get_num_threads())}" if device.type == "cpu" else str(device)
    return Report(
        name="end_to_end",
        title="Explained inference beside plain inference",
        introduction=INTRODUCTION.format(layer=layer, absent=absence_line(absent)),
        rows=rows,
        tables=[Table(f"multiples of plain inference on {on}", rows, [Column("batch", "batch"), *columns(present)])],
        bars=[],
        label=lambda row: f"batch {row['batch']}",
        details={"absent_peers": absent},
    )
