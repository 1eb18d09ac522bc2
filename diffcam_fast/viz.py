"""Drawing: one panel that tells why a class was predicted rather than its rivals.

Needs `pip install 'diffcam_fast[cli]'`. Maps laid over photos are `diffcam_fast.overlay`, which does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffcam_fast.ops.overlay import overlay

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INK, _MUTED, _RULE, _ACCENT, _TRACK = "#1b1f24", "#636c76", "#d8dee4", "#1f5fbf", "#eef1f4"
_FONT = "DejaVu Sans"  # comes with matplotlib, so that every machine draws the same panel
_WIDTH, _MARGIN, _GAP = 12.0, 0.45, 0.28  # inches
_DOTS_PER_INCH = 150  # of the figure: texts are measured at the resolution at which they are drawn
_PHOTO_HEIGHT, _TILE_CAPTION, _COLUMNS = 3.3, 0.62, 4
_MAX_BARS = 10  # more would be too small to read; the tiles repeat the numbers
MAX_PANEL_MAPS = 16
"""How many maps `panel` has room for."""


def panel(
    photo: Tensor,
    maps: Tensor,
    names: Sequence[str],
    probabilities: Sequence[float],
    differences: Sequence[float],
    *,
    title: str = "",
    subtitle: str = "",
    overall: str = "all other classes",
    score_name: str = "logit difference",
    colormap: str = "jet",
    opacity: float = 0.5,
) -> Figure:
    """One picture of why a class was predicted rather than its rivals, to be read at a glance.

    Above, the photo with the probabilities of the predicted class and of its rivals; below, the map of the prediction
    as a whole and one map for each rival, with what it is that the map explains.

    Args:
        photo: (3, H, W), what the model saw: floating point from 0 to 1, or uint8.
        maps: (1 + k, h, w) from 0 to 1: of the prediction, then of what tells it from each rival.
        names: 1 + k names: of the predicted class, then of the rivals, strongest first.
        probabilities: of these classes, from 0 to 1.
        differences: what each map explains: the score of the prediction, then its logit less each rival's.
        title: heading, such as the name of the photo's file.
        subtitle: what the reader should know besides, such as model, method and which part of the photo is shown.
        overall: what the first map compares the prediction with, after "rather than".
        score_name: what the first of `differences` is.
        colormap: see `diffcam_fast.overlay`.
        opacity: see `diffcam_fast.overlay`.

    Returns:
        A matplotlib figure with an Agg canvas, for `figure.savefig("panel.png")`. pyplot and its global state are
        not touched.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: arguments that do not go together; see also `diffcam_fast.overlay`.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("panel needs matplotlib: pip install 'diffcam_fast[cli]'") from error
    if not isinstance(maps, Tensor) or maps.ndim != 3 or maps.shape[0] < 1:
        raise ValueError(f"maps: got {tuple(getattr(maps, 'shape', ()))}, expected a tensor of shape (1 + k, H, W)")
    if maps.shape[0] > MAX_PANEL_MAPS:
        raise ValueError(f"maps: got {maps.shape[0]}, expected at most the {MAX_PANEL_MAPS} that a panel has room for")
    for argument, values in (("names", names), ("probabilities", probabilities), ("differences", differences)):
        if len(values) != maps.shape[0]:
            raise ValueError(f"{argument}: got {len(values)} for {maps.shape[0]} maps, expected as many")

    images, heat = photo[None].cpu(), maps[None].cpu()
    tiles = overlay(heat, images, colormap=colormap, opacity=opacity, normalize=None)[0]
    picture = overlay(torch.zeros_like(heat[:, 0]), images)[0]
    empty = (maps.flatten(1).amax(1) <= 0).tolist()
    aspect = picture.shape[0] / picture.shape[1]
    tile_width = (_WIDTH - 2 * _MARGIN - (_COLUMNS - 1) * _GAP) / _COLUMNS
    tile_height = tile_width * aspect
    rows = -(-len(tiles) // _COLUMNS)
    heading = 0.95 if title or subtitle else 0.35
    height = heading + _PHOTO_HEIGHT + 0.7 + rows * (tile_height + _TILE_CAPTION) + 0.2

    figure = Figure(figsize=(_WIDTH, height), dpi=_DOTS_PER_INCH, facecolor="white")
    FigureCanvasAgg(figure)
    sheet = _Sheet(figure, height)
    if title or subtitle:
        sheet.text(_MARGIN, 0.33, title, 15, weight="bold", width=_WIDTH - 2 * _MARGIN)
        sheet.text(_MARGIN, 0.66, subtitle, 9.5, _MUTED, width=_WIDTH - 2 * _MARGIN)

    photo_width = min(_PHOTO_HEIGHT / aspect, 0.55 * _WIDTH)
    sheet.image(picture, _MARGIN, heading, photo_width, _PHOTO_HEIGHT)
    left = _MARGIN + photo_width + 0.55
    _draw_probabilities(sheet, left, heading, _WIDTH - _MARGIN - left, names, probabilities)

    top = heading + _PHOTO_HEIGHT + 0.42
    legend_width = 4.3
    sheet.text(_MARGIN, top, "Where the network sees", 11.5)
    offset = sheet.measure("Where the network sees ", 11.5, "normal")
    available = _WIDTH - 2 * _MARGIN - legend_width - 1.5 - offset
    shown = sheet.text(_MARGIN + offset, top, names[0], 11.5, _ACCENT, weight="bold", width=available)
    sheet.text(_MARGIN + offset + shown, top, " rather than \N{HORIZONTAL ELLIPSIS}", 11.5)
    _draw_legend(sheet, _WIDTH - _MARGIN - legend_width, top, legend_width, colormap, opacity)

    for index in range(len(tiles)):
        row, column = divmod(index, _COLUMNS)
        x = _MARGIN + column * (tile_width + _GAP)
        y = top + 0.28 + row * (tile_height + _TILE_CAPTION)
        sheet.image(tiles[index], x, y, tile_width, tile_height)
        if empty[index]:
            sheet.text(x + 0.1, y + tile_height - 0.18, "no position speaks for it", 9, "white", backdrop=_INK)
        rival = overall if index == 0 else names[index]
        score = f"{score_name if index == 0 else 'logit difference'} {_signed(differences[index])}"
        if index > 0:
            score = f"{_percentage(probabilities[index])}  \N{MIDDLE DOT}  {score}"
        sheet.text(x, y + tile_height + 0.19, rival, 11, weight="bold", width=tile_width)
        sheet.text(x, y + tile_height + 0.40, score, 9, _MUTED, width=tile_width)
    return figure


def _draw_probabilities(
    sheet: _Sheet, x: float, y: float, width: float, names: Sequence[str], probabilities: Sequence[float]
) -> None:
    """The predicted class in large letters, and a bar for it and for each rival, filling the photo's height."""
    sheet.text(x, y + 0.08, "PREDICTED CLASS", 8.5, _MUTED, weight="bold")
    sheet.text(x, y + 0.42, names[0], 20, _INK, weight="bold", width=width)
    top = y + 0.92
    step = min((_PHOTO_HEIGHT - (top - y)) / min(len(names), _MAX_BARS), 0.6)
    thickness = min(0.2, 0.34 * step)
    label_size = min(10.5, 72 * 0.36 * step)
    for index, (name, probability) in enumerate(zip(names[:_MAX_BARS], probabilities, strict=False)):
        color, weight = (_ACCENT, "bold") if index == 0 else (_MUTED, "normal")
        middle = top + index * step + 0.28 * step
        percentage = _percentage(probability)
        reserved = sheet.measure(percentage, label_size, weight)
        sheet.text(x, middle, name, label_size, _INK, weight=weight, width=width - reserved - 0.2)
        sheet.text(x + width, middle, percentage, label_size, _INK, weight=weight, align="right")
        bar_top = middle + 0.3 * step
        sheet.bar(x, bar_top, width, thickness, _TRACK)
        sheet.bar(x, bar_top, width * min(max(probability, 0.0), 1.0), thickness, color)


def _draw_legend(sheet: _Sheet, x: float, y: float, width: float, colormap: str, opacity: float) -> None:
    """The colours exactly as they lie over the photo, from a position that says nothing to a map's strongest."""
    ramp = torch.linspace(0, 1, 256)[None, None]
    grey = torch.full((1, 1, *ramp.shape[1:]), 0.55)
    colors = overlay(ramp, grey, colormap=colormap, opacity=opacity, normalize=None)[0]
    low, high = "nothing", "strongest in each map"
    low_width, high_width = (sheet.measure(label, 9, "normal") for label in (low, high))
    sheet.text(x, y, low, 9, _MUTED)
    bar_width = width - low_width - high_width - 0.2
    sheet.image(colors, x + low_width + 0.1, y - 0.07, bar_width, 0.14)
    sheet.text(x + width, y, high, 9, _MUTED, align="right")


class _Sheet:
    """A figure measured in inches from its top left corner."""

    def __init__(self, figure: Figure, height: float) -> None:
        self.figure = figure
        self.height = height

    def image(self, pixels: Tensor, x: float, y: float, width: float, height: float) -> None:
        rectangle = (x / _WIDTH, 1 - (y + height) / self.height, width / _WIDTH, height / self.height)
        axes = self.figure.add_axes(rectangle)
        axes.imshow(pixels.numpy(), aspect="auto", interpolation="bicubic", resample=True)
        axes.set_axis_off()

    def bar(self, x: float, y: float, width: float, height: float, color: str) -> None:
        from matplotlib.patches import Rectangle

        corner = (x / _WIDTH, 1 - (y + height) / self.height)
        size = (width / _WIDTH, height / self.height)
        self.figure.add_artist(
            Rectangle(corner, *size, transform=self.figure.transFigure, facecolor=color, linewidth=0)
        )

    def text(
        self,
        x: float,
        y: float,
        content: str,
        size: float,
        color: str = _INK,
        *,
        weight: str = "normal",
        width: float | None = None,
        align: str = "left",
        backdrop: str | None = None,
    ) -> float:
        """Write a line from x or up to it, centred on y; returns how wide it became.

        What is too wide is written a little smaller, and shortened where that does not suffice.
        """
        content = _printable(content)
        if width is not None:
            size *= min(1.0, max(0.85, 0.99 * width / max(self.measure(content, size, weight), 1e-9)))
            content = self._shorten(content, size, weight, width)
        box = {"facecolor": backdrop, "edgecolor": "none", "alpha": 0.75, "pad": 3.0} if backdrop else None
        self.figure.text(
            x / _WIDTH,
            1 - y / self.height,
            content,
            fontsize=size,
            color=color,
            weight=weight,
            family=_FONT,
            ha=align,
            va="center_baseline",
            bbox=box,
            parse_math=False,  # a file or class called "$x$" is not a formula
            usetex=False,
        )
        return self.measure(content, size, weight)

    def measure(self, content: str, size: float, weight: str) -> float:
        from matplotlib.font_manager import FontProperties

        font = FontProperties(family=_FONT, weight=weight, size=size)
        renderer = self.figure.canvas.get_renderer()  # type: ignore[attr-defined]
        return float(renderer.get_text_width_height_descent(content, font, ismath=False)[0] / self.figure.dpi)

    def _shorten(self, content: str, size: float, weight: str, width: float) -> str:
        if self.measure(content, size, weight) <= width:
            return content
        low, high = 0, len(content)
        while low < high:  # the longest beginning that still fits with an ellipsis behind it
            middle = (low + high + 1) // 2
            fits = self.measure(content[:middle] + "\N{HORIZONTAL ELLIPSIS}", size, weight) <= width
            low, high = (middle, high) if fits else (low, middle - 1)
        return content[:low].rstrip() + "\N{HORIZONTAL ELLIPSIS}"


def _printable(content: str) -> str:
    """The text with what the font cannot draw, or what would break the line, replaced."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties(family=_FONT)))
    return "".join(
        letter if letter.isprintable() and font.get_char_index(ord(letter)) else "\N{REPLACEMENT CHARACTER}"
        for letter in content
    )


def _percentage(probability: float) -> str:
    if 0 < probability < 0.001:
        return "< 0.1 %"
    return f"{100 * probability:.1f} %"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")
