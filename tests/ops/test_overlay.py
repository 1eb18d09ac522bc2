"""`overlay` against the float64 reference, and the pictures people know."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

import diffcam_fast as dcf
from diffcam_fast.backends import use_backend
from diffcam_fast.ops.colormaps import color_table
from diffcam_fast.reference import overlay as reference
from diffcam_fast.reference.overlay import BLENDS
from tests.tolerances import MAP_SHARE_OF_RANGE, PIXEL

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OP = torch.ops.diffcam_fast.overlay.default
MAGENTA = [255, 0, 255]


def _with_gaps(values: Tensor) -> Tensor:
    """The same values as every second element of a larger tensor whose other elements are invalid."""
    wide = torch.full([2 * size for size in values.shape], 77 if values.dtype == torch.uint8 else 7, dtype=values.dtype)
    if values.is_floating_point():
        wide.fill_(math.nan)
    return wide[tuple(slice(None, None, 2) for _ in values.shape)].copy_(values)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda values: values.contiguous(),
    "channels last": lambda values: values.contiguous(memory_format=torch.channels_last),
    "gaps": _with_gaps,
    "columns first": lambda values: values.mT.contiguous().mT,
    "expanded": lambda values: values[:1].expand_as(values),
    "one row": lambda values: values[:, :, :1].expand_as(values),
}


def random_images(*shape: int, dtype: torch.dtype = torch.uint8, seed: int = 0) -> Tensor:
    values = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return values if dtype == torch.uint8 else (values.double() / 255).to(dtype)


def random_maps(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_right(
    found: Tensor,
    maps: Tensor,
    images: Tensor,
    table: Tensor,
    opacity: float = 0.5,
    normalize: str | None = "minmax",
    blend: str = "proportional",
) -> None:
    """That a picture is the float64 reference's, but for rounding.

    Args:
        found: uint8 (N, T, H, W, 3).
        maps: (N, T, h, w).
        images: (N, 3, H, W).
        table: (256, 3).
        opacity: as given to `overlay`.
        normalize: as given to `overlay`.
        blend: as given to `overlay`.
    """
    assert found.dtype == torch.uint8 and found.is_contiguous()
    assert found.shape == (*maps.shape[:2], *images.shape[2:], 3)
    if found.numel() == 0:
        return
    pixels = reference.pixel_values(images if images.dtype == torch.uint8 else images.double()).double()
    level = reference.levels(maps.double(), images.shape[2:], normalize or "none", 1e-7)
    # Where a level lies between two colours, rounding decides which of them it takes; where a map is read, too.
    slack = MAP_SHARE_OF_RANGE[torch.float32] + 2 * torch.finfo(torch.float32).eps * max(maps.shape[2:])
    near = [level + step for step in (-slack, 0, slack)]
    for target in range(maps.shape[1]):
        expected = torch.stack(
            [reference.blended(each[:, target], pixels, table.double(), opacity, blend) for each in near]
        ).int()
        mine = found[:, target].int()
        assert (mine >= expected.amin(0) - PIXEL).all() and (mine <= expected.amax(0) + PIXEL).all()


# --- values


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    side = st.sampled_from([1, 2, 3, 7, 16, 17, 33, 65])
    return {
        "images": draw(st.integers(0, 3)),
        "targets": draw(st.integers(0, 3)),
        "map_size": (draw(side), draw(side)),
        "size": None if draw(st.integers(0, 3)) == 0 else (draw(side), draw(side)),
        "map_dtype": draw(st.sampled_from(DTYPES)),
        "image_dtype": draw(st.sampled_from((*DTYPES, torch.uint8))),
        "map_layout": draw(st.sampled_from(sorted(LAYOUTS))),
        "image_layout": draw(st.sampled_from(sorted(LAYOUTS))),
        "normalize": draw(st.sampled_from([None, "max", "minmax"])),
        "blend": draw(st.sampled_from(BLENDS)),
        "opacity": draw(st.sampled_from([0.0, 0.3, 0.5, 1.0])),
        "colormap": draw(st.sampled_from(["jet", "hot"])),
        "seed": draw(st.integers(0, 2**31)),
    }


@given(problem=problems())
def test_agrees_with_float64_reference(cpu_backend: str, torch_threads: int, problem: dict[str, Any]) -> None:
    size = problem["size"] or problem["map_size"]
    maps = random_maps(problem["images"], problem["targets"], *problem["map_size"], seed=problem["seed"])
    maps = LAYOUTS[problem["map_layout"]](maps.to(problem["map_dtype"]))
    images = random_images(problem["images"], 3, *size, dtype=problem["image_dtype"], seed=problem["seed"])
    images = LAYOUTS[problem["image_layout"]](images)
    options = {key: problem[key] for key in ("opacity", "normalize", "blend")}
    found = dcf.overlay(maps, images, colormap=problem["colormap"], layout="NCHW", **options)
    assert_right(found, maps, images, color_table(problem["colormap"]), **options)


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize(
    ("map_size", "size"),
    # Mixtures of the last are too large to be kept until their largest value is known.
    [((7, 7), (224, 224)), ((224, 224), (224, 224)), ((300, 250), (224, 224)), ((9, 8), (270, 310))],
)
def test_sizes_of_real_photos(cpu_backend: str, blend: str, map_size: tuple[int, int], size: tuple[int, int]) -> None:
    maps, images = random_maps(2, 2, *map_size), random_images(2, 3, *size, dtype=torch.float32)
    found = dcf.overlay(maps, images, blend=blend)
    assert_right(found, maps, images, color_table("jet"), blend=blend)


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("count", [1, 3, 8])
def test_same_bits_whatever_the_number_of_threads(blend: str, count: int) -> None:
    """Few maps are cut into parts, many are not."""
    maps, images = random_maps(count, 7, 7), random_images(count, 3, 224, 210, dtype=torch.float32)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            found.append(dcf.overlay(maps, images, blend=blend))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("image_weight", [0.0, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("brightness", [1.0, 0.3, 0.0])
def test_uniform_is_show_cam_on_image(cpu_backend: str, image_weight: float, brightness: float) -> None:
    pytest.importorskip("tests.helpers.torchvision_cpu")
    show_cam_on_image = pytest.importorskip("pytorch_grad_cam.utils.image").show_cam_on_image
    maps = torch.cat([random_maps(2, 40, 30), torch.linspace(0, 1, 1200).reshape(1, 40, 30)])
    images = random_images(3, 40, 30, 3, dtype=torch.float32) * brightness
    if image_weight == 1.0 and brightness == 0.0:
        images += 0.1  # it would divide by zero
    found = dcf.overlay(maps, images, opacity=1 - image_weight, normalize=None, blend="uniform")
    for picture, image, each in zip(found, images, maps, strict=True):
        expected = show_cam_on_image(image.numpy(), each.numpy(), use_rgb=True, image_weight=image_weight)
        difference = np.abs(picture.numpy().astype(int) - expected.astype(int))
        assert difference.max() <= PIXEL


def test_levels_are_those_of_interpolate(cpu_backend: str) -> None:
    """Bilinear, corners not aligned, normalised after resizing: to be seen in grey on black."""
    ramp = torch.linspace(0, 1, 256).unsqueeze(1).expand(-1, 3)
    for map_size, size in (((7, 7), (40, 30)), ((40, 30), (7, 7)), ((5, 30), (40, 30)), ((1, 4), (9, 2))):
        maps, images = random_maps(2, *map_size) * 9 - 3, torch.zeros(2, 3, *size)
        found = dcf.overlay(maps, images, colormap=ramp, opacity=1.0, blend="uniform")
        level = functional.interpolate(maps.double().unsqueeze(1), size, mode="bilinear", align_corners=False)
        low, high = level.amin((2, 3), keepdim=True), level.amax((2, 3), keepdim=True)
        expected = ((level - low) / (high - low) * 255).movedim(1, -1).expand(-1, -1, -1, 3)
        assert (found.double() - expected).abs().max() < 2  # rounded down twice


@pytest.mark.parametrize("level", [0.25, 0.5, 0.75])
def test_heat_is_as_opaque_as_the_map_is_high(cpu_backend: str, level: float) -> None:
    images, opacity = random_images(2, 3, 6, 8), 0.6
    found = dcf.overlay(torch.full((2, 6, 8), level), images, colormap="hot", opacity=opacity, normalize=None)
    color = color_table("hot")[math.floor(level * 255 + 0.5)].double()
    weight = opacity * level
    expected = (1 - weight) * images.permute(0, 2, 3, 1).double() + weight * 255 * color
    # Half for rounding, and colours may be rounded to an eighth.
    assert (found.double() - expected).abs().max() <= 0.65


def test_no_opacity_and_no_evidence_leave_the_photo(cpu_backend: str) -> None:
    images = random_images(2, 3, 6, 8)
    photo = images.permute(0, 2, 3, 1)
    assert torch.equal(dcf.overlay(random_maps(2, 6, 8), images, opacity=0.0), photo)
    assert torch.equal(dcf.overlay(torch.zeros(2, 6, 8), images, opacity=1.0), photo)
    assert torch.equal(dcf.overlay(torch.zeros(2, 3, 4), images, opacity=1.0, normalize=None), photo)


@pytest.mark.parametrize("value", [0.0, 0.7, -5.0, 1e30])
@pytest.mark.parametrize("map_size", [(1, 1), (3, 4), (60, 80)])
def test_a_constant_map_says_nothing_at_any_size(cpu_backend: str, value: float, map_size: tuple[int, int]) -> None:
    """Rounding while resizing must not be magnified."""
    images = random_images(1, 3, 60, 80)
    found = dcf.overlay(torch.full((1, *map_size), value), images, opacity=1.0)
    assert torch.equal(found, images.permute(0, 2, 3, 1))


def test_every_layout_of_images_gives_the_same(cpu_backend: str) -> None:
    images, maps = random_images(2, 3, 6, 8), random_maps(2, 2, 3, 4)
    expected = dcf.overlay(maps, images)
    assert torch.equal(dcf.overlay(maps, images.permute(0, 2, 3, 1)), expected)
    assert torch.equal(dcf.overlay(maps, images.permute(0, 2, 3, 1).contiguous()), expected)
    assert torch.equal(dcf.overlay(maps, images.float() / 255), expected)
    assert torch.equal(dcf.overlay(maps, (images.float() / 255).permute(0, 2, 3, 1)), expected)
    grey = images[:, :1]
    expected = dcf.overlay(maps, grey.expand(-1, 3, -1, -1))
    assert torch.equal(dcf.overlay(maps, grey), expected)
    assert torch.equal(dcf.overlay(maps, grey.permute(0, 2, 3, 1)), expected)


def test_a_layout_decides_where_both_would_do() -> None:
    images, maps = random_images(2, 3, 5, 3), random_maps(2, 5, 3)
    assert dcf.overlay(maps, images).shape == dcf.overlay(maps, images, layout="NCHW").shape == (2, 5, 3, 3)
    found = dcf.overlay(maps, images, layout="NHWC")
    assert found.shape == (2, 3, 5, 3)
    assert torch.equal(found, dcf.overlay(maps, images.permute(0, 3, 1, 2), layout="NCHW"))


def test_one_map_an_image_has_no_target_dimension(cpu_backend: str) -> None:
    images, maps = random_images(2, 3, 6, 8), random_maps(2, 3, 4)
    assert torch.equal(dcf.overlay(maps, images), dcf.overlay(maps.unsqueeze(1), images).squeeze(1))


# --- colormaps


def test_tables_of_colours(cpu_backend: str) -> None:
    images, maps = random_images(2, 3, 6, 8), random_maps(2, 3, 4)
    table = color_table("jet")
    expected = dcf.overlay(maps, images, colormap="jet")
    for same in (table, table.double(), (table * 255).round().to(torch.uint8), table.t().contiguous().t()):
        assert torch.equal(dcf.overlay(maps, images, colormap=same), expected)


def test_jet_is_that_of_opencv() -> None:
    cv2 = pytest.importorskip("cv2")
    levels = np.arange(256, dtype=np.uint8)[:, None]
    expected = torch.from_numpy(cv2.applyColorMap(levels, cv2.COLORMAP_JET)[:, 0, ::-1].astype(np.float32))
    assert torch.equal((color_table("jet") * 255).round(), expected)


def test_matplotlibs_colormaps_by_name(cpu_backend: str) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    for name in ("viridis", "turbo"):
        expected = torch.from_numpy(matplotlib.colormaps[name](np.arange(256))[:, :3])
        assert (color_table(name).double() - expected).abs().max() < 1e-6
        levels = torch.arange(256).reshape(1, 1, 256) / 255.0
        found = dcf.overlay(levels, torch.zeros(1, 3, 1, 256), colormap=name, opacity=1.0, normalize=None)
        expected = expected * torch.arange(256).unsqueeze(1)  # as opaque as the map is high
        assert (found[0, 0].double() - expected).abs().max() <= PIXEL


def test_without_matplotlib_the_builtin_colormaps_remain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    images, maps = random_images(2, 3, 6, 8), random_maps(2, 3, 4)
    for name in ("jet", "hot"):
        assert dcf.overlay(maps, images, colormap=name).shape == (2, 6, 8, 3)
    with pytest.raises(ImportError, match=r"diffcam_fast\[cli\]"):
        dcf.overlay(maps, images, colormap="cividis")


def test_a_table_handed_out_may_be_changed() -> None:
    images, maps = random_images(1, 3, 6, 8), random_maps(1, 3, 4)
    expected = dcf.overlay(maps, images)
    color_table("jet").zero_()
    assert torch.equal(dcf.overlay(maps, images), expected)


# --- edges


@pytest.mark.parametrize("blend", BLENDS)
def test_a_nan_shows_and_stays_where_it_is(cpu_backend: str, blend: str) -> None:
    images, maps = random_images(2, 3, 6, 40), torch.full((2, 6, 40), 0.5)
    maps[1, 2, 3] = 0.0
    clean = dcf.overlay(maps, images, normalize=None, blend=blend)
    maps[1, 2, 3] = math.nan
    found = dcf.overlay(maps, images, normalize=None, blend=blend)
    assert found[1, 2, 3].tolist() == MAGENTA
    found[1, 2, 3] = clean[1, 2, 3]
    assert torch.equal(found, clean)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("map_size", [(6, 40), (3, 4)])
def test_a_map_that_is_not_finite_leaves_others_alone(
    cpu_backend: str, value: float, map_size: tuple[int, int]
) -> None:
    images, maps = random_images(2, 3, 6, 40), random_maps(2, 2, *map_size)
    clean = dcf.overlay(maps, images)
    maps[0, 1, 1, 1] = value
    found = dcf.overlay(maps, images)
    assert (found[0, 1] == torch.tensor(MAGENTA)).all(-1).any()
    if math.isnan(value):
        assert (found[0, 1] == torch.tensor(MAGENTA)).all()
    assert torch.equal(found[1], clean[1]) and torch.equal(found[0, 0], clean[0, 0])


def test_a_pixel_that_is_nan_is_black(cpu_backend: str) -> None:
    for dtype in DTYPES:
        images, maps = random_images(1, 3, 6, 40, dtype=dtype), random_maps(1, 3, 4)
        images[0, :, 1, 2] = 0.0
        expected = dcf.overlay(maps, images)
        images[0, :, 1, 2] = math.nan
        assert torch.equal(dcf.overlay(maps, images), expected)


@pytest.mark.parametrize("blend", BLENDS)
def test_a_black_picture_stays_black(cpu_backend: str, blend: str) -> None:
    found = dcf.overlay(torch.zeros(1, 3, 4), torch.zeros(1, 3, 6, 8), colormap="hot", blend=blend)
    assert not found.any()


@pytest.mark.parametrize(("count", "targets", "size"), [(0, 2, (6, 8)), (2, 0, (6, 8)), (2, 1, (0, 8)), (2, 1, (6, 0))])
def test_empty(cpu_backend: str, count: int, targets: int, size: tuple[int, int]) -> None:
    found = dcf.overlay(torch.zeros(count, targets, 3, 4), random_images(count, 3, *size))
    assert found.shape == (count, targets, *size, 3)


def test_inputs_stay_as_they_are(cpu_backend: str) -> None:
    maps, images = (
        random_maps(2, 3, 4).requires_grad_(),
        random_images(2, 3, 6, 8, dtype=torch.float32).requires_grad_(),
    )
    before = maps.detach().clone(), images.detach().clone()
    found = dcf.overlay(maps, images)
    assert not found.requires_grad
    assert torch.equal(maps, before[0]) and torch.equal(images, before[1])
    with torch.inference_mode():
        assert torch.equal(dcf.overlay(maps, images), found)


@pytest.mark.parametrize(
    ("maps", "images", "options", "message"),
    [
        ((3, 6, 8), (2, 3, 6, 8), {}, r"maps: expected maps of 2 images; got \(3, 6, 8\)"),
        ((6, 8), (2, 3, 6, 8), {}, r"maps: expected shape \(N, h, w\) or \(N, T, h, w\); got \(6, 8\)"),
        ((2, 0, 8), (2, 3, 6, 8), {}, "maps: expected at least one position"),
        ((2, 6, 8), (2, 4, 6, 8), {}, r"images: expected shape \(N, 3, H, W\) or \(N, H, W, 3\).*got \(2, 4, 6, 8\)"),
        ((2, 6, 8), (3, 6, 8), {}, r"images: expected shape .*got \(3, 6, 8\)"),
        ((2, 6, 8), (2, 6, 8, 3), {"layout": "NCHW"}, r"images: expected shape \(N, 3, H, W\), or"),
        ((2, 6, 8), (2, 3, 6, 8), {"layout": "NHWC"}, r"images: expected shape \(N, H, W, 3\), or"),
        ((2, 6, 8), (2, 3, 6, 8), {"layout": "CHW"}, "layout: expected None, 'NCHW' or 'NHWC'; got 'CHW'"),
        ((2, 6, 8), (2, 3, 6, 8), {"opacity": 1.5}, "opacity: expected a number from 0 to 1; got 1.5"),
        ((2, 6, 8), (2, 3, 6, 8), {"opacity": math.nan}, "opacity: expected a number from 0 to 1; got nan"),
        ((2, 6, 8), (2, 3, 6, 8), {"eps": 0}, "eps: expected a positive number; got 0"),
        ((2, 6, 8), (2, 3, 6, 8), {"normalize": "none"}, "normalize: expected None, 'max' or 'minmax'; got 'none'"),
        ((2, 6, 8), (2, 3, 6, 8), {"blend": "even"}, "blend: expected one of proportional, uniform; got 'even'"),
        ((2, 6, 8), (2, 3, 6, 8), {"colormap": "no such map"}, "colormap: expected .*; got 'no such map'"),
        ((2, 6, 8), (2, 3, 6, 8), {"colormap": torch.zeros(256, 4)}, r"colormap: expected shape \(256, 3\)"),
        ((2, 6, 8), (2, 3, 6, 8), {"colormap": torch.full((256, 3), 255.0)}, "colormap: expected values from 0 to 1"),
    ],
)
def test_wrong_values_are_named(
    maps: tuple[int, ...], images: tuple[int, ...], options: dict[str, Any], message: str
) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match=message):
        dcf.overlay(torch.zeros(maps), torch.zeros(images), **options)


@pytest.mark.parametrize(
    ("maps", "images", "options", "message"),
    [
        ([1], torch.zeros(2, 3, 6, 8), {}, "maps: expected a torch.Tensor; got list"),
        (torch.zeros(2, 6, 8).int(), torch.zeros(2, 3, 6, 8), {}, "maps: expected dtype float32.*; got int32"),
        (torch.zeros(2, 6, 8), None, {}, "images: expected a torch.Tensor; got NoneType"),
        (torch.zeros(2, 6, 8), torch.zeros(2, 3, 6, 8).int(), {}, "images: expected dtype .* or uint8; got int32"),
        (torch.zeros(2, 6, 8), torch.zeros(2, 3, 6, 8), {"colormap": 3}, "colormap: expected the name .*; got int"),
        (torch.zeros(2, 6, 8), torch.zeros(2, 3, 6, 8), {"opacity": "1"}, "opacity: expected a number; got str"),
        (
            torch.zeros(2, 6, 8),
            torch.zeros(2, 3, 6, 8),
            {"colormap": torch.zeros(256, 3).int()},
            "colormap: expected dtype .* or uint8; got int32",
        ),
    ],
)
def test_wrong_types_are_named(maps: Any, images: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        dcf.overlay(maps, images, **options)


def test_devices_must_agree() -> None:
    images, maps = torch.zeros(2, 3, 6, 8), torch.zeros(2, 6, 8)
    with pytest.raises(ValueError, match="maps: expected the device of images, cpu; got meta"):
        dcf.overlay(maps.to("meta"), images)
    with pytest.raises(ValueError, match="colormap: expected the device of maps, cpu; got meta"):
        dcf.overlay(maps, images, colormap=torch.zeros(256, 3, device="meta"))


def test_values_out_of_range_are_refused() -> None:
    images, maps = torch.rand(2, 3, 6, 8), torch.rand(2, 6, 8)
    with pytest.raises(ValueError, match=r"images: expected values from 0 to 1 \(pixels as .*\); got -3 to "):
        dcf.overlay(maps, images.clone().index_fill_(3, torch.tensor([1]), -3.0))
    high = maps.clone().index_fill_(2, torch.tensor([1]), 3.0)
    with pytest.raises(ValueError, match=r"maps: expected values from 0 to 1 \(or normalize='minmax'\); got .* to 3$"):
        dcf.overlay(high, images, normalize=None)
    dcf.overlay(high, images)
    high[0, 0, 0] = math.nan  # not a reason to refuse, and not one to accept
    with pytest.raises(ValueError, match="maps: expected values from 0 to 1"):
        dcf.overlay(high, images, normalize=None)
    dcf.overlay(torch.full_like(maps, math.nan), images, normalize=None)


def test_op_called_directly_refuses_what_it_cannot_read(cpu_backend: str) -> None:
    options = (0.5, "none", "proportional", 1e-7)
    maps, images, table = torch.zeros(2, 1, 3, 4), torch.zeros(2, 3, 6, 8), color_table("jet")
    if cpu_backend == "reference":
        pytest.skip("PyTorch checks what it indexes")
    for wrong in (
        (maps[:1], images, table),
        (maps, images[:, :1], table),
        (maps, images, table[:255]),
        (maps, images, table.double()),
        (maps[..., :0], images, table),
        (maps.int(), images, table),
        (maps, images.int(), table),
    ):
        with pytest.raises(RuntimeError):
            OP(*wrong, *options)
    for wrong_options in ((2.0, *options[1:]), (0.5, "no", *options[2:]), (0.5, "none", "no", 1e-7)):
        with pytest.raises(RuntimeError):
            OP(maps, images, table, *wrong_options)


# --- torch.library and torch.compile


@pytest.fixture(params=("auto", "reference"))
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """What serves by default, and the reference; for what no instruction set can change."""
    with use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("blend", BLENDS)
def test_opcheck(backend: str, blend: str) -> None:
    table = color_table("jet")
    for maps, images in (
        (random_maps(2, 3, 4, 5), random_images(2, 3, 6, 8)),
        (
            random_maps(2, 3, 5, 4, dtype=torch.bfloat16).mT,
            random_images(2, 6, 8, 3, dtype=torch.float32).permute(0, 3, 1, 2),
        ),
        (random_maps(0, 3, 4, 5), random_images(0, 3, 6, 8)),
    ):
        torch.library.opcheck(OP, (maps, images, table, 0.5, "minmax", blend, 1e-7))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic: bool) -> None:
    torch._dynamo.reset()
    table = color_table("hot")

    def draw(maps: Tensor, images: Tensor) -> Tensor:
        first = dcf.overlay(maps * 2, images / 2, blend="uniform")
        return first // 2 + dcf.overlay(maps, images, colormap=table, normalize=None) // 2

    compiled = torch.compile(draw, fullgraph=True, dynamic=dynamic)
    for count, size in ((2, 6), (5, 9)) if dynamic else ((2, 6),):
        maps, images = random_maps(count, 3, 4), random_images(count, 3, size, 8, dtype=torch.float32)
        assert (compiled(maps, images).int() - draw(maps, images).int()).abs().max() <= PIXEL
