"""Figures of the benchmarks, as PNG."""

from __future__ import annotations

import io

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

#: Ours first; apart also for those who see few colours, and in grey.
COLORS = ("#0072b2", "#e69f00", "#56b4e9", "#cc79a7", "#009e73", "#999999")
WIDTH, HEIGHT = 8.0, 3.8


def empty(columns: int = 1, rows: int = 1, height: float = HEIGHT, width: float = WIDTH) -> tuple[Figure, list[Axes]]:
    """A figure that belongs to no window, and its axes, row by row."""
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(axis="y", color="0.9")
        one.set_axisbelow(True)
    return figure, axes


def png(figure: Figure) -> bytes:
    """The figure's file. The same figure gives the same bytes."""
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()
