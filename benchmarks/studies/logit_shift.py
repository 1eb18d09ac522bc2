"""The pre-softmax vulnerability: what a number added to all logits does to maps, and to which."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.studies import data, networks
from benchmarks.studies.logit_shift_figures import change_figure, photo_figure, saturation_figure
from benchmarks.studies.logit_shift_maps import (
    BATCH,
    Evidence,
    Sharper,
    change,
    correlation,
    evidence,
    likeness_of_classes,
    peaks_at_corner,
    shown,
)
from benchmarks.studies.networks import Network
from benchmarks.studies.statistics import mean_interval
from benchmarks.studies.study import Cell, Claim, Figure, Findings, Settings, Table
from diffcam_fast.explain import Finer, Logit, LogitDifference, LogProbability, Probability, Target
from diffcam_fast.reference.cam import METHODS
from diffcam_fast.robustness.logit_shift import CornerSum, shift_logits

NAME = "logit_shift"
TITLE = "The pre-softmax vulnerability: one number added to all logits"
QUESTION = (
    "A number t(x) added to all logits of an image changes no probability, but it changes the gradient of every single "
    'logit. Lerma and Lucas ("A Vulnerability of Attribution Methods Using Pre-Softmax Scores", 2023, '
    "arXiv:2307.03305) add t = K sum_c A[c, 0, 0], the sum over the channels at a corner of the explained layer, to a "
    "VGG19: heat maps from its logits are distorted, those from its probabilities are not. What does that do to each "
    "method, at three ImageNet networks, and what do maps of logit differences make of it?"
)

NETWORKS = ("efficientnet_lite0", "efficientnet_b0", "inception_v3")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TARGETS: dict[str, Target] = {
    "logit": Logit(),
    "probability": Probability(),
    "log probability": LogProbability(),
    "difference, logsumexp": LogitDifference("logsumexp"),
    "difference, expected": LogitDifference("expected"),
    "difference, mean": LogitDifference("mean"),
    "difference, max": LogitDifference("max"),
    "difference, finer (alpha 1)": Finer(),
    "finer, alpha 0.5": Finer(alpha=0.5),
}
DIFFERENCES = tuple(name for name in TARGETS if name.startswith("difference"))
MULTIPLES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
QUICK_MULTIPLES = (1.0, 30.0)
STUDIED, PICTURED = 1.0, 30.0
FACTORS = (1, 3, 10, 30, 100)
CLASSES = 5
PROBABILITY_BAR = 1e-6
MAP_BAR = 1e-4


@dataclass(frozen=True)
class Subject:
    """One network with its photos, and what came out for each strength."""

    network: Network
    images: Tensor
    classes: Tensor
    original: dict[str, Evidence]
    altered: dict[str, Evidence]
    strength: float
    sweep: list[dict[str, Cell]]


def study_network(network: Network, settings: Settings, count: int) -> Subject:
    """Explain a network and its altered copies."""
    model, device = network.model.to(settings.device), settings.device
    found = data.photos(settings.cache, network.size)
    labelled = (found.labels >= 0).nonzero().flatten()[:count]
    images = found.floats()[labelled].to(device)
    with torch.inference_mode():
        logits = torch.cat([model(part) for part in images.split(BATCH)])
    classes = logits.topk(CLASSES, 1).indices

    def explain(strength: float | None, dtype: torch.dtype, **options: Any) -> Evidence:
        other = copy.deepcopy(model) if strength is None else shift_logits(model, network.layer, CornerSum(strength))
        return evidence(other.to(dtype), network.layer, images, **options)

    few = {name: TARGETS[name] for name in ("logit", "difference, logsumexp")}
    options = {"classes": classes[:, :1], "targets": few, "methods": ("gradcam", "hirescam")}
    plain = {name: explain(None, dtype, **options) for name, dtype in DTYPES.items()}
    # The shift is as large as the logits are: at the photo where it is largest.
    with torch.inference_mode():
        unit = shift_logits(model, network.layer, CornerSum(1.0))
        added = torch.cat([unit(part) for part in images.split(BATCH)]) - logits
    # Of the sign that makes it positive on average: the other one would push maps away from the corner.
    strength = float(f"{float(logits.abs().max() / added.abs().max() * added.mean().sign()):.2g}")
    sweep = []
    for multiple in settings.track(QUICK_MULTIPLES if settings.quick else MULTIPLES, f"{network.name}: strengths"):
        row: dict[str, Cell] = {
            "network": network.name,
            "K": float(f"{strength * multiple:.2g}"),
            "studied": multiple == STUDIED,
        }
        for name, dtype in DTYPES.items():
            row |= sweep_cells(name, plain[name], explain(strength * multiple, dtype, **options))
        sweep.append(row)
    every = {"classes": classes, "targets": TARGETS}
    jobs = settings.track(list(DTYPES.items()), f"{network.name}: all methods")
    pairs = {name: (explain(None, dtype, **every), explain(strength * STUDIED, dtype, **every)) for name, dtype in jobs}
    original, altered = ({name: pair[side] for name, pair in pairs.items()} for side in (0, 1))
    return Subject(network, images, classes, original, altered, strength, sweep)


def sweep_cells(dtype: str, before: Evidence, after: Evidence) -> dict[str, Cell]:
    """What one strength does to logits and maps."""
    added = after.logits - before.logits
    differ = (after.logits.softmax(1) - before.logits.softmax(1)).abs().max()
    decided = after.logits.argmax(1) != before.logits.argmax(1)
    single, difference = 0, 1
    return {
        f"{dtype}: largest |t|": float(added.abs().max()),
        f"{dtype}: largest change of a probability": float(differ),
        f"{dtype}: decisions changed": int(decided.sum()),
        f"{dtype}: Grad-CAM of the logit, correlation": mean_interval(
            correlation(shown(before.maps["gradcam"][:, single, 0]), shown(after.maps["gradcam"][:, single, 0]))
        ).mean,
        f"{dtype}: HiResCAM of the logit, share with its peak at the corner": float(
            peaks_at_corner(after.maps["hirescam"][:, single, 0]).float().mean()
        ),
        f"{dtype}: Grad-CAM of the difference, largest change": float(
            change(before.maps["gradcam"][:, difference, 0], after.maps["gradcam"][:, difference, 0]).max()
        ),
    }


def run(settings: Settings) -> Findings:
    """See `QUESTION`."""
    names = (settings.network,) if settings.network else NETWORKS
    count = 3 if settings.quick else 19
    subjects, saturation = [], []
    for name in names:
        network = networks.load(name, settings.cache)
        subjects.append(study_network(network, settings, count))
        saturation += saturated(subjects[-1], settings)
    sweep = [row for subject in subjects for row in subject.sweep]
    changes, compact = change_tables(subjects)
    classes = class_rows(subjects)
    details = {
        "networks": {
            subject.network.name: {"layer": subject.network.layer, "K": subject.strength} for subject in subjects
        },
        "photos": len(subjects[0].images),
        "classes an image": CLASSES,
        "multiples of K": QUICK_MULTIPLES if settings.quick else MULTIPLES,
        "factors of saturation": FACTORS,
    }
    return Findings(
        [
            Table(
                "change",
                "How much maps change: method, target and precision",
                compact,
                "Largest change of a value of the raw map, as a share of the map's range, for the predicted class: "
                "mean over photos. 1e-4 is the bar for differences in float32. The last rows of each network alter "
                "nothing but the precision, for comparison: a change in bfloat16 below it is no more than rounding.",
                dict.fromkeys(TARGETS, ".1e"),
            ),
            Table(
                "strengths",
                "Strength of the shift",
                sweep,
                "K is the shift's gradient at the corner, for each channel. The strength studied in the other tables "
                "makes the largest |t| as large as the largest logit of these photos. Logits lose digits to a larger "
                "t, in bfloat16 soon so many that the network is no longer the same.",
                {key: ".1e" for row in sweep for key in row if "change" in key and "decisions" not in key}
                | {key: ".2f" for row in sweep for key in row if "|t|" in key or "correlation" in key or "peak" in key},
            ),
            Table(
                "classes",
                f"Maps of the {CLASSES} likeliest classes",
                classes,
                "float32. Alike: mean Pearson correlation of the finished maps of each pair of an image's classes; 1 "
                "where the map no longer depends on the class. Peak: share of the maps whose largest value is at the "
                "corner.",
                {key: ".2f" for row in classes for key in row if key not in ("method", "target")},
            ),
            Table(
                "all-changes",
                "Map changes with 95 % intervals",
                changes,
                "Each photo's mean over the networks counts as one value. Correlation: Pearson, of the finished maps.",
                {
                    key: ".2e" if "change" in key else ".3f"
                    for row in changes
                    for key in row
                    if ", " in key or "cor" in key
                }
                | {"change (share of range)": ".2e"},
            ),
            Table(
                "saturation",
                "Networks that are too certain: logits times a factor",
                saturation,
                "Grad-CAM of the predicted class, unaltered network. Empty: share of photos whose map is zero "
                "everywhere. Correlation: of the finished map with that of the logsumexp difference in float64, of "
                "which it is a positive multiple; empty maps do not count. 'autograd': the softmax as anyone would "
                "write it, differentiated by PyTorch.",
                {"empty": ".2f", "correlation": ".3f"},
            ),
        ],
        [
            change_figure(compact, METHODS, tuple(TARGETS)),
            saturation_figure(saturation),
            *photo_figures(subjects, 2 if settings.quick else 6),
        ],
        claims(subjects, sweep, classes, saturation),
        details,
    )


def moved(subject: Subject, method: str, target: str, dtype: str = "float32") -> Tensor:
    """How much each image's and class's map changes when the network is altered, (N, classes)."""
    sides = (side[dtype].maps[method][:, list(TARGETS).index(target)] for side in (subject.original, subject.altered))
    return change(*sides)


def change_tables(subjects: Sequence[Subject]) -> tuple[list[dict[str, Cell]], list[dict[str, Cell]]]:
    """Changes of the predicted class's maps: with intervals, and their means, a column for each target."""
    full: list[dict[str, Cell]] = []
    compact: list[dict[str, Cell]] = []
    for method in METHODS:
        for number, target in enumerate(TARGETS):
            for dtype in DTYPES:
                pairs = [
                    [side[dtype].maps[method][:, number, 0] for side in (subject.original, subject.altered)]
                    for subject in subjects
                ]
                each = [moved(subject, method, target, dtype)[:, 0] for subject in subjects]
                alike = torch.stack([correlation(*map(shown, pair)) for pair in pairs]).nanmean(0)
                full.append(
                    {"method": method, "target": target, "precision": dtype}
                    | mean_interval(torch.stack(each).nanmean(0)).cells("change (share of range)")
                    | {"largest change": float(torch.stack(each).nan_to_num(0).max())}
                    | mean_interval(alike).cells("correlation")
                )
    for subject in subjects:
        exact = subject.original["float32"].maps
        for dtype in (*DTYPES, None):
            for method in METHODS:
                before = exact[method] if dtype is None else subject.original[dtype].maps[method]
                after = (subject.original["bfloat16"] if dtype is None else subject.altered[dtype]).maps[method]
                differ = change(before[:, :, 0], after[:, :, 0])
                row: dict[str, Cell] = {"network": subject.network.name, "method": method}
                row["precision"] = dtype or "bfloat16, not altered"
                compact.append(row | {name: mean_interval(differ[:, n]).mean for n, name in enumerate(TARGETS)})
    return full, compact


