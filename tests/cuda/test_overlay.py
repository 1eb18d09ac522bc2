"""The CUDA kernels of overlay, run as host code."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffcam_fast.ops.colormaps import color_table
from diffcam_fast.reference.overlay import BLENDS
from tests.cuda_host import Device, build_op, load, ops
from tests.ops.test_overlay import DTYPES, LAYOUTS, assert_right, random_images, random_maps

JET = color_table("jet")
MAGENTA = torch.tensor([255, 0, 255], dtype=torch.uint8)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return load(build_op("overlay"))


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    side = st.sampled_from([1, 2, 3, 7, 16, 17, 40])
    return {
        "images": draw(st.integers(1, 3)),
        "targets": draw(st.integers(1, 3)),
        "map_size": (draw(side), draw(side)),
        "size": None if draw(st.integers(0, 3)) == 0 else (draw(side), draw(side)),
        "map_dtype": draw(st.sampled_from(DTYPES)),
        "image_dtype": draw(st.sampled_from((*DTYPES, torch.uint8))),
        "map_layout": draw(st.sampled_from(sorted(LAYOUTS))),
        "image_layout": draw(st.sampled_from(sorted(LAYOUTS))),
        "offset": draw(st.integers(0, 2)),
        "options": {
            "normalize": draw(st.sampled_from(["none", "max", "minmax"])),
            "blend": draw(st.sampled_from(BLENDS)),
            "opacity": draw(st.sampled_from([0.0, 0.3, 1.0])),
        },
        "device": Device(draw(st.sampled_from([80, 90, 100])), seed=draw(st.integers(0, 2**31))),
        "seed": draw(st.integers(0, 2**31)),
    }


@given(problem=problems())
@settings(max_examples=100)
def test_agrees_with_float64_reference(library: ctypes.CDLL, problem: dict[str, Any]) -> None:
    size = problem["size"] or problem["map_size"]
    maps = random_maps(problem["images"], problem["targets"], *problem["map_size"], seed=problem["seed"])
    maps = LAYOUTS[problem["map_layout"]](maps.to(problem["map_dtype"]))
    # Not at the beginning of its memory, which decides how wide it is read.
    offset = problem["offset"]
    images = random_images(problem["images"] + offset, 3, *size, dtype=problem["image_dtype"], seed=problem["seed"])
    images = LAYOUTS[problem["image_layout"]](images)[offset:]
    found = ops.overlay(library, problem["device"], maps, images, JET, **problem["options"])
    assert_right(found, maps, images, JET, **problem["options"])


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("size", [(96, 90), (67, 125)])
def test_parts_of_a_map_share_what_they_find(library: ctypes.CDLL, blend: str, size: tuple[int, int]) -> None:
    """More than one block a map, with whole groups of pixels at its end or not."""
    maps, images = random_maps(2, 2, 7, 5), random_images(2, 3, *size, dtype=torch.float32)
    first = ops.overlay(library, Device(seed=1), maps, images, JET, blend=blend)
    assert_right(first, maps, images, JET, blend=blend)
    for seed in (2, 3):
        assert torch.equal(ops.overlay(library, Device(seed=seed), maps, images, JET, blend=blend), first)


@pytest.mark.parametrize(
    ("options", "launches"),
    [
        ({"normalize": "none"}, 1),
        ({}, 2),
        ({"blend": "uniform", "normalize": "none"}, 2),
        ({"blend": "uniform"}, 3),
    ],
)
def test_launches(library: ctypes.CDLL, options: dict[str, str], launches: int) -> None:
    ops.overlay(library, Device(), random_maps(2, 1, 3, 4), random_images(2, 3, 6, 8), JET, **options)
    assert library.shim_launches() == launches


@pytest.mark.parametrize("size", [(6, 8), (3, 5)])
def test_every_byte_is_written(library: ctypes.CDLL, size: tuple[int, int]) -> None:
    maps, images = random_maps(2, 2, 3, 4), random_images(2, 3, *size)
    found = [ops.overlay(library, Device(), maps, images, JET, unwritten=value) for value in (0, 255)]
    assert torch.equal(*found)


def test_a_constant_map_says_nothing(library: ctypes.CDLL) -> None:
    images = random_images(1, 3, 30, 40)
    for dtype in DTYPES:
        maps = torch.full((1, 1, 3, 4), 0.7, dtype=dtype)
        found = ops.overlay(library, Device(), maps, images, JET, opacity=1.0)
        assert torch.equal(found[:, 0], images.permute(0, 2, 3, 1))


def test_a_map_that_is_not_a_number_leaves_others_alone(library: ctypes.CDLL) -> None:
    maps, images = random_maps(2, 2, 3, 4), random_images(2, 3, 6, 8)
    clean = ops.overlay(library, Device(), maps, images, JET)
    maps[0, 1, 1, 1] = torch.nan
    found = ops.overlay(library, Device(), maps, images, JET)
    assert (found[0, 1] == MAGENTA).all()
    assert torch.equal(found[1], clean[1]) and torch.equal(found[0, 0], clean[0, 0])
    shown = ops.overlay(library, Device(), maps, images, JET, normalize="none", blend="uniform")[0, 1]
    assert 0 < (shown == MAGENTA).all(-1).sum() < 6 * 8


def test_a_pixel_that_is_nan_is_black(library: ctypes.CDLL) -> None:
    for dtype in DTYPES:
        images, maps = random_images(1, 3, 6, 8, dtype=dtype), random_maps(1, 1, 3, 4)
        images[0, :, 1, 2] = 0.0
        expected = ops.overlay(library, Device(), maps, images, JET)
        images[0, :, 1, 2] = torch.nan
        assert torch.equal(ops.overlay(library, Device(), maps, images, JET), expected)


def test_a_black_picture_stays_black(library: ctypes.CDLL) -> None:
    found = ops.overlay(
        library, Device(), torch.zeros(1, 1, 3, 4), torch.zeros(1, 3, 6, 8), color_table("hot"), blend="uniform"
    )
    assert not found.any()


@pytest.mark.parametrize("shape", [(0, 2, 6, 8), (2, 0, 6, 8), (2, 1, 0, 8)])
def test_nothing_to_draw_launches_nothing(library: ctypes.CDLL, shape: tuple[int, ...]) -> None:
    images, targets, height, width = shape
    found = ops.overlay(
        library, Device(), torch.zeros(images, targets, 3, 4), torch.zeros(images, 3, height, width), JET
    )
    assert found.numel() == 0 and library.shim_launches() == 0
