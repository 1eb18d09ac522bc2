"""Pictures of the study of passive fooling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from matplotlib.figure import Figure as Drawing
from torch import Tensor

from benchmarks.figures import COLORS
from benchmarks.studies.fooling_measures import EXPLAINED, clean_likeness
from benchmarks.studies.statistics import Interval, mean_interval
from benchmarks.studies.study import Figure
from diffcam_fast import overlay

if TYPE_CHECKING:
    from benchmarks.studies.fooling import Attack, Result

_PHOTOS, _PIXELS = 5, 160


def grid_figure(result: Result, attacks: list[Attack], logit: str, difference: str) -> Figure:
    """Photos with Grad-CAM maps before and after the attacks, beside the hoax."""
    attacks = [attack for attack in attacks if attack in result.outcomes]
    chosen = _spread(result.task.test_labels)
    photos = F.interpolate(result.task.test[chosen].float() / 255, (_PIXELS, _PIXELS), mode="bilinear").clamp(0, 1)
    hoax = result.hoax.map.expand(len(chosen), 1, *result.hoax.size)
    columns: list[tuple[str, Tensor | None]] = [("photo", None)]
    columns += [
        (f"clean\n{short} map", result.clean.maps[name, "gradcam"][chosen])
        for short, name in (("logit", logit), ("difference", difference))
    ]
    for attack in attacks:
        aim = "logit" if attack.target == logit else "difference"
        columns += [
            (f"{aim} attacked\n{short} map", result.outcomes[attack].maps[name, "gradcam"][chosen])
            for short, name in (("logit", logit), ("difference", difference))
        ]
    columns.append(("hoax", hoax))
    figure = Drawing(figsize=(1.35 * len(columns), 1.4 * len(chosen) + 0.5), layout="constrained")
    panels = figure.subplots(len(chosen), len(columns), squeeze=False)
    for number, (title, maps) in enumerate(columns):
        pictures: Any = photos.permute(0, 2, 3, 1) if maps is None else overlay(maps, photos)[:, 0]
        for row, picture in enumerate(pictures):
            panel = panels[row][number]
            panel.imshow(picture.numpy())
            panel.set_xticks([])
            panel.set_yticks([])
            panel.spines[:].set_visible(False)
            if row == 0:
                panel.set_title(title, fontsize=8)
            if number == 0:
                name = result.task.names[int(result.task.test_labels[chosen[row]])]
                panel.set_ylabel(name[:18], fontsize=8)
    height, width = result.hoax.size
    caption = (
        f"Test images with Grad-CAM of their label at {result.task.layer}, {height} x {width} positions, differences "
        "by logsumexp. Attacked: trained to show the hoax in single-logit or in difference maps, first "
        "seed."
    )
    return Figure(
        f"maps-{_stem(result.task.name)}", f"Maps before and after the hoax: {result.task.name}", caption, figure
    )


def steered_figure(results: list[Result], attacks: list[Attack]) -> Figure:
    """How like the hoax each explanation's Grad-CAM is, before and after."""
    shown = [(result, attack) for result in results for attack in attacks if attack in result.outcomes]
    figure = Drawing(figsize=(1 + 2.6 * len(shown), 4.2), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    places = range(len(EXPLAINED))
    for panel, (result, attack) in zip(panels, shown, strict=True):
        before = [mean_interval(result.unattacked[name, "gradcam"]["SSIM to hoax"]) for name in EXPLAINED]
        after = [result.outcomes[attack].interval((name, "gradcam"), "SSIM to hoax") for name in EXPLAINED]
        kept = [result.outcomes[attack].interval((name, "gradcam"), "SSIM to clean") for name in EXPLAINED]
        _points(panel, places, before, 0.2, "o", COLORS[-1], "to the hoax, clean network")
        _points(panel, places, after, 0.0, "o", COLORS[0], "to the hoax, fooled network")
        _points(panel, places, kept, -0.2, "D", COLORS[1], "to the clean network's map, fooled network")
        aim = "logit" if attack.target == "logit" else "difference"
        panel.set_title(f"{result.task.name}\n{aim} maps attacked", fontsize=8)
        panel.set_xlabel("SSIM")
        panel.set_xlim(-0.7, 1.05)
        panel.axvline(0, color="0.8", linewidth=0.8)
    panels[0].set_yticks(places, list(EXPLAINED), fontsize=8)
    panels[0].invert_yaxis()
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8
    )
    caption = (
        "Grad-CAM maps of test images' labels: mean and 95 % interval over images, each the mean of its seeds. An "
        "explanation that is not taken in keeps blue on grey, and orange at 1."
    )
    return Figure("steered", "Who is taken in by the hoax", caption, figure)


def clean_figure(results: list[Result]) -> Figure:
    """How alike differences and logits are where nobody attacked."""
    figure = Drawing(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    names = [name for name in EXPLAINED if name != "logit"]
    for panel, measure in zip(panels, ("Pearson", "SSIM"), strict=True):
        for number, result in enumerate(results):
            for method, marker in (("gradcam", "o"), ("gradcam++", "^")):
                found = [clean_likeness(result.clean, method, name)[measure] for name in names]
                shift = 0.24 * (number - (len(results) - 1) / 2) + (0.08 if method == "gradcam++" else 0)
                _points(panel, range(len(names)), found, shift, marker, COLORS[number], f"{result.task.name}, {method}")
        panel.set_xlabel(measure)
    panels[0].set_yticks(range(len(names)), names, fontsize=8)
    panels[0].invert_yaxis()
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=8
    )
    caption = "Maps by each explanation beside those of single logits: mean and 95 % interval over test images."
    return Figure("clean", "Where nobody attacks: differences beside single logits", caption, figure)


def _legend(figure: Drawing, panel: Any, columns: int) -> None:
    entries = panel.get_legend_handles_labels()
    figure.legend(*entries, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)


def _points(
    panel: Any, places: range, intervals: list[Interval], shift: float, marker: str, color: str, label: str
) -> None:
    means = [interval.mean for interval in intervals]
    # Of one value there is no interval.
    half = [0.0 if interval.count < 2 else interval.high - interval.mean for interval in intervals]
    at = [place + shift for place in places]
    panel.errorbar(means, at, xerr=half, fmt=marker, color=color, markersize=4, linewidth=1, capsize=2, label=label)
    panel.grid(axis="x", color="0.92")
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)


def _spread(labels: Tensor) -> list[int]:
    """The first images of different classes, then any, `_PHOTOS` in all."""
    first = list({int(label): index for index, label in reversed(list(enumerate(labels)))}.values())
    chosen = sorted(first)[:_PHOTOS]
    return chosen + [index for index in range(len(labels)) if index not in chosen][: _PHOTOS - len(chosen)]


def _stem(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
