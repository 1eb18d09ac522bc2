"""MOD of pairs of maps beside torchmetrics and a convolution, and the maps of all layers that region shift looks at."""

from __future__ import annotations

import importlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

import diffcam_fast as dcf
from benchmarks.report import Bar, Column, Report, Row, Table
from benchmarks.speed.measure import QUICK, Candidate, Effort, beside, compare, thread_counts, threads
from benchmarks.studies.region_shift_networks import Bottleneck, resnet_like, vgg_like
from diffcam_fast.benchmark.explanations import (
    TOLERANCE,
    Plain,
    Work,
    bare_input_gradient,
    classes_with_evidence,
    error_of_maps,
    images,
    inference,
)
from diffcam_fast.robustness.region_shift import RegionShift

#: Pairs of 32 x 32 maps a second, on one thread.
WANTED = 10_000

#: Error of a MOD against float64. It is a mean of numbers from 0 to 1.
MOD_TOLERANCE = 1e-5

MOD, BLOCKS, LAYERS = "MOD", "every residual block", "all layers"

#: Images that the study explains at a time.
BATCH = 50

COMPARED = {"torchmetrics": "torchmetrics", "convolution": "convolution"}

INTRODUCTION = """\
*MOD*: `RegionShift` counts pairs of maps in, in batches, and is asked for the mean observed dissimilarity, all in the
time. Beside it the same mean by torchmetrics' structural similarity, and by the five convolutions that one would write.
*vs ...*: our median time by theirs; **below 1 we are faster**. Each was checked against the convolution in float64.
*Every residual block* of the study's network like ResNet-50, and *all layers*, `Explainer(layers="all")`, of its
network like VGG-16, where a convolution, its batch norm and its ReLU count for themselves: both for 32 x 32 pixels with
seeded weights, maps of one class at the layers' own sizes, checked against Grad-CAM written in plain PyTorch. The study
explains {batch} images at a time. *floor*: the bare forward pass and gradient of the images. *maps alone*: a call of
`cam` a layer, of activations and gradients that are there already; *read*: the bytes of these. Candidates alternate in
one process; multiples are medians of the quotients of single rounds."""


@dataclass(frozen=True)
class Case:
    """Pairs of maps of a size, in batches, or images whose layers are explained."""

    work: str
    count: int
    size: int
    batch: int
    threads: int

    def columns(self) -> Row:
        """The case as columns of a row."""
        return {
            "work": self.work,
            "count": self.count,
            "size": self.size,
            "batch": self.batch,
            "threads": self.threads,
        }


def cases(quick: bool) -> list[Case]:
    """What is measured."""
    if quick:
        return [Case(MOD, 60, 32, 50, 1), Case(BLOCKS, 2, 32, 2, 1), Case(LAYERS, 2, 32, 2, 1)]
    most = thread_counts()[-1]
    return [
        *(Case(MOD, 1000, size, batch, 1) for size, batch in ((7, 500), (14, 500), (32, 50), (32, 500))),
        Case(MOD, 200, 64, 100, 1),
        *([Case(MOD, 1000, 32, 500, most)] if most > 1 else []),
        *(Case(work, batch, 32, batch, most) for work in (BLOCKS, LAYERS) for batch in (1, 8, BATCH)),
    ]


class Pairs:
    """Maps (N, H, W) before and after, and their MOD in float64."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(0)
        coarse = torch.rand(2, case.count, 4, 4, generator=generator)
        size = (case.size, case.size)
        self.case = case
        self.before, self.after = functional.interpolate(coarse, size, mode="bicubic", align_corners=False).clamp(0, 1)
        self.expected = _convolved(self.before.double(), self.after.double()).mean().item()

    def error(self, found: Tensor) -> float:
        """How far a MOD is off."""
        return abs(float(found) - self.expected)

    def in_batches(self, dissimilarity: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The mean of what a function returns for the pairs of each batch."""
        batches = zip(self.before.split(self.case.batch), self.after.split(self.case.batch), strict=True)
        return torch.cat([dissimilarity(before, after) for before, after in batches]).mean()


def ours(pairs: Pairs) -> Candidate:
    """Streaming MOD, with the check of its result."""

    def run(copy: int) -> Tensor:
        shift = RegionShift((0.1,))
        batches = zip(pairs.before.split(pairs.case.batch), pairs.after.split(pairs.case.batch), strict=True)
        for before, after in batches:
            shift.update(before, after[None])
        return shift.mod

    return Candidate(run, pairs.error, MOD_TOLERANCE)


def competitors(pairs: Pairs) -> dict[str, Candidate]:
    """What a user could write instead, where it is installed, with the same check."""
    found = {"torchmetrics": _torchmetrics(pairs.case.size), "convolution": _convolved}

    def candidate(dissimilarity: Callable[[Tensor, Tensor], Tensor]) -> Candidate:
        return Candidate(lambda copy: pairs.in_batches(dissimilarity), pairs.error, MOD_TOLERANCE)

    return {name: candidate(dissimilarity) for name, dissimilarity in found.items() if dissimilarity is not None}


