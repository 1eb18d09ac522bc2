"""Each class of the drop-ins beside the original whose name it has: the same maps, and how much sooner."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.report import Bar, Column, Report, Row, Table
from benchmarks.speed.measure import QUICK, Candidate, Effort, compare, in_words, thread_counts, threads
from benchmarks.speed.networks import POOLED, SIZE, Network
from diffcam_fast.benchmark import peers
from diffcam_fast.benchmark.explanations import (
    Work,
    bare_pull_back,
    classes_with_evidence,
    images,
    inference,
    twin,
)
from diffcam_fast.explain.habits import SETTLING
from diffcam_fast.explain.memory_format import FasterFormat

#: What maps may differ by, as a share of the range of the original's: what users of the drop-ins are promised.
TOLERANCE = 1e-5

NETWORKS = POOLED[:2]
BATCHES = (1, 8, 32)
#: Of the images of a smoke run.
QUICK_SIZE = 96

#: Classes whose original leaves NumPy's threads spinning, and for how many seconds nobody is timed after a call:
#: OpenBLAS's wait a while for more work before they sleep.
SPINNING = ("EigenCAM", "EigenGradCAM")
REST = 0.1

GRAD_CAM, TORCHCAM, CAPTUM = "pytorch_grad_cam", "torchcam", "captum"

INTRODUCTION = """\
Each class of `diffcam_fast.compat` beside the installed original, called by the same code with another import, on
torchvision's networks with seeded random weights and images of 3 x 224 x 224, float32, {threads}: prediction and
finished maps, as the class returns them. *faster*: the original's median time divided by ours; *low* and *high*: the
95 % confidence interval of the median of the quotients of single rounds. Both alternate in one process and in shuffled
order, each on a model of its own; every row says in how many rounds. Memory that was freed stays with the process: who
has to ask the system for new memory would otherwise depend on what others keep until their next call. Before anything
was timed our maps were compared with the original's, and those were checked not to be empty: *error* is the largest
difference as a share of a map's range.

{parts}

*floor*: plain inference under `inference_mode` and the bare pull-back from the logits to the layer, of a graph that is
there already: how many times faster the explanation is that costs nothing else. The pass of an explanation may take
less than plain inference, with the same bits ([same_bits.md](same_bits.md)). Where ours has to find out about that it
was called {settling} times before.{absent}"""

PARTS = """\
torchcam's GradCAMpp leaves out a division of its formula, as ours does under `strict=True`: that is what is measured.
The original of EigenCAM and EigenGradCAM takes up to a second an image, that of SmoothGradCAMpp five forward passes:
these have no row for a batch of 32. In the rows of EigenCAM and EigenGradCAM nobody is timed for a tenth of a second
after each call: the original leaves NumPy's threads spinning, which slows down whoever comes next."""

Call = Callable[[], Tensor]
"""Explains the images; returns maps (N, h, w)."""


@dataclass(frozen=True)
class Scene:
    """What is explained."""

    model: nn.Module
    layer: str
    images: Tensor
    classes: list[int]

    def first(self, count: int) -> Scene:
        """The first images alone."""
        return Scene(self.model, self.layer, self.images[:count], self.classes[:count])

    def work(self) -> Work:
        """The same as others describe it."""
        return Work(self.model, self.images, torch.tensor(self.classes)[:, None], (self.layer,))