def class_rows(subjects: Sequence[Subject]) -> list[dict[str, Cell]]:
    """How much the maps of an image's classes differ, and where they peak."""
    rows: list[dict[str, Cell]] = []
    for method in METHODS:
        for number, target in enumerate(TARGETS):
            if target not in ("logit", "probability", "difference, logsumexp"):
                continue
            row: dict[str, Cell] = {"method": method, "target": target}
            for side in ("original", "altered"):
                maps = [getattr(subject, side)["float32"].maps[method][:, number] for subject in subjects]
                row[f"alike, {side}"] = mean_interval(torch.cat([likeness_of_classes(raw) for raw in maps])).mean
                peaks = torch.cat([peaks_at_corner(raw).flatten() for raw in maps])
                row[f"peak at the corner, {side}"] = float(peaks.float().mean())
            rows.append(row)
    return rows


def saturated(subject: Subject, settings: Settings) -> list[dict[str, Cell]]:
    """Maps of the unaltered network with its logits multiplied."""
    inner = {
        "probability, autograd": lambda logits, classes: logits.softmax(1).gather(1, classes),
        "probability": Probability(),
        "log probability, autograd": lambda logits, classes: logits.log_softmax(1).gather(1, classes),
        "log probability": LogProbability(),
        "difference, logsumexp": LogitDifference(),
    }
    targets = {(factor, name): Sharper(target, factor) for factor in FACTORS for name, target in inner.items()}
    exact = {factor: Sharper(LogitDifference(), factor) for factor in FACTORS}
    rows: list[dict[str, Cell]] = []
    for dtype_name, dtype in DTYPES.items():
        model = copy.deepcopy(subject.network.model).to(settings.device, dtype)
        given = (model, subject.network.layer, subject.images, subject.classes[:, :1])
        raw = evidence(*given, targets, ["gradcam"]).maps["gradcam"][:, :, 0]
        reference = evidence(*given, exact, ["gradcam"], scored_in=torch.float64).maps["gradcam"][:, :, 0]
        for number, (factor, name) in enumerate(targets):
            alike = correlation(shown(raw[:, number]), shown(reference[:, FACTORS.index(factor)]))
            rows.append(
                {
                    "network": subject.network.name,
                    "precision": dtype_name,
                    "factor": factor,
                    "target": name,
                    "empty": float((raw[:, number] == 0).all(-1).all(-1).float().mean()),
                    "correlation": mean_interval(alike).mean,
                }
            )
    return rows


