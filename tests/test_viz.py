"""Overlays and panels."""

from __future__ import annotations

import itertools
import subprocess
import sys
import warnings

import pytest
import torch

from diffcam_fast import viz

JET_RED = (127.5, 0, 0)  # the jet colormap's end: dark red


def photos(count=2, height=6, width=8):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def test_a_map_of_zero_leaves_the_photo():
    images = photos()
    result = viz.overlay(images, torch.zeros(2, 3, 6, 8), opacity=1.0)
    assert result.dtype == torch.uint8
    assert result.shape == (2, 3, 6, 8, 3)
    for target in range(3):
        assert torch.equal(result[:, target], images.permute(0, 2, 3, 1))


def test_no_opacity_leaves_the_photo():
    images = photos()
    result = viz.overlay(images, torch.rand(2, 1, 6, 8), opacity=0.0)
    assert torch.equal(result[:, 0], images.permute(0, 2, 3, 1))


def test_a_map_of_one_at_full_opacity_is_the_colormaps_last_colour():
    result = viz.overlay(photos(), torch.ones(2, 1, 6, 8), opacity=1.0)
    assert (result.double() - torch.tensor(JET_RED)).abs().max() <= 0.5


@pytest.mark.parametrize("level", [0.25, 0.5, 0.75])
def test_heat_is_as_opaque_as_the_map_is_high(level):
    images = photos()
    opacity = 0.6
    result = viz.overlay(images, torch.full((2, 1, 6, 8), level), colormap="hot", opacity=opacity)
    color = viz.color_table("hot")[round(level * 255)].double()
    weight = opacity * level
    expected = (1 - weight) * images.permute(0, 2, 3, 1).double() + weight * 255 * color
    assert (result[:, 0].double() - expected).abs().max() <= 0.51


def test_every_image_layout_gives_the_same():
    images = photos()
    maps = torch.rand(2, 2, 6, 8, generator=torch.Generator().manual_seed(1))
    expected = viz.overlay(images, maps)
    assert torch.equal(viz.overlay(images.permute(0, 2, 3, 1), maps), expected)
    assert torch.equal(viz.overlay(images.float() / 255, maps), expected)
    assert torch.equal(viz.overlay(images.contiguous(memory_format=torch.channels_last), maps), expected)
    grey = images[:, :1]
    assert torch.equal(viz.overlay(grey, maps), viz.overlay(grey.expand(-1, 3, -1, -1), maps))


def test_maps_of_another_size_are_resized_to_the_photo():
    maps = torch.zeros(2, 1, 2, 2)
    maps[:, :, :, 1] = 1.0
    result = viz.overlay(torch.zeros(2, 3, 6, 8), maps, colormap="hot", opacity=1.0)
    assert result.shape == (2, 1, 6, 8, 3)
    assert result[:, :, :, 0].max() == 0
    assert result[:, :, :, -1].min() == 255


@pytest.mark.parametrize(("count", "targets"), [(0, 2), (2, 0)])
def test_empty_batches(count, targets):
    result = viz.overlay(photos(count), torch.zeros(count, targets, 3, 4))
    assert result.shape == (count, targets, 6, 8, 3)


def test_a_nan_shows_and_stays_where_it_is():
    images, maps = photos(), torch.full((2, 1, 6, 8), 0.5)
    clean = viz.overlay(images, maps)
    maps[0, 0, 2, 3] = float("nan")
    result = viz.overlay(images, maps)
    assert result[0, 0, 2, 3].tolist() == [255, 0, 255]
    result[0, 0, 2, 3] = clean[0, 0, 2, 3]
    assert torch.equal(result, clean)


def test_half_precision_maps_and_gradients_are_accepted():
    maps = torch.rand(2, 1, 6, 8, requires_grad=True)
    exact = viz.overlay(photos(), maps)
    rounded = viz.overlay(photos(), maps.bfloat16())
    assert (exact.int() - rounded.int()).abs().max() <= 8
    assert not exact.requires_grad


@pytest.mark.parametrize(
    ("images", "maps", "options", "message"),
    [
        (photos(), torch.zeros(3, 1, 6, 8), {}, "images: got 2 images for 3"),
        (photos(), torch.zeros(2, 6, 8), {}, "maps: got shape"),
        (photos(), torch.full((2, 1, 6, 8), 3.0), {}, "maps: got values from 3"),
        (torch.randn(2, 3, 6, 8) * 3, torch.zeros(2, 1, 6, 8), {}, "undo the normalisation"),
        (torch.zeros(2, 6, 8, 3), torch.zeros(2, 1, 6, 8), {}, "images: got shape"),
        (torch.zeros(3, 6, 8), torch.zeros(2, 1, 6, 8), {}, "images: got shape"),
        (photos(), torch.zeros(2, 1, 6, 8), {"opacity": 1.5}, "opacity: got 1.5"),
        (photos(), torch.zeros(2, 1, 6, 8), {"colormap": "no such map"}, "colormap: got 'no such map'"),
    ],
)
def test_wrong_values_are_named(images, maps, options, message):
    with pytest.raises(ValueError, match=message):
        viz.overlay(images, maps, **options)


@pytest.mark.parametrize(
    ("images", "maps", "options", "message"),
    [
        (photos().int(), torch.zeros(2, 1, 6, 8), {}, "images: got torch.int32"),
        ([1], torch.zeros(2, 1, 6, 8), {}, "images: got list"),
        (photos(), torch.zeros(2, 1, 6, 8, dtype=torch.uint8), {}, "maps: got torch.uint8"),
        (photos(), torch.zeros(2, 1, 6, 8), {"colormap": 3}, "colormap: got int"),
    ],
)
def test_wrong_types_are_named(images, maps, options, message):
    with pytest.raises(TypeError, match=message):
        viz.overlay(images, maps, **options)


def test_matplotlibs_colormaps_by_name():
    matplotlib = pytest.importorskip("matplotlib")
    result = viz.overlay(torch.zeros(1, 3, 1, 1), torch.ones(1, 1, 1, 1), colormap="viridis", opacity=1.0)
    expected = torch.tensor(matplotlib.colormaps["viridis"](1.0)[:3]) * 255
    assert (result[0, 0, 0, 0].double() - expected).abs().max() <= 0.5


def test_without_matplotlib_the_builtin_colormaps_remain(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert viz.overlay(photos(), torch.zeros(2, 1, 6, 8), colormap="jet").shape == (2, 1, 6, 8, 3)
    with pytest.raises(ImportError, match=r"diffcam_fast\[cli\]"):
        viz.overlay(photos(), torch.zeros(2, 1, 6, 8), colormap="viridis")


# --- the panel --------------------------------------------------------------------------------------------------------


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
    assert torch.equal(tile, viz.overlay(photo[None], maps[None], "hot", 0.7)[0, 0])


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
