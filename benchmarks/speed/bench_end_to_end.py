"""Explained inference beside plain inference, and beside what other libraries make of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch._inductor.config
from torch import nn
from tqdm import tqdm

from benchmarks import figures
from benchmarks.report import Bar, Column, Report, Row, Table
from benchmarks.speed.bench_memory import small_network
from benchmarks.speed.measure import QUICK, Candidate, Effort, compare, in_words, thread_counts, threads
from benchmarks.speed.networks import OTHERS, POOLED, SIZE, Network
from diffcam_fast.benchmark import peers
from diffcam_fast.benchmark.end_to_end import Floor, absence_line, absent_peers, columns, row
from diffcam_fast.benchmark.explanations import (
    Work,
    bare_input_gradient,
    bare_product,
    bare_pull_back,
    classes_with_evidence,
    images,
    inference,
    ours,
)

ONE, FIVE, ALL, BLOCKS = "one class, last layer", "top 5 classes", "all 1000 classes", "every residual block"
RESIDUAL_BLOCKS = tuple(
    f"layer{stage}.{block}" for stage, count in enumerate((3, 4, 6, 3), start=1) for block in range(count)
)
COMPILED = "compiled, one class, last layer"
#: No network of torchvision's: what its work costs is next to nothing.
OVERHEAD, SMALL = "overhead of a call", Network("small network", "5")
EFFORT = Effort(seconds=6.0)
#: What an explanation adds to the prediction of a single image is a few percent of it or less, as is what the machine
#: adds at times.
SINGLE_EFFORT = replace(EFFORT, minimum_rounds=45)
#: Of the images of a smoke run.
QUICK_SIZE = 96

CAPTION = "Explained inference as a multiple of plain inference, one class, last layer; the line is the floor."

INTRODUCTION = """\
Prediction and maps, as a multiple of plain inference: the model's forward pass alone, under `inference_mode`. Grad-CAM
of logits on torchvision's networks with seeded random weights, on images of 3 x 224 x 224 with structure at every
scale, float32, {threads}. One class and top 5: maps at the size of the images, from 0 to 1. All classes and
every block: at the layers' own sizes. All candidates alternate in one process and in shuffled order, at least {rounds}
rounds; multiples are medians of the quotients of single rounds, with their p20 and p80. Memory that was freed stays
with the process: who has to ask the system for new memory would otherwise depend on what others keep until their next
call. Everybody's maps were checked against ours, and ours against Grad-CAM in plain PyTorch, before anything was timed.

