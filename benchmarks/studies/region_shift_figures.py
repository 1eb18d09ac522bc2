"""The pictures of the region-shift study."""

from __future__ import annotations

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from torch import Tensor

import diffcam_fast as dcf
from benchmarks.studies.region_shift_measure import MAIN, RANDOM, SEEN, STRENGTHS, TRANSFERRED, TRUE, WHITE_BOX, Watch
from benchmarks.studies.statistics import mean_interval
from benchmarks.studies.study import Figure

_KEY = (MAIN, TRUE)
_STYLES = {WHITE_BOX: "-", TRANSFERRED: "--", RANDOM: ":"}
_SHOWN_LAYERS = 9
_NAME_LENGTH = 17


def curves(watches: list[Watch]) -> Figure:
    """MOD against strength, a column of panels for each set of images."""
    names = list(dict.fromkeys(watch.set_name for watch in watches))
    figure = Drawing(figsize=(5.2 * len(names), 7.0), layout="constrained")
    panels = figure.subplots(2, len(names), sharex=True, sharey=True, squeeze=False)
    for row, kind in enumerate((TRUE, SEEN)):
        for panel, name in zip(panels[row], names, strict=True):
            chosen = [watch for watch in watches if watch.set_name == name]
            subjects = list(dict.fromkeys(watch.subject.name for watch in chosen))
            for watch in chosen:
                _curve(panel, watch, (MAIN, kind), f"C{subjects.index(watch.subject.name)}")
            panel.set_title(f"{name}: map of the {kind} class", fontsize=10)
            panel.grid(alpha=0.3)
        panels[row][0].set_ylabel("MOD")
    for panel in panels[0]:
        panel.legend(fontsize=7)
    for panel in panels[1]:
        panel.set_xlabel("strength")
    caption = (
        f"Mean observed dissimilarity of Grad-CAM maps. Full lines: {WHITE_BOX}, with 95 % intervals over images; "
        f"dashed: {TRANSFERRED}; dotted: {RANDOM} of the same size. Above, the map of the true class before and after, "
        "which may end up blank; below, that of the class predicted before and of the class predicted after."
    )
    return Figure("mod", "Region shift against strength", caption, figure)


def _curve(panel: Axes, watch: Watch, key: tuple[str, str], color: str) -> None:
    intervals = [mean_interval(values) for values in watch.dissimilarity[key].double()]
    means = [interval.mean for interval in intervals]
    label = watch.subject.name if watch.attack == WHITE_BOX else None
    panel.plot(STRENGTHS, means, _STYLES[watch.attack], color=color, marker=".", label=label, linewidth=1.2)
    if watch.attack == WHITE_BOX:
        low, high = [interval.low for interval in intervals], [interval.high for interval in intervals]
        panel.fill_between(STRENGTHS, low, high, color=color, alpha=0.12, linewidth=0)


def distributions(watches: list[Watch], name: str, stem: str) -> Figure:
    """How NISSIM is spread over the images of a set, for each network and strength."""
    chosen = [watch for watch in watches if watch.set_name == name and watch.attack == WHITE_BOX]
    figure = Drawing(figsize=(1.2 + 2.1 * len(chosen), 3.6), layout="constrained")
    panels = figure.subplots(1, len(chosen), sharey=True, squeeze=False)[0]
    for panel, watch in zip(panels, chosen, strict=True):
        shift = watch.shift[_KEY]
        bins = shift.histogram.shape[1]
        heights = torch.linspace(0, 1, bins + 1)
        share = shift.histogram / shift.count
        for position, row in enumerate(share):
            width = torch.cat((row, row[-1:])) / max(float(row.max()), 1e-12) * 0.45
            panel.fill_betweenx(
                heights, position - width, position + width, step="post", color=f"C{position}", alpha=0.6
            )
            panel.plot([position - 0.3, position + 0.3], [float(shift.mod[position])] * 2, color="black", linewidth=1.2)
        top = float(heights[1:][(share.sum(0) > 0)].max())
        panel.set(xticks=range(len(share)), xticklabels=[f"{strength:g}" for strength in shift.strengths])
        panel.set_title(watch.subject.name, fontsize=9)
        panel.set_xlabel("strength")
        panel.set_ylim(0, max(top, panel.get_ylim()[1] if panel is not panels[0] else 0))
    panels[0].set_ylabel("NISSIM")
    caption = (
        f"{name}, {WHITE_BOX}: how the dissimilarity of the true class's Grad-CAM maps is spread over "
        f"{chosen[0].shift[_KEY].count} images; each shape is as wide as its fullest part of 1/{bins}. Bars: MOD."
    )
    return Figure(f"distribution-{stem}", f"Spread of the dissimilarity: {name}", caption, figure)


def strip(images: Tensor, maps: list[dict[str, Tensor]], title: str, stem: str) -> Figure:
    """One image at each strength, and the maps of layers from the first to the last.

    Args:
        images: float32 (E, 3, H, W), from 0 to 1.
        maps: of each strength, (H, W) by layer.
        title: what is shown, for the caption.
        stem: of the figure's name.
    """
    names = list(maps[0])
    places = torch.linspace(0, len(names) - 1, min(_SHOWN_LAYERS, len(names))).round().long().tolist()
    shown = [names[place] for place in places]
    figure = Drawing(figsize=(1.25 * (len(shown) + 1), 1.3 * len(images) + 0.3), layout="constrained")
    panels = figure.subplots(len(images), len(shown) + 1, squeeze=False)
    for row, (image, by_layer, strength) in enumerate(zip(images, maps, STRENGTHS, strict=True)):
        panels[row][0].imshow(image.permute(1, 2, 0).numpy())
        panels[row][0].set_ylabel(f"{strength:g}", fontsize=9)
        for column, name in enumerate(shown, 1):
            picture = dcf.overlay(by_layer[name][None], image[None].contiguous())[0]
            panels[row][column].imshow(picture.numpy())
        for panel in panels[row]:
            panel.set(xticks=[], yticks=[])
    panels[0][0].set_title("image", fontsize=8)
    for column, (name, place) in enumerate(zip(shown, places, strict=True), 1):
        panels[0][column].set_title(f"{place + 1}/{len(names)}\n{_short(name)}", fontsize=6)
    caption = (
        f"{title}: rows, the strength of the attack; columns, {len(shown)} of the {len(names)} layers, from the first "
        "to the last, all explained by one forward pass and one pull-back."
    )
    return Figure(f"strip-{stem}", f"Maps of the layers as the attack grows: {title}", caption, figure)


def _short(name: str) -> str:
    """The end of a layer's name, whole parts only."""
    while len(name) > _NAME_LENGTH and "." in name:
        name = name.partition(".")[2]
    return name


def depth(rows: dict[str, Tensor]) -> Figure:
    """MOD of every layer against its depth.

    Args:
        rows: MOD (E, layers), by network.
    """
    figure = Drawing(figsize=(5.5 * len(rows), 3.8), layout="constrained")
    panels = figure.subplots(1, len(rows), sharey=True, squeeze=False)[0]
    for panel, (name, values) in zip(panels, rows.items(), strict=True):
        for strength, row in zip(STRENGTHS[1:], values[1:], strict=True):
            panel.plot(range(1, len(row) + 1), row, label=f"strength {strength:g}")
        panel.set(title=name, xlabel="layer, from the first to the last")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    panels[0].set_ylabel("MOD")
    return Figure(
        "layers", "Region shift by layer", "Mean observed dissimilarity of each layer's map, white box.", figure
    )
