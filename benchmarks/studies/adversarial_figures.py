"""Pictures of the study of adversarial images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from matplotlib.figure import Figure as Drawing
from torch import Tensor

from benchmarks.figures import COLORS
from benchmarks.studies.study import Cell, Figure


def overlap_figure(rows: Sequence[dict[str, Cell]], attacks: Sequence[str]) -> Figure:
    """Overlaps of the top tenth of pixels with their intervals: a panel for each network and method."""
    rows = [row for row in rows if row["share"] == 0.1]
    kinds = [name for name in rows[0] if name.endswith((" image", " magnitude"))]
    panels = list(dict.fromkeys((str(row["network"]), str(row["method"])) for row in rows))
    figure = Drawing(figsize=(10, 2.6 * math.ceil(len(panels) / 2)), layout="constrained")
    axes = figure.subplots(math.ceil(len(panels) / 2), 2, sharey=True, squeeze=False).ravel()
    attacks = list(dict.fromkeys(attacks))
    for axis, (network, method) in zip(axes, panels, strict=False):
        found = [row for row in rows if row["network"] == network and row["method"] == method]
        targets = list(dict.fromkeys(str(row["target"]) for row in found))
        for color, kind in enumerate(kinds):
            for row in found:
                mean, low, high = (_number(row[name]) for name in (kind, f"{kind}, low", f"{kind}, high"))
                place = targets.index(str(row["target"])) + 0.27 * (attacks.index(str(row["attack"])) - 1)
                error = [[mean - low], [high - mean]] if not math.isnan(low) else None
                label = kind if row is found[0] else None
                style = {"color": COLORS[color], "markersize": 4, "linewidth": 1}
                axis.errorbar(place + 0.06 * (color - 1.5), mean, error, fmt="osD^"[color], label=label, **style)
        axis.axhline(0.1, color="0.5", linewidth=0.8, linestyle="--")
        axis.set_xticks(range(len(targets)), targets)
        axis.set(title=f"{network}: {method}", ylim=(-0.05, 1.05))
        axis.grid(axis="y", color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.supylabel("overlap of the top tenth")
    caption = (
        "Share of the top tenth of pixels that two maps have in common, mean with 95 % interval. Within each group "
        f"from left to right: {', '.join(attacks)}. Dashed: what unrelated maps have in common."
    )
    return Figure("regions", "What an attack leaves of the important region", caption, figure)


def panel_figure(
    name: str,
    title: str,
    caption: str,
    images: tuple[Tensor, Tensor],
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[Tensor]]],
) -> Figure:
    """Original, perturbation and adversarial image, and below them the maps.

    Args:
        name: see `Figure`.
        title: see `Figure`.
        caption: see `Figure`.
        images: original and adversarial image (3, H, W), from 0 to 1.
        columns: what is explained.
        rows: method and image, with a signed map (H, W) for each column.
    """
    wide = len(columns)
    figure = Drawing(figsize=(1.15 * wide + 0.4, 1.2 * (len(rows) + 1) + 0.4), layout="constrained")
    axes = figure.subplots(len(rows) + 1, wide, squeeze=False)
    original, adversarial = (image.permute(1, 2, 0).numpy(force=True) for image in images)
    change = adversarial - original
    largest = float(abs(change).max()) or 1.0
    pictures = (original, 0.5 + 0.5 * change / largest, adversarial)
    for axis, picture, label in zip(axes[0], pictures, ("original", "perturbation", "adversarial"), strict=False):
        axis.imshow(picture)
        axis.set_title(label, fontsize=7)
    for axis, column in zip(axes[1], columns, strict=True):
        axis.set_title(column, fontsize=7)
    for line, (label, maps), picture in zip(axes[1:], rows, (original, adversarial) * 2, strict=True):
        line[0].set_ylabel(label, fontsize=7)
        grey = picture.mean(2)
        for axis, signed in zip(line, maps, strict=True):
            axis.imshow(grey, cmap="gray", vmin=-0.6, vmax=1.6)
            values = signed.detach().float().cpu()
            # Single pixels of integrated gradients may outshine all others.
            scale = float(torch.quantile(values.abs(), 0.995)) or 1.0
            axis.imshow((values / scale).numpy(), cmap="bwr", vmin=-1, vmax=1, alpha=0.6)
    for axis in axes.ravel():
        axis.set(xticks=[], yticks=[])
        for spine in axis.spines.values():
            spine.set_visible(False)
    return Figure(name, title, caption, figure)


def _number(cell: Cell) -> float:
    return float(cell) if isinstance(cell, int | float) else math.nan
