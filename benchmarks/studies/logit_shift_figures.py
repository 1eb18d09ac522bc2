"""Pictures of the study of shifted logits."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.figure import Figure as Drawing
from torch import Tensor

from benchmarks.figures import COLORS
from benchmarks.studies.logit_shift_maps import shown
from benchmarks.studies.study import Cell, Figure
from diffcam_fast.ops.overlay import overlay

MARKERS = "osD^vP*Xd"


def change_figure(rows: Sequence[dict[str, Cell]], methods: Sequence[str], targets: Sequence[str]) -> Figure:
    """Mean change by method and target, one panel for each precision; the mean over the networks."""
    dtypes = list(dict.fromkeys(str(row["precision"]) for row in rows))
    figure = Drawing(figsize=(10, 3.6), layout="constrained")
    panels = figure.subplots(1, len(dtypes), sharey=True)
    for panel, dtype in zip(panels, dtypes, strict=True):
        for number, target in enumerate(targets):
            heights = []
            for method in methods:
                cells = [row[target] for row in rows if row["precision"] == dtype and row["method"] == method]
                heights.append(_mean(cells))
            places = [place + 0.07 * (number - len(targets) / 2) for place in range(len(methods))]
            color = COLORS[number % len(COLORS)]
            panel.plot(places, heights, MARKERS[number], color=color, markersize=5, label=target, linestyle="none")
        panel.set(yscale="log", title=dtype)
        panel.set_xticks(range(len(methods)), methods, rotation=30, ha="right")
        panel.grid(axis="y", color="0.9")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].axhline(1e-4, color="0.4", linewidth=0.8, linestyle="--")
    panels[0].set_ylabel("change, share of the map's range")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    caption = (
        "Mean change of raw maps of the predicted class, over networks and photos. Dashed: the bar of 1e-4 for "
        "differences. Right: the same networks, not altered, in bfloat16 beside float32."
    )
    return Figure("change", "How much maps change when a number is added to all logits", caption, figure)


def saturation_figure(rows: Sequence[dict[str, Cell]]) -> Figure:
    """Share of empty maps, and how much the others are like the exact ones, over the factor of the logits."""
    figure = Drawing(figsize=(8, 5), layout="constrained")
    dtypes = list(dict.fromkeys(str(row["precision"]) for row in rows))
    factors = sorted({float(row["factor"] or 0) for row in rows})
    panels = figure.subplots(2, len(dtypes), sharey="row", sharex=True)
    for line, measure in zip(panels, ("empty", "correlation"), strict=True):
        for panel, dtype in zip(line, dtypes, strict=True):
            for number, target in enumerate(dict.fromkeys(str(row["target"]) for row in rows)):
                cells = [row for row in rows if row["precision"] == dtype and row["target"] == target]
                heights = [_mean([row[measure] for row in cells if row["factor"] == factor]) for factor in factors]
                # Many of the lines lie upon each other.
                style = {
                    "color": COLORS[number % len(COLORS)],
                    "marker": MARKERS[number],
                    "markersize": 10 - 1.5 * number,
                }
                panel.plot(factors, heights, label=target, linewidth=6 - 1.2 * number, **style)
            panel.set(xscale="log")
            panel.set_xticks(factors, [f"{factor:g}" for factor in factors])
            panel.minorticks_off()
            panel.grid(axis="y", color="0.9")
            panel.spines[["top", "right"]].set_visible(False)
    for panel, dtype in zip(panels[0], dtypes, strict=True):
        panel.set(title=dtype)
    for panel in panels[1]:
        panel.set(xlabel="factor of the logits")
    panels[0][0].set_ylabel("share of empty maps")
    panels[1][0].set_ylabel("correlation of the others\nwith the exact map")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    caption = (
        "Grad-CAM of the predicted class, mean over networks. Above: share of photos whose map is zero everywhere. "
        "Below: Pearson correlation of the others with the map of the logsumexp difference in float64."
    )
    return Figure("saturation", "Where the softmax saturates", caption, figure)


def _mean(cells: Sequence[Cell]) -> float:
    values = [cell for cell in cells if isinstance(cell, float) and not math.isnan(cell)]
    return sum(values) / len(values) if values else math.nan


def photo_figure(
    name: str,
    title: str,
    caption: str,
    image: Tensor,
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[tuple[Tensor, Tensor]]]],
) -> Figure:
    """A photo with its maps before and after.

    Args:
        name: see `Figure`.
        title: see `Figure`.
        caption: see `Figure`.
        image: float32 (3, H, W), from 0 to 1.
        columns: names of the targets.
        rows: label, and for each target the raw maps (h, w) of the original and of the altered network.
    """
    wide, high = 1 + 2 * len(columns), len(rows)
    figure = Drawing(figsize=(0.9 * wide + 0.3, 0.93 * high + 0.5), layout="constrained")
    axes = figure.subplots(high, wide, squeeze=False)
    small = image.unsqueeze(0)
    for line, (label, pairs) in zip(axes, rows, strict=True):
        line[0].imshow(image.permute(1, 2, 0).numpy(force=True))
        line[0].set_ylabel(label, fontsize=7)
        for number, raw in enumerate(part for pair in pairs for part in pair):
            picture = overlay(shown(raw).unsqueeze(0), small, normalize="minmax")[0]
            line[1 + number].imshow(picture.numpy(force=True))
    axes[0][0].set_title("photo", fontsize=7)
    for number, column in enumerate(columns):
        axes[0][1 + 2 * number].set_title(f"{column}\noriginal", fontsize=7)
        axes[0][2 + 2 * number].set_title(f"{column}\naltered", fontsize=7)
    for one in axes.ravel():
        one.set(xticks=[], yticks=[])
        for spine in one.spines.values():
            spine.set_visible(False)
    return Figure(name, title, caption, figure)