*floor*: plain inference plus the bare pull-back from the logits to the layer, of a graph that is there already; for all
classes plus the bare product of the head's weight and the activations; for every block the bare forward pass and
gradient of the images, parameters frozen. *vs floor*: our time by that. All images are contiguous, as data loaders
make them, and plain inference and the floor work on them as they are. By itself the explainer hands them on
channels-last to networks with depthwise separable convolutions ([memory_format.md](memory_format.md)), and pools
channels-last copies in any network ([same_bits.md](same_bits.md)): both may take less than inference on what it was
given. What is left of the former when inference is given channels-last images to begin with: *channels-last*, plain
inference on those, and *vs faster*, our time by that of plain inference in the faster order; the bars are about
inference on the images as they are. *compiled*: `Explainer.compile` beside the
model's forward pass under `torch.compile`, in the same turns; compiling is not in the time. *plain PyTorch*: hooks, one
differentiation a class, weighted sum. torchcam and captum do not resize to the images; two lines of PyTorch do that for
them. Where all classes or every block would take another library minutes it gets a part of the work, and its figure is
**for that part
alone**: {parts}.{absent}"""


@dataclass(frozen=True)
class Case:
    """One row of the results."""

    work: str
    network: Network
    batch: int
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)
    """By peer: to how many classes and layers it is confined. More would take minutes, and say no more."""

    @property
    def what(self) -> str:
        """Names it where a result is wrong."""
        return _label({"work": self.work, "network": self.network.name, "batch": self.batch})


RESNET50 = POOLED[0]
#: A large and a small one: each takes minutes to compile.
COMPILED_NETWORKS = POOLED[:2]
MANY = (
    Case(FIVE, RESNET50, 8),
    Case(ALL, RESNET50, 8, {"plain": (50, 1), "torchcam": (50, 1), "captum": (2, 1), "pytorch_grad_cam": (2, 1)}),
    Case(BLOCKS, RESNET50, 8, {"captum": (1, 4)}),
)


def cases(quick: bool) -> list[Case]:
    """What is measured; cases of the same network follow each other."""
    if quick:
        return [Case(ONE, POOLED[1], 1)]
    one = [
        Case(work, network, batch)
        for network in (*POOLED, *OTHERS)
        for work in ((ONE, COMPILED) if network in COMPILED_NETWORKS else (ONE,))
        for batch in (1, 8)
    ]
    return [*MANY, *one]


def work_of(case: Case, model: nn.Module, size: int) -> Work:
    """The case on a model of its network, with images of a size."""
    network = case.network
    batch = images(case.batch, (size, size))
    if case.work == ALL:
        classes = torch.arange(1000).expand(case.batch, 1000)
    else:
        count = 5 if case.work == FIVE else 1
        classes = classes_with_evidence(model, batch, network.layer, network.reshape, count)
    layers = RESIDUAL_BLOCKS if case.work == BLOCKS else (network.layer,)
    return Work(model, batch, classes, layers, network.reshape, at_input_size=case.work in (ONE, FIVE, COMPILED))


def floor_of(case: Case, work: Work) -> Floor:
    """The least that the case could cost."""
    if case.work == BLOCKS:
        return Floor(bare_input_gradient(work), contains_inference=True)
    if case.work == ALL:
        head = [module for module in work.model.modules() if isinstance(module, nn.Linear)][-1]
        return Floor(bare_product(work, head))
    return Floor(bare_pull_back(work))


def others_of(case: Case, work: Work) -> dict[str, Candidate]:
    """Everybody else who is here and makes such maps, on all of the work or on a part of it."""
    found = {}
    for name, peer in peers.PEERS.items():
        classes, layers = case.parts.get(name, (None, None))
        part = replace(work, classes=work.classes[:, :classes], layers=work.layers[-(layers or 0) :])
        if peers.absent_because(name) is None and peer.can(part):
            found[name] = peers.candidate(name, part)
    return found


def measure(case: Case, model: nn.Module, effort: Effort, size: int = SIZE) -> Row:
    """One row. The number of threads is set already."""
    work = work_of(case, model, size)
    found = {
        "work": case.work,
        "network": case.network.name,
        "batch": case.batch,
        "classes": work.classes.shape[1],
        "layers": len(work.layers),
    }
    others = others_of(case, work)
    found |= row(work, floor_of(case, work), others, what=case.what, effort=effort)
    for name, (classes, layers) in case.parts.items():
        if name in others:
            found |= {f"{name}_classes": classes, f"{name}_layers": layers}
    return found


def measure_compiled(case: Case, model: nn.Module, effort: Effort, size: int = SIZE) -> Row:
    """One row of compiled explanations beside compiled and eager inference. The number of threads is set already.

    Raises:
        WrongResult: maps or logits are wrong; nothing is timed then.
    """
    work = work_of(case, model, size)
    # What was compiled for other shapes counts against a limit.
    torch._dynamo.reset()
    candidates = {
        "eager": inference(work),
        "eager_ours": ours(work),
        "inference": inference(work, compiled=True),
        "ours": ours(work, compiled=True),
    }
    # In this process: no pool of compilers is left behind on the processors.
    with torch._inductor.config.patch(compile_threads=1):
        for candidate in candidates.values():
            candidate.run(0)
    timings, errors = compare(candidates, what=case.what, effort=effort)
    mine = timings["ours"]
    return {
        "work": case.work,
        "network": case.network.name,
        "batch": case.batch,
        "threads": torch.get_num_threads(),
        "rounds": mine.rounds,
        **mine.multiple("multiple", timings["inference"]),
        **mine.multiple("vs_eager", timings["eager"]),
        **timings["inference"].multiple("inference_vs_eager", timings["eager"]),
        **timings["eager_ours"].multiple("eager_multiple", timings["eager"]),
        **timings["inference"].milliseconds("inference_"),
        **timings["eager"].milliseconds("eager_"),
        **mine.milliseconds("ours_"),
        "error": errors["ours"],
    }


def rows(chosen: list[Case], effort: Callable[[Case], Effort], size: int) -> Iterator[Row]:
    """Measure the cases; a network is built once for those that share it."""
    built: Network | None = None
    for case in tqdm(chosen, desc="end_to_end", disable=None):
        if built != case.network:
            built, model = case.network, case.network.build()
        yield (measure_compiled if case.work == COMPILED else measure)(case, model, effort(case), size)


def overhead(effort: Effort) -> Row:
    """What a call costs where the network costs nothing: one small image on a small network, on one thread."""
    model = small_network()
    batch = images(1, (32, 32))
    work = Work(model, batch, classes_with_evidence(model, batch, "5"), ("5",))
    case = Case(OVERHEAD, SMALL, 1)
    with threads(1):
        found = row(work, Floor(bare_pull_back(work)), others_of(case, work), what=case.what, effort=effort)
    names = [name for name in ("ours", *peers.PEERS) if f"{name}_ms" in found]
    least = found["inference_ms"] + found["bare_ms"]
    return {
        "work": OVERHEAD,
        "network": SMALL.name,
        "batch": 1,
        **found,
        "inference_us": 1e3 * found["inference_ms"],
        **{f"{name}_overhead_us": 1e3 * (found[f"{name}_ms"] - least) for name in names},
    }


def run(quick: bool = False) -> Report:
    """Measure everything, or for `quick` one network in a few rounds, on one thread.

    Raises:
        WrongResult: somebody's maps are wrong.
        ImportError: torchvision is missing.
    """

    def effort(case: Case) -> Effort:
        return QUICK if quick else SINGLE_EFFORT if case.batch == 1 else EFFORT

    with threads(1 if quick else thread_counts()[-1]):
        found = list(rows(cases(quick), effort, QUICK_SIZE if quick else SIZE))
    return report([*found, overhead(QUICK if quick else replace(EFFORT, seconds=2.0))], absent_peers())


def report(found: list[Row], absent: dict[str, str]) -> Report:
    """The rows as a report, with tables, bars and the figure."""
    present = [name for name in peers.PEERS if any(name in row for row in found)]
    parts = [
        f"{peers.PEERS[name].title} {_part(row, name)} ({row['work']})"
        for row in found
        for name in present
        if f"{name}_classes" in row
    ]
    return Report(
        name="end_to_end",
        title="Explained inference",
        introduction=INTRODUCTION.format(
            threads=in_words(found[0]["threads"]),
            rounds=min(row["rounds"] for row in found),
            parts="; ".join(parts) or "none here",
            absent=absence_line(absent),
        ),
        rows=found,
        tables=_tables(found, present),
        bars=bars(present, found),
        label=_label,
        details={"absent_peers": absent},
        figures={"end_to_end.png": (CAPTION, figure(found, present))},
    )


def _part(row: Row, name: str) -> str:
    """How much of the row's work a peer did, in words."""
    return ", ".join(
        f"{row[f'{name}_{what}']} of {row[what]} {words}"
        for what, words in (("classes", "classes"), ("layers", "blocks"))
        if row[f"{name}_{what}"] < row[what]
    )


