"""Region shift: how far FGSM moves the regions that networks of different depth and width look at."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.studies import region_shift_figures as figures
from benchmarks.studies import region_shift_sets as sets
from benchmarks.studies.region_shift_measure import (
    DIFFERENCE,
    EXPLANATIONS,
    MAIN,
    RANDOM,
    SEEN,
    STRENGTHS,
    TRANSFERRED,
    TRUE,
    WHITE_BOX,
    Watch,
    attacked,
    directions,
    layer_maps,
    watch,
)
from benchmarks.studies.region_shift_networks import Subject
from benchmarks.studies.region_shift_sets import RESNET, Watched
from benchmarks.studies.statistics import mean_interval
from benchmarks.studies.study import Cell, Claim, Figure, Findings, Settings, Table
from diffcam_fast.robustness.region_shift import RegionShift

NAME = "region_shift"
TITLE = "Region shift under attack: NISSIM, MOD and VID"
QUESTION = (
    "How far does an attack move the region that a network's maps show, and does it depend on the network? "
    "Chakraborty, Trehan, Mallat and Dugelay, Generalizing Adversarial Explanations with Grad-CAM, 2022, compare maps "
    "before and after FGSM on deep and wide networks by the mean over images of (1 - SSIM) / 2 (MOD) and its standard "
    "deviation over strengths (VID). Here smaller networks, other images, and besides the attack random signs of the "
    "same size as a control."
)

_LAYER_IMAGES = 8


def run(settings: Settings) -> Findings:
    """Watch each network on each set of images."""
    watches: list[Watch] = []
    drawn: list[Figure] = []
    layers: dict[str, Tensor] = {}
    timings: list[dict[str, Any]] = []
    watched_sets = _sets(settings)
    for watched in watched_sets:
        watches += _watch_all(watched, settings)
        subject = _for_layers(watched)
        picture, by_layer, timing = _layers(watched, subject, settings)
        drawn.append(picture)
        layers[f"{watched.name}, {subject.name}"] = by_layer
        timings.append(timing)
    spread = [figures.distributions(watches, watched.name, _stem(watched)) for watched in watched_sets]
    return Findings(
        tables=[_outcome_table(watches), _shift_table(watches)],
        figures=[figures.curves(watches), *spread, *drawn, figures.depth(layers)],
        claims=_claims(watches),
        details={
            "strengths": list(STRENGTHS),
            "images": {watched.name: len(watched.images) for watched in watched_sets},
            "size of images": {watched.name: list(watched.images.shape[2:]) for watched in watched_sets},
            "explanations": list(EXPLANATIONS),
            "all layers at once": timings,
        },
    )


def _sets(settings: Settings) -> list[Watched]:
    if settings.network is not None:
        return [sets.photos(settings.network, settings)]
    found = [sets.faces(settings), sets.cifar10(settings)]
    return found if settings.quick else [*found, sets.photos("efficientnet_lite0", settings)]


def _watch_all(watched: Watched, settings: Settings) -> list[Watch]:
    """Every network under its own attack, under the ResNet's and under random signs."""
    found = []
    own = {subject.name: directions(subject, watched, settings) for subject in watched.subjects}
    noise = torch.randint(0, 2, watched.images.shape, generator=settings.generator()) * 2.0 - 1
    for subject in watched.subjects:
        by_attack = {WHITE_BOX: own[subject.name]}
        if RESNET in own and subject.name != RESNET:
            by_attack[TRANSFERRED] = own[RESNET]
        by_attack[RANDOM] = noise
        found += watch(watched, subject, by_attack, settings)
    return found


def _for_layers(watched: Watched) -> Subject:
    """The network whose layers are shown: the ResNet, or the last."""
    return next((subject for subject in watched.subjects if subject.name == RESNET), watched.subjects[-1])


