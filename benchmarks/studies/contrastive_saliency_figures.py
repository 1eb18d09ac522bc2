"""Figures of the study of contrastive saliency: maps of attacked photos, and the recovery curve."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure as Drawing
from torch import Tensor

from benchmarks.studies.contrastive_saliency_animals import Animals
from benchmarks.studies.contrastive_saliency_recovery import PERTURBATION, RANDOM, Recovery
from benchmarks.studies.statistics import mean_interval
from benchmarks.studies.study import Figure

_BRIGHTEST = 0.99  # the quantile of a map that is white: single pixels would leave the rest black

#: One colour a method, for its maps and for their contrasts.
_COLORS = {
    "gradient": "tab:blue",
    "gradient x input": "tab:orange",
    "integrated gradients": "tab:green",
    "guided back-propagation": "tab:red",
}


class Panel(NamedTuple):
    """One photo: for each condition a label, the picture (3, H, W) and maps (H, W) by name."""

    rows: list[tuple[str, Tensor, dict[str, Tensor]]]


def draw_animals(animals: list[Animals]) -> Figure:
    """The photo with two animals, and maps of either class of every method, with every network."""
    kinds = list(animals[0].maps)
    titles = [f"{method},\n{kind}" for method, kind in kinds]
    rows = 2 * len(animals)
    figure = Drawing(figsize=(1.9 * (1 + len(kinds)), 1.95 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, 1 + len(kinds), squeeze=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    for number, each in enumerate(animals):
        for place, animal in enumerate(("bull mastiff", "tiger cat")):
            line = axes[2 * number + place]
            line[0].imshow(each.photo.permute(1, 2, 0).clamp(0, 1).numpy())
            line[0].set_ylabel(f"{each.network}:\n{animal}", fontsize=7)
            for axis, key, title in zip(line[1:], kinds, titles, strict=True):
                _show(axis, each.maps[key][place])
                if number == place == 0:
                    axis.set_title(title.replace("back-", "back-\n"), fontsize=7)
    return Figure(
        "animals",
        "One photo, two classes",
        "Maps of the class at the left: positive parts summed over channels, each from black to white by itself. "
        "Contrasts are of the one class with the other.",
        figure,
    )


def _show(axis: Any, values: Tensor) -> None:
    white = float(torch.quantile(values.float(), _BRIGHTEST))
    axis.imshow(values.numpy(), cmap="gray", vmin=0, vmax=white or 1.0)


def draw_panels(panels: list[Panel]) -> Figure:
    """Photos clean, after a failed and after a successful attack, with the maps of every method."""
    columns = 1 + max((len(maps) for panel in panels for _, _, maps in panel.rows), default=0)
    rows = max(sum(len(panel.rows) for panel in panels), 1)
    figure = Drawing(figsize=(1.7 * columns, 1.75 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    place = 0
    for panel in panels:
        for label, picture, maps in panel.rows:
            axes[place, 0].imshow(picture.permute(1, 2, 0).clamp(0, 1).numpy())
            axes[place, 0].set_ylabel(label, fontsize=7)
            for axis, (name, values) in zip(axes[place, 1:], maps.items(), strict=True):
                _show(axis, values)
                if place == 0:
                    axis.set_title(name.replace(", ", ",\n").replace("back-", "back-\n"), fontsize=7)
            place += 1
    if not panels:
        axes[0, 0].set_ylabel("no photo with both attacks", fontsize=7)
    return Figure(
        "maps",
        "Maps of clean and attacked photos",
        "For every photo: clean, after an attack that failed, and after one that succeeded; beside it the class that "
        "the network decides for. Positive parts summed over channels, each map from black to white by itself. "
        "Contrasts are against the class that comes next.",
        figure,
    )


def draw_recovery(recovery: Recovery) -> Figure:
    """Accuracy over the share of pixels that are perturbed, with 95 % intervals."""
    figure = Drawing(figsize=(9.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axis, title, prefix in ((left, "Ranked by the maps", ""), (right, "Ranked by the contrasts", "contrast of ")):
        for name, color in _COLORS.items():
            _draw_curve(axis, recovery, f"{prefix}{name}", name, color, "-")
        _draw_curve(axis, recovery, RANDOM, RANDOM, "gray", ":")
        _draw_curve(axis, recovery, PERTURBATION, PERTURBATION, "black", ":")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("pixels perturbed, %")
        axis.set_ylim(0, 1.02)
        axis.grid(alpha=0.3)
    left.set_ylabel("accuracy")
    right.legend(fontsize=7, loc="lower right")
    return Figure(
        "recovery",
        "How much accuracy returns on Carlini-Wagner images",
        f"CIFAR-10, ResNet-18, {recovery.images} images. The pixels that a map of the adversarial decision ranks first "
        "take the mean of the 3 x 3 pixels around them. Bands: 95 % intervals over images. Dotted: rankings that "
        "explain nothing.",
        figure,
    )


def _draw_curve(axis: Any, recovery: Recovery, ranking: str, label: str, color: str, style: str) -> None:
    values = recovery.right.get(ranking)
    if values is None:
        return
    intervals = [mean_interval(column) for column in values.T]
    percent = [100 * fraction for fraction in recovery.fractions]
    axis.plot(percent, [each.mean for each in intervals], style, color=color, label=label, marker=".", markersize=4)
    low, high = ([getattr(each, name) for each in intervals] for name in ("low", "high"))
    axis.fill_between(percent, low, high, color=color, alpha=0.12, linewidth=0)