def bars(present: list[str], found: list[Row]) -> list[Bar]:
    """The limits, for the rows that each of them is about, and what the rows say about those that miss them."""
    why = partial(_why, found)
    pooled, others = ({network.name for network in group} for group in (POOLED, OTHERS))

    def one(row: Row, networks: set[str], batches: tuple[int, ...]) -> bool:
        return row["work"] == ONE and row["network"] in networks and row["batch"] in batches

    def of(work: str, row: Row) -> bool:
        return bool(row["work"] == work)

    pull_back = "inference and the bare pull-back of the tail"
    return [
        Bar(
            "one class, pooled heads, batch 1: at most 1.03 times inference",
            "multiple",
            1.03,
            applies=partial(one, networks=pooled, batches=(1,)),
        ).because(found, why),
        Bar(
            "one class, pooled heads, batch 8: at most 1.01 times inference",
            "multiple",
            1.01,
            applies=partial(one, networks=pooled, batches=(8,)),
        ).because(found, why),
        Bar(
            f"one class, other tails: at most 1.02 times {pull_back}",
            "vs_floor",
            1.02,
            applies=partial(one, networks=others, batches=(1, 8)),
        ).because(found, why),
        Bar("top 5 classes: at most 1.05 times inference", "multiple", 1.05, applies=partial(of, FIVE)),
        Bar("all 1000 classes: at most 1.08 times inference", "multiple", 1.08, applies=partial(of, ALL)),
        Bar(
            "every residual block: at most 1.02 times the bare forward pass and input gradient",
            "vs_floor",
            1.02,
            applies=partial(of, BLOCKS),
        ),
        Bar(
            "compiled, where compiling pays: an explained prediction at most as much as an unexplained eager one",
            "vs_eager",
            1.0,
            applies=lambda row: row["work"] == COMPILED and row["inference_vs_eager"] < 1,
        ).because(found, _why_compiled),
        *(
            Bar(
                f"less than {peers.PEERS[name].title}",
                f"vs_{name}",
                1.0,
                applies=lambda row: row["work"] != OVERHEAD,
            ).because(found, partial(_why_not_less, name))
            for name in present
        ),
    ]


def _why(found: list[Row], missed: list[Row]) -> str:
    costs = [row["beyond_floor_us"] for row in missed if "beyond_floor_us" in row]
    small = [row["ours_overhead_us"] for row in found if "ours_overhead_us" in row]
    if not costs or not small:
        return ""
    floors = [row["floor"] for row in missed]
    return (
        f"the floor is {min(floors):.3f} to {max(floors):.3f} times inference in these rows; beside it a call takes "
        f"{min(costs):.0f} to {max(costs):.0f} microseconds ({small[0]:.0f} on the small network of the last table)"
    )