def photo_figures(subjects: Sequence[Subject], count: int) -> list[Figure]:
    """A figure for each of the first photos, and one of every method."""
    names = ("logit", "probability", "difference, logsumexp")
    targets = {name: TARGETS[name] for name in names}
    columns = [name.partition(",")[0] for name in names]
    pictured = []
    for subject in subjects:
        model, layer = subject.network.model, subject.network.layer
        shifted = shift_logits(model, layer, CornerSum(PICTURED * subject.strength))
        given = (layer, subject.images[:count], subject.classes[:count, :1], targets)
        pictured.append((evidence(model, *given), evidence(shifted, *given)))

    def line(number: int, method: str, photo: int) -> list[tuple[Tensor, Tensor]]:
        before, after = (side.maps[method][photo, :, 0] for side in pictured[number])
        return list(zip(before, after, strict=True))

    def told(number: int, photo: int) -> str:
        subject = subjects[number]
        added = pictured[number][1].logits[photo] - pictured[number][0].logits[photo]
        label = subject.network.labels[int(subject.classes[photo, 0])]
        return f"{subject.network.name}: {label}, t = {float(added.mean()):.0f}"

    figures = []
    for photo in range(min(count, len(subjects[0].images))):
        rows = [
            (f"{subject.network.name}\n{method}", line(number, method, photo))
            for number, subject in enumerate(subjects)
            for method in ("gradcam", "hirescam")
        ]
        caption = (
            "Maps of the predicted class from its logit, its probability and its logit less the logsumexp of all "
            f"others, each of the network as it is and with t added to all logits, at {PICTURED:g} times the strength "
            f"of the tables. {'; '.join(told(number, photo) for number in range(len(subjects)))}."
        )
        image = subjects[0].images[photo]
        figures.append(photo_figure(f"photo-{photo + 1}", f"Photo {photo + 1}", caption, image, columns, rows))
    rows = [(method, line(0, method, 0)) for method in METHODS]
    caption = f"The first photo once more, with all methods. {told(0, 0)}."
    figures.append(photo_figure("methods", "Every method", caption, subjects[0].images[0], columns, rows))
    return figures


