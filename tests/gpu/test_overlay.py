"""`overlay` on a GPU, every backend, against the float64 reference on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from diffcam_fast.ops.colormaps import color_table
from diffcam_fast.reference import overlay as reference
from tests.gpu.cases import BACKENDS, DEVICE, Failures, each, forced, generator, poisoned_memory
from tests.gpu.problems import LAYOUTS
from tests.tolerances import MAP_SHARE_OF_RANGE, PIXEL

OP = torch.ops.diffcam_fast.overlay.default
EPS = 1e-7

#: Images, targets, size of the maps, size of the images.
SIZES = (
    (2, 1, (7, 7), (224, 224)),
    (1, 3, (14, 14), (61, 33)),
    (2, 2, (56, 56), (17, 16)),
    (3, 1, (1, 5), (9, 65)),
    (1, 1, (50, 41), (50, 41)),
    (70, 2, (7, 7), (32, 32)),
)


def _compare(
    failures: Failures, found: Tensor, maps: Tensor, images: Tensor, options: tuple[Tensor, float, str, str], what: str
) -> None:
    """Every value between those of levels a little lower and a little higher, where rounding chooses a colour."""
    table, opacity, normalize, blend = options
    expected_shape = (*maps.shape[:2], *images.shape[2:], 3)
    failures.check(found.dtype == torch.uint8 and found.is_contiguous(), f"{what}: {found.dtype} {found.stride()}")
    failures.check(found.shape == expected_shape, f"{what}: shape {tuple(found.shape)}")
    if found.shape != expected_shape:
        return
    pixels = reference.pixel_values(images if images.dtype == torch.uint8 else images.double()).double()
    level = reference.levels(maps.double(), images.shape[2:], normalize, EPS)
    slack = MAP_SHARE_OF_RANGE[torch.float32] + 2 * torch.finfo(torch.float32).eps * max(maps.shape[2:])
    for target in range(maps.shape[1]):
        near = [
            reference.blended(level[:, target] + step, pixels, table.double(), opacity, blend).int()
            for step in (-slack, 0, slack)
        ]
        low, high = torch.stack(near).amin(0) - PIXEL, torch.stack(near).amax(0) + PIXEL
        mine = found[:, target].cpu().int()
        off = ((mine < low) | (mine > high)).sum().item()
        failures.check(off == 0, f"{what}: {off} of {mine.numel()} values are off")


@each(backend=BACKENDS, blend=reference.BLENDS, image_dtype=(torch.float32, torch.bfloat16, torch.uint8))
def test_agrees_with_float64_reference(backend: str, blend: str, image_dtype: torch.dtype) -> None:
    failures = Failures()
    layouts = list(LAYOUTS)
    with forced(backend), poisoned_memory(), torch.no_grad():
        for index, (count, targets, map_size, size) in enumerate(SIZES):
            for turn, normalize in enumerate(("minmax", "max", "none")):
                map_dtype = (torch.float32, torch.float64, torch.float16)[(index + turn) % 3]
                layout = layouts[(index + turn) % 3]
                maps = torch.rand(count, targets, *map_size, generator=generator(index)).to(map_dtype)
                images = torch.randint(0, 256, (count, 3, *size), generator=generator(turn), dtype=torch.uint8)
                images = images if image_dtype == torch.uint8 else (images / 255).to(image_dtype)
                table, opacity = color_table("jet"), (0.5, 1.0, 0.0)[turn]
                if layout == "strided" and image_dtype == torch.uint8:
                    layout = "channels-last"
                on_device = LAYOUTS[layout](images.to(DEVICE))
                found = OP(maps.to(DEVICE), on_device, table.to(DEVICE), opacity, normalize, blend, EPS)
                what = f"{count}, {targets}, {map_size} on {size}, {normalize}, {layout}, {map_dtype}"
                _compare(failures, found, maps, images, (table, opacity, normalize, blend), what)
    failures.report()


@each(backend=BACKENDS, blend=reference.BLENDS)
def test_same_bits_from_run_to_run(backend: str, blend: str) -> None:
    failures = Failures()
    with forced(backend), torch.no_grad():
        maps = torch.rand(5, 2, 7, 7, generator=generator(0)).to(DEVICE)
        images = torch.rand(5, 3, 224, 224, generator=generator(1)).to(DEVICE)
        arguments = (maps, images, color_table("jet").to(DEVICE), 0.5, "minmax", blend, EPS)
        first = OP(*arguments)
        for _ in range(10):
            failures.same(OP(*arguments), first, blend)
    failures.report()


@each(backend=BACKENDS, blend=reference.BLENDS)
def test_nan_is_magenta_in_its_own_picture(backend: str, blend: str) -> None:
    failures = Failures()
    with forced(backend), torch.no_grad():
        maps = torch.rand(3, 2, 7, 7, generator=generator(0))
        images = torch.rand(3, 3, 32, 32, generator=generator(1)).to(DEVICE)
        table = color_table("jet").to(DEVICE)
        clean = OP(maps.to(DEVICE), images, table, 0.5, "minmax", blend, EPS)
        maps[1, 0, 3, 3] = float("nan")
        found = OP(maps.to(DEVICE), images, table, 0.5, "minmax", blend, EPS)
        magenta = torch.tensor(reference.INVALID_COLOR, dtype=torch.uint8).expand(32, 32, 3)
        failures.same(found[1, 0], magenta, "the picture with NaN")
        failures.same(found[[0, 2]], clean[[0, 2]], "other images")
        failures.same(found[1, 1], clean[1, 1], "the other target")
    failures.report()