@dataclass(frozen=True)
class Library:
    """A library that has a counterpart here."""

    title: str

    original: str
    """Where user code imports its classes from."""

    ours: str

    classes: tuple[str, ...]

    set_up: Callable[..., Call]
    """From the module, ours or theirs, the class, a model of its own, the scene and options of the class to what is
    timed."""

    batches: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """By class, where it is not all of them: more would take minutes."""

    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By class, what ours needs for the same maps."""


def _pytorch_grad_cam(library: ModuleType, name: str, model: nn.Module, scene: Scene, **options: Any) -> Call:
    method = getattr(library, name)(model=model, target_layers=[model.get_submodule(scene.layer)], **options)
    if name == "FinerCAM":  # which finds its targets by itself
        return lambda: torch.from_numpy(method(input_tensor=scene.images))
    targets = [library.utils.model_targets.ClassifierOutputTarget(index) for index in scene.classes]
    return lambda: torch.from_numpy(method(input_tensor=scene.images, targets=targets))


def _torchcam(library: ModuleType, name: str, model: nn.Module, scene: Scene, **options: Any) -> Call:
    if name == "CAM":
        options["fc_layer"] = [each for each, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    extractor = getattr(library, name)(model, scene.layer, **options)

    def call() -> Tensor:
        if name == "SmoothGradCAMpp":
            torch.manual_seed(0)  # it draws noise
        with torch.inference_mode(name == "CAM"):  # which needs no gradients
            scores = model(scene.images)
        maps: Tensor = extractor(scene.classes, scores)[0]
        return maps

    return call


def _captum(library: ModuleType, name: str, model: nn.Module, scene: Scene, **options: Any) -> Call:
    method = getattr(library, name)(model, model.get_submodule(scene.layer), **options)
    target = torch.tensor(scene.classes)

    def call() -> Tensor:
        maps: Tensor = method.attribute(scene.images, target).detach()[:, 0]
        return maps

    return call


LIBRARIES = {
    GRAD_CAM: Library(
        "pytorch-grad-cam",
        "pytorch_grad_cam",
        "diffcam_fast.compat.pytorch_grad_cam",
        (
            "GradCAM",
            "HiResCAM",
            "GradCAMElementWise",
            "GradCAMPlusPlus",
            "XGradCAM",
            "LayerCAM",
            "FinerCAM",
            "EigenCAM",
            "EigenGradCAM",
        ),
        _pytorch_grad_cam,
        {"EigenCAM": (1, 8), "EigenGradCAM": (1, 8)},
    ),
    TORCHCAM: Library(
        "torchcam",
        "torchcam.methods",
        "diffcam_fast.compat.torchcam.methods",
        ("GradCAM", "GradCAMpp", "SmoothGradCAMpp", "XGradCAM", "LayerCAM", "FinerCAM", "CAM"),
        _torchcam,
        {"SmoothGradCAMpp": (1, 8)},
        {"GradCAMpp": {"strict": True}},
    ),
    CAPTUM: Library("captum", "captum.attr", "diffcam_fast.compat.captum.attr", ("LayerGradCam",), _captum),
}


@dataclass(frozen=True)
class Case:
    """One row of the results."""

    library: str
    method: str
    network: Network
    batch: int

    @property
    def yardstick(self) -> bool:
        """Whether the floor is measured beside it: once for a network and a batch."""
        return (self.library, self.method) == (GRAD_CAM, "GradCAM")

    def columns(self) -> Row:
        """The case as columns of a row."""
        return {
            "library": LIBRARIES[self.library].title,
            "class": self.method,
            "network": self.network.name,
            "batch": self.batch,
        }


def cases(quick: bool) -> list[Case]:
    """What is measured, of every library; cases of the same network follow each other."""
    networks, batches = (NETWORKS[1:], (1,)) if quick else (NETWORKS, BATCHES)
    return [
        Case(key, method, network, batch)
        for network in networks
        for key, library in LIBRARIES.items()
        for method in library.classes
        for batch in batches
        if batch in library.batches.get(method, BATCHES)
    ]


def effort_for(case: Case) -> Effort:
    """Where a round takes seconds, few of them have to do: it is too long for an interruption to matter."""
    if case.library == TORCHCAM and case.method not in LIBRARIES[TORCHCAM].batches:
        # The user's own pass is nearly all there is to either: it takes rounds to tell them apart, most of all where
        # the machine has two speeds, and changes between them within a row.
        return Effort(seconds=36.0 if case.batch > 8 else 12.0, minimum_rounds=15, maximum_rounds=240)
    long = case.batch > 1 and case.method in LIBRARIES[case.library].batches
    return Effort(seconds=3.0, minimum_rounds=3 if long else 5, maximum_rounds=60)


def scene_of(network: Network, count: int, size: int) -> Scene:
    """Images, and for each the likeliest class with a map that is not empty."""
    model = network.build()
    batch = images(count, (size, size))
    classes = classes_with_evidence(model, batch, network.layer)[:, 0].tolist()
    return Scene(model, network.layer, batch, classes)


def pair(library: Library, method: str, scene: Scene) -> dict[str, Candidate]:
    """The original and ours, which has to return what the original returns."""
    calls = {
        name: library.set_up(importlib.import_module(place), method, twin(scene.model), scene, **options)
        for name, place, options in (
            ("original", library.original, {}),
            ("ours", library.ours, library.options.get(method, {})),
        )
    }
    # Checked in this order, each once.
    expected: list[Tensor] = []

    def emptiness(maps: Tensor) -> float:
        expected[:] = [maps]
        # A map that is the same everywhere would agree with too much.
        return 0.0 if (maps.flatten(1).amax(1) > maps.flatten(1).amin(1)).all() else float("inf")

    # After ours, too, so that both are timed after a rest.
    rest = REST if method in SPINNING else 0.0
    return {
        "original": Candidate(lambda copy: calls["original"](), emptiness, 0.0, rest),
        "ours": Candidate(lambda copy: calls["ours"](), lambda found: difference(found, expected[0]), TOLERANCE, rest),
    }


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference of maps (N, h, w), as a share of the range of the expected one; infinite for others."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return float("inf")
    flat = expected.flatten(1)
    return ((found - expected).abs().flatten(1).amax(1) / (flat.amax(1) - flat.amin(1))).amax().item()


def measure(case: Case, scene: Scene, effort: Effort) -> Row:
    """One row. The number of threads is set already."""
    scene = scene.first(case.batch)
    candidates = pair(LIBRARIES[case.library], case.method, scene)
    if case.yardstick:
        work = scene.work()
        candidates |= {"inference": inference(work), "bare": bare_pull_back(work)}
    if case.library == GRAD_CAM and FasterFormat(scene.model)(scene.images) is not None:
        for _ in range(SETTLING + 1):
            candidates["ours"].run(0)
    timings, errors = compare(candidates, what=_label(case.columns()), effort=effort)
    mine, original = timings["ours"], timings["original"]
    row = {
        **case.columns(),
        "threads": torch.get_num_threads(),
        "rounds": mine.rounds,
        "error": errors["ours"],
        **original.multiple("faster", mine),
        "faster": original.median / mine.median,
        **original.interval("faster", mine),
        **mine.milliseconds(),
        **original.milliseconds("original_"),
    }
    if case.yardstick:
        least = timings["inference"], timings["bare"]
        row |= {"inference_ms": 1e3 * least[0].median, "bare_ms": 1e3 * least[1].median}
        row |= {**mine.multiple("vs_floor", *least), **original.multiple("floor_faster", *least)}
    return row


def rows(chosen: list[Case], size: int, effort: Callable[[Case], Effort]) -> Iterator[Row]:
    """Measure the cases; a network is built once for those that share it."""
    built: Network | None = None
    largest = max((case.batch for case in chosen), default=0)
    for case in tqdm(chosen, desc="compat", disable=None):
        if built != case.network:
            built, scene = case.network, scene_of(case.network, largest, size)
        yield measure(case, scene, effort(case))


def run(quick: bool = False) -> Report:
    """Measure everything, or for `quick` one network in a few rounds, on one thread.

    Raises:
        WrongResult: maps are not those of the original.
        ImportError: torchvision is missing, or all originals are.
    """
    # torchvision's build for GPUs, which pytorch-grad-cam imports, does not load beside a PyTorch without them.
    importlib.import_module("tests.helpers.torchvision_cpu")
    absent = {name: reason for name in LIBRARIES if (reason := peers.absent_because(name)) is not None}
    chosen = [case for case in cases(quick) if case.library not in absent]
    if not chosen:
        raise ImportError(f"no original to compare with: {absent}")
    with torch.random.fork_rng(devices=[]), threads(1 if quick else thread_counts()[-1]):
        found = list(rows(chosen, QUICK_SIZE if quick else SIZE, (lambda case: QUICK) if quick else effort_for))
    return report(found, absent)


def report(found: list[Row], absent: Mapping[str, str]) -> Report:
    """The rows as a report, with tables and bars."""
    missing = ", ".join(f"{LIBRARIES[name].title} ({reason})" for name, reason in absent.items())
    return Report(
        name="compat",
        title="Drop-ins beside the originals",
        introduction=INTRODUCTION.format(
            threads=in_words(found[0]["threads"]),
            parts=PARTS,
            settling=SETTLING + 1,
            absent=f"\n\nNot to be had here: {missing}." if absent else "",
        ),
        rows=found,
        tables=_tables(found),
        bars=bars(found),
        label=_label,
        details={"absent": dict(absent), "tolerance": TOLERANCE},
    )


def bars(found: list[Row]) -> list[Bar]:
    """The limits, and what the rows say about those that miss them."""
    three = Bar(
        "at least 3 times faster than pytorch-grad-cam",
        "faster",
        3.0,
        at_least=True,
        applies=lambda row: row["library"] == LIBRARIES[GRAD_CAM].title,
    )
    return [
        Bar("never slower than the original", "faster", 1.0, at_least=True).because(found, _why_slower),
        three.because(found, partial(_why_not_three_times, found)),
    ]


def _why_slower(missed: list[Row]) -> str:
    even = sum(row["faster_high"] >= 1 for row in missed)
    return f"in {even} of {len(missed)} the two cannot be told apart: the 95 % interval of the quotient reaches 1"


def _why_not_three_times(found: list[Row], missed: list[Row]) -> str:
    plain = {(row["network"], row["batch"]): row["inference_ms"] for row in found if "inference_ms" in row}
    shares = [
        row["original_ms"] / 3 / plain[row["network"], row["batch"]]
        for row in missed
        if (row["network"], row["batch"]) in plain
    ]
    if not shares:
        return ""
    return (
        f"a third of the original's time is {min(shares):.2f} to {max(shares):.2f} times plain inference in these rows"
    )


def _tables(found: list[Row]) -> list[Table]:
    columns = [
        Column("class", "class"),
        Column("network", "network"),
        Column("batch", "batch"),
        Column("faster", "faster", ".2f"),
        Column("low", "faster_low", ".2f"),
        Column("high", "faster_high", ".2f"),
        Column("ours ms", "ms", ".3g"),
        Column("original ms", "original_ms", ".3g"),
        Column("error", "error", ".1e"),
        Column("rounds", "rounds", "d"),
    ]
    floor = [
        *columns[1:4],
        Column("floor", "floor_faster", ".2f"),
        Column("ours vs floor", "vs_floor", ".3f"),
        Column("p20", "vs_floor_p20", ".3f"),
        Column("p80", "vs_floor_p80", ".3f"),
        Column("inference ms", "inference_ms", ".3g"),
        Column("bare pull-back ms", "bare_ms", ".2g"),
    ]
    titles = dict.fromkeys(row["library"] for row in found)
    tables = [Table(title, [row for row in found if row["library"] == title], columns) for title in titles]
    measured = [row for row in found if "floor_faster" in row]
    return [*tables, *([Table("pytorch-grad-cam's GradCAM and the floor", measured, floor)] if measured else [])]


def _label(row: Row) -> str:
    return f"{row['library']} {row['class']}, {row['network']}, batch {row['batch']}"
