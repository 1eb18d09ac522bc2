"""How the cost of an explanation grows: with the batch, the classes, the layers and the size of the images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from benchmarks import figures
from benchmarks.report import Column, Report, Row, Table
from benchmarks.speed.measure import QUICK, Effort, in_words, thread_counts, threads
from benchmarks.speed.networks import POOLED, SIZE
from diffcam_fast.benchmark.end_to_end import Floor, columns, row
from diffcam_fast.benchmark.explanations import Work, bare_input_gradient, bare_pull_back, classes_with_evidence, images

NETWORK = POOLED[1]
#: What mobilenet_v2 consists of; the last of them is the layer that is usually explained.
LAYERS = tuple(f"features.{index}" for index in range(19))
BATCH = 8
EFFORT = Effort(seconds=2.0)
#: Of the images of a smoke run.
QUICK_SIZE = 64

BATCHES = (1, 2, 4, 8, 16, 32, 64)
CLASSES = (1, 3, 10, 30, 100, 300, 1000)
LAYER_COUNTS = (1, 2, 4, 8, 12, 19)
SIZES = (224, 320, 448, 640, 1024)

CAPTION = (
    "Explained inference as a multiple of plain inference on mobilenet_v2, as one quantity grows: ours, and the floor."
)
INTRODUCTION = """\
mobilenet_v2 with seeded random weights, Grad-CAM of logits, {threads}, float32. One quantity grows at a time;
the others stay: batch {batch} (1 for the size of the images), one class, the last layer, images of {size} x {size}.
Maps at the layers' own sizes. *floor*: plain inference plus the bare pull-back of the one class from the logits to the
layer; for layers, the bare forward pass and gradient of the images. Everything else is as in
[end_to_end.md](end_to_end.md)."""


@dataclass(frozen=True)
class Point:
    """One point of a curve."""

    growing: str
    batch: int = BATCH
    classes: int = 1
    layers: int = 1
    size: int = SIZE

    @property
    def value(self) -> int:
        """How much of what grows."""
        return int(getattr(self, "size" if self.growing == "image" else self.growing))


def points(quick: bool) -> list[Point]:
    """Every point of every curve."""
    if quick:
        return [
            Point("batch", batch=2, size=QUICK_SIZE),
            Point("classes", batch=1, classes=3, size=QUICK_SIZE),
            Point("layers", batch=1, layers=2, size=QUICK_SIZE),
            Point("image", batch=1, size=QUICK_SIZE),
        ]
    return [
        *(Point("batch", batch=batch) for batch in BATCHES),
        *(Point("classes", classes=classes) for classes in CLASSES),
        *(Point("layers", layers=layers) for layers in LAYER_COUNTS),
        *(Point("image", batch=1, size=size) for size in SIZES),
    ]


def measure(point: Point, model: nn.Module, effort: Effort) -> Row:
    """One row. The number of threads is set already."""
    batch = images(point.batch, (point.size, point.size))
    layers = LAYERS[-point.layers :]
    first = classes_with_evidence(model, batch, LAYERS[-1])
    classes = (first + torch.arange(point.classes)) % 1000
    work = Work(model, batch, classes, layers, at_input_size=False)
    if point.growing == "layers":
        floor = Floor(bare_input_gradient(work), contains_inference=True)
    else:
        floor = Floor(bare_pull_back(Work(model, batch, first, layers)))
    what = f"{point.growing} {point.value}"
    found = row(work, floor, {}, what=what, effort=effort)
    return {"growing": point.growing, "value": point.value, "network": NETWORK.name, **found}


def rows(chosen: list[Point], effort: Effort) -> Iterator[Row]:
    """Measure the points."""
    model = NETWORK.build()
    for point in tqdm(chosen, desc="growth", disable=None):
        yield measure(point, model, effort)


def run(quick: bool = False) -> Report:
    """Measure everything, or for `quick` one point of each curve in a few rounds, on one thread.

    Raises:
        WrongResult: maps are wrong.
        ImportError: torchvision is missing.
    """
    with threads(1 if quick else thread_counts()[-1]):
        return report(list(rows(points(quick), QUICK if quick else EFFORT)))


def report(found: list[Row]) -> Report:
    """The rows as a report, a table and a panel of the figure for each curve."""
    curves = dict.fromkeys(row["growing"] for row in found)
    titles = {"batch": "Batch", "classes": "Classes", "layers": "Layers", "image": "Image size"}
    return Report(
        name="growth",
        title="Growth of the cost of an explanation",
        introduction=INTRODUCTION.format(threads=in_words(found[0]["threads"]), batch=BATCH, size=SIZE),
        rows=found,
        tables=[
            Table(
                titles[growing],
                [row for row in found if row["growing"] == growing],
                [Column(titles[growing].lower(), "value", "d"), *columns([]), Column("ours ms", "ours_ms", ".3g")],
            )
            for growing in curves
        ],
        bars=[],
        label=lambda row: f"{row['growing']} {row['value']}",
        figures={"growth.png": (CAPTION, figure(found))},
    )


def figure(found: list[Row]) -> bytes:
    """A panel for each curve."""
    curves = list(dict.fromkeys(row["growing"] for row in found))
    names = {
        "batch": "images a batch",
        "classes": "classes an image",
        "layers": "layers, from the last on",
        "image": "side of an image (pixels)",
    }
    picture, panels = figures.empty(rows=2, columns=2, height=5.6)
    for axes, growing in zip(panels, curves, strict=True):
        of_curve = [row for row in found if row["growing"] == growing]
        values = [row["value"] for row in of_curve]
        multiples = [row["multiple"] for row in of_curve]
        spread = [[row[f"multiple_{end}"] for row in of_curve] for end in ("p20", "p80")]
        axes.fill_between(values, *spread, color=figures.COLORS[0], alpha=0.2, linewidth=0, label="p20 to p80")
        axes.plot(values, multiples, marker="o", markersize=3, color=figures.COLORS[0], label="diffcam_fast")
        floors = [row["floor"] for row in of_curve]
        label = "floor: forward and input gradient" if growing == "layers" else "floor: one class"
        axes.plot(values, floors, color="k", linewidth=0.8, linestyle="--", label=label)
        axes.set(xlabel=names[growing], ylabel="times plain inference")
        if growing != "layers":
            axes.set_xscale("log")
        axes.set_xticks(values, [str(value) for value in values])
        axes.minorticks_off()
        top = max(*spread[1], *floors)
        axes.set_ylim(min(0.95, *spread[0]), max(1.15, top + 0.5 * (top - 1)))  # the legend fits above
        axes.legend(fontsize=7, frameon=False, loc="upper left")
    return figures.png(picture)