def _layers(watched: Watched, subject: Subject, settings: Settings) -> tuple[Figure, Tensor, dict[str, Any]]:
    """The strip of one image's maps, MOD (E, layers) over some images, and what all layers cost."""
    few = Watched(watched.name, watched.images[:_LAYER_IMAGES], watched.labels[:_LAYER_IMAGES], [subject])
    images = attacked(few.images, directions(subject, few, settings))
    original = layer_maps(subject, few.images, few.labels, settings)
    start = time.perf_counter()
    maps = [layer_maps(subject, each, few.labels, settings) for each in images]
    seconds = time.perf_counter() - start
    means = []
    for name, before in original.items():
        shift = RegionShift(STRENGTHS)
        shift.update(before, torch.stack([each[name] for each in maps]))
        means.append(shift.mod)
    first = [{name: values[0] for name, values in each.items()} for each in maps]
    title = f"{watched.name}, {subject.name}"
    timing = {
        "network": title,
        "layers": len(original),
        "images": len(images) * len(few.images),
        "ms per image": round(1000 * seconds / (len(images) * len(few.images)), 2),
    }
    return figures.strip(images[:, 0], first, title, _stem(watched)), torch.stack(means, 1), timing


def _stem(watched: Watched) -> str:
    return "".join(letter for letter in watched.name.lower() if letter.isalnum())


def _first_cells(each: Watch) -> dict[str, Cell]:
    return {"images": each.set_name, "network": each.subject.name, "kind": each.subject.kind, "attack": each.attack}


def _outcome_table(watches: list[Watch]) -> Table:
    rows: list[dict[str, Cell]] = []
    for each in watches:
        row = _first_cells(each) | {"weights": each.subject.weights, "n": each.correct.shape[1]}
        for strength, correct in zip(STRENGTHS, each.correct, strict=True):
            row[f"accuracy at {strength:g}, %"] = 100 * float(correct.float().mean())
        for strength, decibels in zip(STRENGTHS[1:], each.decibels[1:], strict=True):
            row[f"PSNR at {strength:g}, dB"] = float(decibels.mean())
        rows.append(row)
    note = (
        "None of the networks was fitted to the images counted here. PSNR at strength 0 is infinite. "
        f'"{TRANSFERRED}": the steps were made for that network. "{RANDOM}": each value up or down by chance.'
    )
    formats = {column: ".1f" for column in rows[0] if column.endswith((", %", ", dB"))}
    return Table("outcome", "Accuracy and PSNR", rows, note, formats)


def _shift_table(watches: list[Watch]) -> Table:
    rows: list[dict[str, Cell]] = []
    for each in watches:
        for (explanation, kind), shift in each.shift.items():
            row = _first_cells(each) | {"explanation": explanation, "class": kind}
            values = each.dissimilarity[explanation, kind].double()
            for strength, mean, strengths_values in zip(shift.strengths, shift.mod, values[1:], strict=True):
                interval = mean_interval(strengths_values)
                row[f"MOD at {strength:g}"] = float(mean)
                row[f"± at {strength:g}"] = (interval.high - interval.low) / 2
            row["VID of the set"] = shift.vid
            row["VID of an image, mean"] = shift.mean_image_vid
            row["blank at 0.1, %"] = 100 * float(each.blank[explanation, kind][-1].float().mean())
            rows.append(row)
    note = (
        "MOD: mean over images of (1 - SSIM) / 2 of the maps at the images' size, before and after; ±: half of "
        f"its 95 % interval. VID over the strengths {', '.join(f'{strength:g}' for strength in STRENGTHS[1:])}. Class "
        f'"{TRUE}": the map of the same, true class before and after; "{SEEN}": that of whatever class was predicted. '
        "Blank: maps that are zero everywhere after the attack."
    )
    formats = {column: ".3f" for column in rows[0] if column.startswith(("MOD", "±", "VID"))}
    return Table("shift", "Region shift", rows, note, formats | {"blank at 0.1, %": ".0f"})


