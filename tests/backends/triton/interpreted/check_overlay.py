"""`overlay` in Triton's interpreter against the float64 reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from diffcam_fast.backends.triton import overlay as kernels
from diffcam_fast.backends.triton.overlay import overlay
from diffcam_fast.ops.colormaps import color_table
from diffcam_fast.reference.overlay import BLENDS
from tests.ops.test_overlay import LAYOUTS, assert_right, problems, random_images, random_maps
from tests.tolerances import PIXEL

pytestmark = pytest.mark.usefixtures("poisoned_memory")

JET = color_table("jet")
MAGENTA = torch.tensor([255, 0, 255], dtype=torch.uint8)


@settings(max_examples=60)
@given(problem=problems())
def test_agrees_with_float64_reference(problem: dict[str, Any]) -> None:
    size = problem["size"] or problem["map_size"]
    maps = random_maps(problem["images"], problem["targets"], *problem["map_size"], seed=problem["seed"])
    maps = LAYOUTS[problem["map_layout"]](maps.to(problem["map_dtype"]))
    images = random_images(problem["images"], 3, *size, dtype=problem["image_dtype"], seed=problem["seed"])
    images = LAYOUTS[problem["image_layout"]](images)
    options = {"opacity": problem["opacity"], "normalize": problem["normalize"] or "none", "blend": problem["blend"]}
    found = overlay(maps, images, JET, *options.values(), 1e-7)
    assert_right(found, maps, images, JET, **options)


@pytest.mark.parametrize("blend", BLENDS)
def test_several_parts_and_steps(monkeypatch: pytest.MonkeyPatch, blend: str) -> None:
    """Maps in many parts, and parts of many steps, whose last lie beyond the picture's end."""
    maps, images = random_maps(2, 2, 7, 5), random_images(2, 3, 61, 50, dtype=torch.float32)
    whole = overlay(maps, images, JET, 0.5, "minmax", blend, 1e-7)
    assert_right(whole, maps, images, JET, blend=blend)
    for size, most in ((64, 64), (64, 4)):
        monkeypatch.setattr(kernels, "_BLOCK", size)
        monkeypatch.setattr(kernels, "_MOST_PARTS", most)
        assert torch.equal(overlay(maps, images, JET, 0.5, "minmax", blend, 1e-7), whole)


def test_a_constant_map_says_nothing() -> None:
    images = random_images(1, 3, 30, 40)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        found = overlay(torch.full((1, 1, 3, 4), 0.7, dtype=dtype), images, JET, 1.0, "minmax", "proportional", 1e-7)
        assert torch.equal(found[:, 0], images.permute(0, 2, 3, 1))


def test_nan_shows_and_stays_where_it_is() -> None:
    maps, images = random_maps(2, 2, 6, 8), random_images(2, 3, 6, 8, dtype=torch.float32)
    for blend in BLENDS:
        maps[0, 1, 2, 3] = 0.0
        clean = overlay(maps, images, JET, 0.5, "none", blend, 1e-7)
        maps[0, 1, 2, 3] = math.nan
        found = overlay(maps, images, JET, 0.5, "none", blend, 1e-7)
        assert torch.equal(found[0, 1, 2, 3], MAGENTA)
        found[0, 1, 2, 3] = clean[0, 1, 2, 3]
        assert (found.int() - clean.int()).abs().max() <= PIXEL
        for normalize in ("max", "minmax"):
            found = overlay(maps, images, JET, 0.5, normalize, blend, 1e-7)
            assert (found[0, 1] == MAGENTA).all()
            assert not (found == MAGENTA).all(-1)[1].any() and not (found == MAGENTA).all(-1)[0, 0].any()
    images[1, :, 1, 1] = 0.0
    black = overlay(maps, images, JET, 0.5, "minmax", "uniform", 1e-7)
    images[1, :, 1, 1] = math.nan
    assert torch.equal(overlay(maps, images, JET, 0.5, "minmax", "uniform", 1e-7), black)


def test_a_black_picture_stays_black() -> None:
    found = overlay(
        torch.zeros(1, 1, 3, 4), torch.zeros(1, 3, 6, 8), color_table("hot"), 0.5, "minmax", "uniform", 1e-7
    )
    assert not found.any()


@pytest.mark.parametrize("shape", [(0, 2, 6, 8), (2, 0, 6, 8), (2, 1, 0, 8)])
def test_empty(shape: tuple[int, ...]) -> None:
    count, targets, *size = shape
    found = overlay(
        torch.zeros(count, targets, 3, 4), torch.zeros(count, 3, *size), JET, 0.5, "minmax", "uniform", 1e-7
    )
    assert found.shape == (count, targets, *size, 3) and found.dtype == torch.uint8
