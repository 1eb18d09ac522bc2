"""Panels. Overlays have tests of their own, in tests/ops/test_overlay.py."""

from __future__ import annotations

import itertools
import subprocess
import sys
import warnings

import pytest
import torch

from diffcam_fast import viz
from diffcam_fast.ops.overlay import overlay


def make_panel(rivals=3, height=24, width=24, name="tiger cat", **options):
    pytest.importorskip("matplotlib")
    count = 1 + rivals
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(count, height, width, generator=generator)
    names = [name] + [f"{name} number {index}" for index in range(rivals)]
    return viz.panel(
        torch.rand(3, height, width, generator=generator),
        maps,
        names,
        [1 / count] * count,
        [-1.5] + [0.25] * rivals,
        **options,
    )


def texts(figure):
    return [text.get_text() for text in figure.texts]


LONG = "a name that is far too long to be written out " * 4


@pytest.mark.parametrize(
    ("rivals", "name", "size"),
    [(1, "fig", (24, 24)), (3, LONG, (24, 24)), (15, LONG, (24, 24)), (3, LONG, (16, 32)), (3, LONG, (32, 16))],
)
def test_nothing_in_a_panel_is_clipped_or_overlaps(rivals, name, size):
    figure = make_panel(rivals, *size, name=name, title=name, subtitle=name)
    renderer = figure.canvas.get_renderer()
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in figure.texts]
    boxes += [("picture", axes.get_window_extent(renderer)) for axes in figure.axes]
    boxes = [(label, box) for label, box in boxes if label]
    for label, box in boxes:
        assert box.x0 >= 0, label
        assert box.y0 >= 0, label
        assert box.x1 <= figure.bbox.width, label
        assert box.y1 <= figure.bbox.height, label
    for (first, box), (second, other) in itertools.combinations(boxes, 2):
        overlap_x = min(box.x1, other.x1) - max(box.x0, other.x0)
        overlap_y = min(box.y1, other.y1) - max(box.y0, other.y0)
        assert min(overlap_x, overlap_y) <= 2, f"{first!r} overlaps {second!r}"


def test_a_panel_says_what_was_predicted_and_what_each_map_explains():
    shown = texts(make_panel(2, title="cat.png", overall="everything else", score_name="margin"))
    assert "cat.png" in shown
    assert "tiger cat" in shown
    assert "everything else" in shown
    assert "margin \N{MINUS SIGN}1.50" in shown
    assert "33.3 %  \N{MIDDLE DOT}  logit difference +0.25" in shown


def test_a_map_without_evidence_says_so():
    names, numbers = ["a", "b"], [0.5, 0.5]
    maps = torch.stack([torch.rand(8, 8), torch.zeros(8, 8)])
    figure = viz.panel(torch.rand(3, 8, 8), maps, names, numbers, numbers)
    assert texts(figure).count("no position speaks for it") == 1


def test_hostile_names_are_drawn_as_text():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as one about a letter that the font lacks
        figure = make_panel(1, name="$\\frac{1}{0$ \x1b[2J\n\u5199\udcff", title="$x^2$")
        figure.canvas.draw()
    assert "$x^2$" in texts(figure)
    assert not any("\n" in text or "\x1b" in text for text in texts(figure))


def test_the_panels_pictures_are_the_overlays():
    photo, maps = torch.rand(3, 8, 8), torch.rand(1, 8, 8)
    figure = viz.panel(photo, maps, ["a"], [1.0], [0.0], colormap="hot", opacity=0.7)
    tile = torch.from_numpy(figure.axes[-1].images[0].get_array().data)
    assert torch.equal(tile, overlay(maps, photo[None], colormap="hot", opacity=0.7, normalize=None)[0])


def test_the_panels_photo_is_what_was_given():
    photo = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    figure = viz.panel(photo, torch.full((1, 8, 8), float("nan")), ["a"], [1.0], [0.0])
    assert torch.equal(torch.from_numpy(figure.axes[0].images[0].get_array().data), photo.permute(1, 2, 0))


def test_panels_of_wrong_lengths_are_refused():
    maps = torch.zeros(2, 8, 8)
    photo = torch.zeros(3, 8, 8)
    with pytest.raises(ValueError, match="names: got 1 for 2 maps"):
        viz.panel(photo, maps, ["a"], [0.5, 0.5], [0.0, 0.0])
    with pytest.raises(ValueError, match="probabilities: got 3"):
        viz.panel(photo, maps, ["a", "b"], [0.5, 0.5, 0.0], [0.0, 0.0])
    with pytest.raises(ValueError, match=r"maps: got \(8, 8\)"):
        viz.panel(photo, maps[0], ["a"], [0.5], [0.0])
    with pytest.raises(ValueError, match="at most the 16"):
        viz.panel(photo, torch.zeros(17, 8, 8), ["a"] * 17, [0.0] * 17, [0.0] * 17)


def test_a_panel_leaves_pyplot_alone():
    pytest.importorskip("matplotlib")
    code = (
        "import sys, torch; from diffcam_fast import viz; "
        "viz.panel(torch.rand(3, 8, 8), torch.rand(1, 8, 8), ['a'], [1.0], [0.0]).canvas.draw(); "
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