def _sigma(size: int) -> float:
    """Of the window: smaller for maps that 11 positions are too many for."""
    return 1.5 * min(1.0, size / 11)


def _convolved(before: Tensor, after: Tensor) -> Tensor:
    """(1 - SSIM) / 2 of maps (N, H, W), with the window as a convolution."""
    sigma = _sigma(before.shape[-1])
    reach = int(3.5 * sigma + 0.5)
    line = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=before.dtype) / sigma) ** 2)
    window = (line[:, None] * line / line.sum() ** 2)[None, None]
    maps = torch.stack((before, after, before * before, after * after, before * after), 1).flatten(0, 1)[:, None]
    padded = functional.pad(maps, (reach,) * 4, mode="reflect")
    means = functional.conv2d(padded, window).view(len(before), 5, *before.shape[1:])
    mine, theirs, mine_squared, theirs_squared, product = means.unbind(1)
    variances = mine_squared - mine**2 + theirs_squared - theirs**2
    similarity = (2 * mine * theirs + 1e-4) * (2 * (product - mine * theirs) + 9e-4)
    similarity = similarity / ((mine**2 + theirs**2 + 1e-4) * (variances + 9e-4))
    return (1 - similarity.mean((1, 2))) / 2


def _torchmetrics(size: int) -> Callable[[Tensor, Tensor], Tensor] | None:
    try:
        # Beside a CPU build of PyTorch, torchvision, which torchmetrics imports, does not load without.
        importlib.import_module("tests.helpers.torchvision_cpu")
        image = importlib.import_module("torchmetrics.functional.image")
    except ImportError:
        return None

    def run(before: Tensor, after: Tensor) -> Tensor:
        similarity: Tensor = image.structural_similarity_index_measure(
            before[:, None], after[:, None], sigma=_sigma(size), data_range=1.0, reduction="none"
        )
        return (1 - similarity) / 2

    return run