def claims(
    subjects: Sequence[Subject],
    sweep: Sequence[dict[str, Cell]],
    classes: Sequence[dict[str, Cell]],
    saturation: Sequence[dict[str, Cell]],
) -> list[Claim]:
    """What came out, in words."""
    studied = [row for row in sweep if row["studied"]]
    probability = max(float(row["float32: largest change of a probability"] or 0) for row in studied)
    decisions = sum(int(row["float32: decisions changed"] or 0) for row in studied)

    def worst(name: str) -> tuple[float, str]:
        return max((float(moved(s, m, name).nan_to_num(0).max()), m) for s in subjects for m in METHODS)

    worsts = {name: worst(name) for name in DIFFERENCES}
    name = max(worsts, key=lambda key: worsts[key][0])
    single = {m: {s.network.name: float(moved(s, m, "logit")[:, 0].mean()) for s in subjects} for m in METHODS}
    least = min((value, method, network) for method, found in single.items() for network, value in found.items())
    negative = [subject.network.name for subject in subjects if subject.strength < 0]
    by_method = {str(row["method"]): row for row in classes if row["target"] == "logit"}
    peak = {method: float(row["peak at the corner, altered"] or 0) for method, row in by_method.items()}
    alike = {method: float(row["alike, altered"] or 0) for method, row in by_method.items()}
    last = [[row for row in sweep if row["network"] == subject.network.name][-1] for subject in subjects]
    strongest = [float(row["float32: HiResCAM of the logit, share with its peak at the corner"] or 0) for row in last]
    empty = {
        target: max(float(row["empty"] or 0) for row in saturation if row["target"] == target)
        for target in dict.fromkeys(str(row["target"]) for row in saturation)
    }
    bfloat = max(float(row["bfloat16: largest change of a probability"] or 0) for row in studied)
    return [
        Claim(
            f"The altered networks give the same probabilities, within {PROBABILITY_BAR:.0e} in float32.",
            probability <= PROBABILITY_BAR and decisions == 0,
            f"Largest change {probability:.1e}, {decisions} decisions changed, with K = "
            + ", ".join(f"{subject.strength:g} ({subject.network.name})" for subject in subjects)
            + f". In bfloat16, where the sum is rounded to 8 bits, probabilities move by up to {bfloat:.2f}.",
        ),
        Claim(
            f"Maps of logit differences stay within {MAP_BAR:.0e} of their range in float32, for every baseline, "
            "method and class.",
            worsts[name][0] <= MAP_BAR,
            f"Largest change {worsts[name][0]:.1e} ({name}, {worsts[name][1]}).",
        ),
        Claim(
            "Maps of a single logit change, with every method.",
            least[0] > 0.1,
            "Mean change over photos, as a share of the map's range, and over networks: "
            + ", ".join(f"{sum(found.values()) / len(found):.2f} ({method})" for method, found in single.items())
            + f". Least: {least[0]:.2f} ({least[1]}, {least[2]})."
            + (
                f" K is negative for {', '.join(negative)}: gradcam++ and layercam see no negative gradients."
                * bool(negative)
            ),
        ),
        Claim(
            "Lerma and Lucas: heat maps from logits are distorted, those from probabilities are not (Grad-CAM).",
            distorted(subjects),
            "Largest change of a map from probabilities in float32: "
            f"{worst('probability')[0]:.1e} ({worst('probability')[1]}).",
        ),
        Claim(
            "The single-logit map is dragged to the corner for every class.",
            min(peak.values()) > 0.9,
            "At the strength studied the share of single-logit maps with their peak at the corner is "
            + ", ".join(f"{share:.2f} ({method})" for method, share in peak.items())
            + ". Spatially pooled gradients get K / (HW) on every channel's weight: their maps turn into the sum of "
            f"all channels, the same for every class (correlation between classes {alike['gradcam']:.2f} for gradcam), "
            "wherever that sum is large. Element-wise methods get t itself, at the corner alone; at the largest K "
            f"HiResCAM peaks there for {min(strongest):.2f} to {max(strongest):.2f} of the photos.",
        ),
        Claim(
            "Where the softmax saturates its gradient vanishes and the difference's does not.",
            empty["probability, autograd"] > 0 and empty["difference, logsumexp"] == 0,
            "Largest share of empty maps over networks and factors: "
            + ", ".join(f"{share:.2f} ({target})" for target, share in empty.items())
            + ".",
        ),
    ]


def distorted(subjects: Sequence[Subject]) -> bool:
    """Whether Grad-CAM of the logit changes by over a tenth of its range, and of the probability within the bar."""
    single = min(float(moved(subject, "gradcam", "logit")[:, 0].mean()) for subject in subjects)
    after = max(float(moved(subject, "gradcam", "probability").nan_to_num(0).max()) for subject in subjects)
    return single > 0.1 and after <= MAP_BAR