def _why_compiled(missed: list[Row]) -> str:
    if any(1 - row["inference_vs_eager"] >= row["multiple"] - 1 for row in missed):
        return ""
    saved = [1 - row["inference_vs_eager"] for row in missed]
    added = [row["multiple"] - 1 for row in missed]
    return (
        f"compiling saves {min(saved):.1%} to {max(saved):.1%} of inference in these rows, less than an explanation "
        f"adds, {min(added):.1%} to {max(added):.1%}"
    )


def _why_not_less(name: str, missed: list[Row]) -> str:
    even = [row for row in missed if row.get(f"vs_{name}_low", 1.0) < 1]
    if not even:
        return ""
    each = "; ".join(f"{row[f'vs_{name}_low']:.3f} to {row[f'vs_{name}_high']:.3f}" for row in even)
    which = "this row" if len(even) == len(missed) == 1 else f"{len(even)} of {len(missed)}"
    return f"the two cannot be told apart in {which}: the 95 % interval of the quotient is {each}"


def _tables(found: list[Row], present: list[str]) -> list[Table]:
    one = [row for row in found if row["work"] == ONE]
    many = [row for row in found if row["work"] not in (ONE, COMPILED, OVERHEAD)]
    compiled = [row for row in found if row["work"] == COMPILED]
    small = [row for row in found if row["work"] == OVERHEAD]
    place = [Column("network", "network"), Column("batch", "batch")]
    tables = [
        Table("One class, last layer", one, [*place, *columns(present)]),
        Table("Many classes, many layers", many, [Column("work", "work"), *place, *columns(present)]),
        Table(
            "Compiled, one class, last layer",
            compiled,
            [
                *place,
                Column("explained, of compiled inference", "multiple", ".3f"),
                Column("p20", "multiple_p20", ".3f"),
                Column("p80", "multiple_p80", ".3f"),
                Column("explained, of eager inference", "vs_eager", ".3f"),
                Column("compiled inference, of eager", "inference_vs_eager", ".3f"),
                Column("eager explained, of eager", "eager_multiple", ".3f"),
                Column("compiled inference ms", "inference_ms", ".3g"),
                Column("rounds", "rounds", "d"),
            ],
        ),
        Table(
            "Microseconds that a call costs beside inference and the bare pull-back, one small image, 1 thread",
            small,
            [
                Column("ours", "ours_overhead_us", ".0f"),
                *(Column(peers.PEERS[name].title, f"{name}_overhead_us", ".0f") for name in present),
                Column("inference", "inference_us", ".0f"),
            ],
        ),
    ]
    return [table for table in tables if table.rows]


def figure(found: list[Row], present: list[str]) -> bytes:
    """Multiples of plain inference by network, ours and the peers', for each batch size."""
    shown = [row for row in found if row["work"] == ONE]
    batches = sorted({row["batch"] for row in shown})
    picture, panels = figures.empty(rows=len(batches), height=1.0 + 2.3 * len(batches))
    names = {"multiple": "diffcam_fast", **{name: peers.PEERS[name].title for name in present}}
    width = 0.84 / len(names)
    for axes, batch in zip(panels, batches, strict=True):
        of_batch = [row for row in shown if row["batch"] == batch]
        for index, (key, title) in enumerate(names.items()):
            places = [place + (index - (len(names) - 1) / 2) * width for place in range(len(of_batch))]
            heights = [row.get(key, math.nan) for row in of_batch]
            bars = axes.bar(places, heights, width, color=figures.COLORS[index], label=title)
            labels = ["" if math.isnan(height) else f"{height:.2f}" for height in heights]
            axes.bar_label(bars, labels, fontsize=6.5, rotation=90, padding=2)
        floors = [row["floor"] for row in of_batch]
        axes.hlines(floors, [x - 0.45 for x in range(len(floors))], [x + 0.45 for x in range(len(floors))], "k", lw=0.8)
        axes.set_xticks(range(len(of_batch)), [row["network"] for row in of_batch], fontsize=8)
        # Logarithmic: what is told apart is a few per cent around 1, and a factor of 4.
        axes.set(ylabel=f"batch {batch}: times inference", yscale="log", ylim=(0.6, 7))
        axes.axhline(1, color="k", linewidth=0.4, zorder=0)
        axes.set_yticks([0.7, 1, 1.5, 2, 3, 4, 5], ["0.7", "1", "1.5", "2", "3", "4", "5"])
        axes.minorticks_off()
    panels[0].legend(ncols=len(names), fontsize=7, loc="upper center", bbox_to_anchor=(0.5, 1.18), frameon=False)
    return figures.png(picture)


def _label(row: Row) -> str:
    return f"{row['work']}, {row['network']}, batch {row['batch']}"