def network(work: str) -> nn.Module:
    """The network that is explained, in evaluation mode, with seeded weights and statistics of seeded images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = resnet_like((3, 4, 6, 3))(32, 10) if work == BLOCKS else vgg_like(32, 10)
    # The images are normalised already, and parameters have to come before the first layer for plain PyTorch.
    model = nn.Sequential(OrderedDict(list(model.named_children())[1:]))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(images(50, (32, 32)))
    return model.eval()


def measure_mod(case: Case, effort: Effort) -> Row:
    """One row about pairs of maps. The number of threads is set already."""
    pairs = Pairs(case)
    timings, errors = compare({"ours": ours(pairs), **competitors(pairs)}, what=_label(case.columns()), effort=effort)
    mine = timings["ours"]
    row = {**case.columns(), "rounds": mine.rounds, "error": errors["ours"], **mine.milliseconds()}
    row["per_second"] = case.count / mine.median
    return row | beside(timings, errors, COMPARED)


def measure_layers(case: Case, effort: Effort) -> Row:
    """One row about the maps of many layers. The number of threads is set already."""
    model, batch = network(case.work), images(case.count, (case.size, case.size))
    classes = classes_with_evidence(model, batch, "features")
    blocks = [name for name, module in model.named_modules() if isinstance(module, Bottleneck)]
    explainer = dcf.Explainer(model, blocks if case.work == BLOCKS else "all", target=dcf.Logit(), size=None)
    names = tuple(explainer(batch, classes).layer_maps)
    work = Work(model, batch, classes, names, at_input_size=False)
    expected = Plain(work).run(0)
    mine = Candidate(
        lambda copy: list(explainer(batch, classes).layer_maps.values()),
        lambda found: error_of_maps(found, expected),
        TOLERANCE,
    )
    candidates = {"ours": mine, "inference": inference(work), "floor": bare_input_gradient(work)}
    pairs = gradients_of(work)
    candidates["maps"] = bare_maps(work, pairs)
    timings, errors = compare(candidates, what=_label(case.columns()), effort=effort)
    timing, plain, floor = timings["ours"], timings["inference"], timings["floor"]
    return {
        **case.columns(),
        "layers": len(names),
        "rounds": timing.rounds,
        "error": errors["ours"],
        **timing.milliseconds(),
        "per_second": case.count / timing.median,
        "inference_ms": 1e3 * plain.median,
        "floor_ms": 1e3 * floor.median,
        **timing.multiple("multiple", plain),
        **timing.multiple("vs_floor", floor),
        "maps_ms": 1e3 * timings["maps"].median,
        "read_mb": 1e-6 * sum(tensor.nbytes for pair in pairs for tensor in pair),
        **timings["maps"].multiple("maps_vs_floor", floor),
    }


def gradients_of(work: Work) -> list[tuple[Tensor, Tensor]]:
    """Activations and gradients of each layer."""
    outputs: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda *given: outputs.append(given[2])) for module in work.modules(work.model)
    ]
    try:
        logits = work.model(work.images)
    finally:
        for handle in handles:
            handle.remove()
    gradients = torch.autograd.grad(logits.gather(1, work.classes).sum(), outputs)
    return [(output.detach(), gradient) for output, gradient in zip(outputs, gradients, strict=True)]


def bare_maps(work: Work, pairs: Sequence[tuple[Tensor, Tensor]]) -> Candidate:
    """One call of `diffcam_fast.cam` for each layer, of activations and gradients that are there already."""
    expected = Plain(work).run(0)
    return Candidate(
        lambda copy: [dcf.cam(activations, gradient).unsqueeze(1) for activations, gradient in pairs],
        lambda found: error_of_maps(found, expected),
        TOLERANCE,
    )


def _why(missed: list[Row]) -> str:
    shares = [row["maps_vs_floor"] for row in missed]
    return (
        f"the maps alone, of activations and gradients that are there already, take {min(shares):.0%} to "
        f"{max(shares):.0%} of the floor beside a network as small as this one; calling Python once a layer takes its "
        "part where there are few images, and reading all that every layer puts out and all its gradients where there "
        "are many"
    )


def run(quick: bool = False) -> Report:
    """Measure everything, or for `quick` little in a few rounds.

    Raises:
        WrongResult: somebody's MOD or maps are wrong.
    """
    measures: dict[str, Callable[[Case, Effort], Row]] = {
        MOD: measure_mod,
        BLOCKS: measure_layers,
        LAYERS: measure_layers,
    }
    effort = QUICK if quick else Effort(seconds=2.0)
    found = []
    for case in tqdm(cases(quick), desc="region_shift", disable=None):
        with threads(case.threads):
            found.append(measures[case.work](case, effort))
    return report(found)


def report(found: list[Row]) -> Report:
    """The rows as a report, with the tables and the bars."""
    times = [Column("ms", "ms", ".3g"), Column("p20", "ms_p20", ".3g"), Column("p80", "ms_p80", ".3g")]
    pairs = [Column("maps", "size"), Column("batch", "batch"), Column("threads", "threads"), Column("pairs", "count")]
    pairs += [*times, Column("pairs a second", "per_second", ".0f")]
    for name, title in COMPARED.items():
        pairs += [Column(f"{title} ms", f"{name}_ms", ".3g"), Column(f"vs {title}", f"vs_{name}", ".3f")]
    layers = [Column("images", "count"), Column("threads", "threads"), Column("layers", "layers"), *times]
    layers += [
        Column("images a second", "per_second", ".0f"),
        Column("inference ms", "inference_ms", ".3g"),
        Column("times inference", "multiple", ".2f"),
        Column("floor ms", "floor_ms", ".3g"),
        Column("times the floor", "vs_floor", ".2f"),
        Column("maps alone ms", "maps_ms", ".3g"),
        Column("read MB", "read_mb", ".1f"),
    ]
    floor = "times the bare forward pass and gradient"
    return Report(
        name="region_shift",
        title="Region shift",
        introduction=INTRODUCTION.format(batch=BATCH),
        rows=found,
        tables=[
            Table("MOD of pairs of maps", [row for row in found if row["work"] == MOD], pairs),
            Table("Maps of every residual block", [row for row in found if row["work"] == BLOCKS], layers),
            Table("Maps of all layers", [row for row in found if row["work"] == LAYERS], layers),
        ],
        bars=[
            Bar(
                f"at least {WANTED} pairs of 32 x 32 maps a second on one thread",
                "per_second",
                WANTED,
                at_least=True,
                applies=lambda row: (row["work"], row["size"], row["threads"]) == (MOD, 32, 1),
                show=".0f",
            ),
            Bar("no slower than torchmetrics", "vs_torchmetrics", 1.0),
            Bar("no slower than a convolution", "vs_convolution", 1.0),
            Bar(
                f"maps of every residual block, {BATCH} images: at most 1.02 {floor}",
                "vs_floor",
                1.02,
                applies=lambda row: (row["work"], row["count"]) == (BLOCKS, BATCH),
            ),
            Bar(
                f"maps of every residual block, fewer images, and of all layers: at most 1.02 {floor}",
                "vs_floor",
                1.02,
                applies=lambda row: (row["work"], row["count"]) != (BLOCKS, BATCH),
            ).because(found, _why),
        ],
        label=_label,
    )


def _label(row: dict[str, Any]) -> str:
    if row["work"] in (BLOCKS, LAYERS):
        return f"{row['work']}, {row['count']} images"
    return f"MOD, {row['size']} x {row['size']} maps in batches of {row['batch']}, {row['threads']} threads"