def _claims(watches: list[Watch]) -> list[Claim]:
    key = (MAIN, TRUE)
    white = [each for each in watches if each.attack == WHITE_BOX]
    found = [
        _nothing_at_0(watches),
        _further(
            "The paper: attacked, all models' highlighted regions shift consistently. Here: at every strength each "
            "network's maps move further than under random signs of the same size.",
            [
                (_name(each), each.dissimilarity[key], other.dissimilarity[key])
                for each, other in _with(watches, RANDOM)
            ],
        ),
        _growing(white),
        _further(
            "At every strength each network's maps of the single logit move further than those of logit differences.",
            [(_name(each), each.dissimilarity[key], each.dissimilarity[DIFFERENCE, TRUE]) for each in white],
        ),
    ]
    if transferred := _with(watches, TRANSFERRED):
        found.append(
            _further(
                f"At every strength each network's own attack moves its maps further than the one made for {RESNET}.",
                [(_name(each), each.dissimilarity[key], other.dissimilarity[key]) for each, other in transferred],
            )
        )
    return found


def _nothing_at_0(watches: list[Watch]) -> Claim:
    largest = max(float(values[0].max()) for each in watches for values in each.dissimilarity.values())
    count = sum(values.shape[1] for each in watches for values in each.dissimilarity.values())
    found = f"the largest NISSIM of {count} pairs of maps, each explained anew, is {largest:g}"
    return Claim("At strength 0 everything is exactly 0.", largest == 0, found)


def _growing(white: list[Watch]) -> Claim:
    means = {_name(each): each.shift[MAIN, TRUE].mod for each in white}
    others = [name for name, values in means.items() if not bool((values.diff() > 0).all())]
    least, most = min(means, key=lambda name: means[name][-1]), max(means, key=lambda name: means[name][-1])
    blank = torch.cat([each.blank[MAIN, TRUE][-1] for each in white]).float().mean()
    seen = [float(each.shift[MAIN, SEEN].mod[-1]) for each in white]
    found = (
        f"MOD of the true class's maps grows with every strength in {len(means) - len(others)} of {len(means)} networks"
        f"{', not in ' + ', '.join(others) if others else ''}; at {STRENGTHS[-1]:g} it is from "
        f"{float(means[least][-1]):.3f} ({least}) to {float(means[most][-1]):.3f} ({most}). There "
        f"{100 * float(blank):.0f} % of these maps are blank. Maps of the predicted classes, before and after: "
        f"{min(seen):.3f} to {max(seen):.3f}"
    )
    return Claim("MOD grows with every strength in every network.", not others, found)


def _further(says: str, pairs: list[tuple[str, Tensor, Tensor]]) -> Claim:
    """Whether the first of two NISSIM (E, N) is larger, image by image, at all strengths but 0 and in every network."""
    differences = {
        name: [mean_interval(values.double()) for values in (first - second)[1:]] for name, first, second in pairs
    }
    counts = [sum(row[place].low > 0 for row in differences.values()) for place in range(len(STRENGTHS) - 1)]
    so = ", ".join(f"{count} at {strength:g}" for count, strength in zip(counts, STRENGTHS[1:], strict=True))
    listed = "; ".join(
        f"{name} {row[-1].mean:+.3f} [{row[-1].low:+.3f}, {row[-1].high:+.3f}]" for name, row in differences.items()
    )
    found = (
        f"so, by 95 % intervals of the difference of MOD, in this many of {len(pairs)} networks: {so}. "
        f"The difference at {STRENGTHS[-1]:g}: {listed}"
    )
    return Claim(says, all(count == len(pairs) for count in counts), found)


def _with(watches: list[Watch], attack: str) -> list[tuple[Watch, Watch]]:
    """Each network's own attack with another attack on it, where there is one."""
    return [
        (each, other)
        for each in watches
        for other in watches
        if each.attack == WHITE_BOX and other.attack == attack and _name(other) == _name(each)
    ]


def _name(each: Watch) -> str:
    return f"{each.subject.name} on {each.set_name}"
