"""The compiled `overlay` beside pytorch-grad-cam's `show_cam_on_image`, PyTorch with matplotlib, and torch.compile."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

import diffcam_fast as dcf
from benchmarks.report import Bar, Column, Report, Row, Table
from benchmarks.speed.measure import (
    QUICK,
    Candidate,
    Effort,
    beside,
    compare,
    compiled,
    require_compiled,
    thread_counts,
    threads,
)
from diffcam_fast.ops.colormaps import color_table
from diffcam_fast.reference.overlay import overlay as reference_overlay

#: The share of a picture's values that may differ from the float64 reference by more than 1 of 255: where a level
#: lies between two colours, rounding decides which of them it takes.
SHARE_OFF = 1e-4

#: Our time by a loop of `show_cam_on_image`: at least five times faster.
SHOW_LIMIT = 0.2

COMPARED = {
    "show": "show_cam_on_image",
    "matplotlib": "PyTorch and matplotlib",
    "compile": "torch.compile",
    "eager": "eager",
}

INTRODUCTION = """\
One call of `diffcam_fast.overlay` for a batch of images and a map of each, jet, opacity 0.5, checks included.
*uniform* is the mix of pytorch-grad-cam's `show_cam_on_image`, which is called for one image after the other, as it
asks for; *proportional* is ours, and beside it stands what one would write with PyTorch and a colormap of
matplotlib. Maps smaller than the images are resized and normalised: beside ours by PyTorch, for the whole batch.
*vs ...*: our median time by theirs; **below 1 we are faster**. torch.compile and eager run the reference
implementation. Candidates alternate in one process, each run once right before it is timed; each was checked against
the float64 reference before it was timed."""


@dataclass(frozen=True)
class Case:
    """One row of the results."""

    images: int
    size: int
    map_size: int
    layout: str
    dtype: torch.dtype
    blend: str
    threads: int

    @property
    def normalize(self) -> str:
        """Maps of the image's size are levels already, as `show_cam_on_image` takes them."""
        return "none" if self.map_size == self.size else "minmax"

    def columns(self) -> Row:
        """The case as columns of a row."""
        return {
            "images": self.images,
            "size": self.size,
            "map_size": self.map_size,
            "layout": self.layout,
            "dtype": str(self.dtype).removeprefix("torch."),
            "blend": self.blend,
            "threads": self.threads,
        }


def cases(quick: bool) -> list[Case]:
    """What is measured."""
    count = thread_counts()[-1]
    if quick:
        return [
            Case(2, 64, 64, "NHWC", torch.float32, "uniform", 1),
            Case(2, 64, 7, "NCHW", torch.uint8, "proportional", 1),
        ]
    found = []
    for images, size, map_size in ((1, 224, 7), (32, 224, 7), (32, 224, 224), (4, 1024, 32)):
        for blend in ("uniform", "proportional"):
            found.append(Case(images, size, map_size, "NHWC", torch.float32, blend, count))
        found.append(Case(images, size, map_size, "NCHW", torch.float32, "proportional", count))
        found.append(Case(images, size, map_size, "NHWC", torch.uint8, "proportional", count))
    return found


class Inputs:
    """Maps (N, h, w) and images of a case, and the pictures that are right."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(0)
        side, small = case.size, case.map_size
        self.case = case
        self.maps = torch.rand(case.images, small, small, generator=generator)
        images = torch.randint(0, 256, (case.images, 3, side, side), generator=generator, dtype=torch.uint8)
        images = images if case.dtype == torch.uint8 else images.float() / 255
        self.images = images.permute(0, 2, 3, 1).contiguous() if case.layout == "NHWC" else images
        #: (N, 3, H, W), as the reference takes it.
        self.canonical = self.images.permute(0, 3, 1, 2) if case.layout == "NHWC" else images
        self.table = color_table("jet")
        exact = images if case.dtype == torch.uint8 else images.double()
        self.expected = reference_overlay(self.maps.double().unsqueeze(1), exact, self.table, *self.options).squeeze(1)

    @property
    def options(self) -> tuple[Any, ...]:
        """Arguments of the reference after the table."""
        return (0.5, self.case.normalize, self.case.blend, 1e-7)

    def error(self, found: Tensor | list[np.ndarray]) -> float:
        """The share of values that are off by more than 1."""
        pictures = found if isinstance(found, Tensor) else torch.from_numpy(np.stack(found))
        pictures = pictures.reshape(self.expected.shape)
        return ((pictures.int() - self.expected.int()).abs() > 1).double().mean().item()

    def levels(self) -> Tensor:
        """The maps at the images' size, from 0 to 1."""
        if self.case.normalize == "none":
            return self.maps
        size = (self.case.size, self.case.size)
        maps = functional.interpolate(self.maps.unsqueeze(1), size, mode="bilinear", align_corners=False).squeeze(1)
        low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
        return (maps - low) / (high - low + 1e-7)


def ours(inputs: Inputs) -> Candidate:
    """The op, with the check of its results."""
    normalize = None if inputs.case.normalize == "none" else inputs.case.normalize
    options: dict[str, Any] = {"normalize": normalize, "blend": inputs.case.blend, "layout": inputs.case.layout}
    return Candidate(lambda copy: dcf.overlay(inputs.maps, inputs.images, **options), inputs.error, SHARE_OFF)


def competitors(inputs: Inputs) -> dict[str, Candidate]:
    """What a user could write instead, where it is installed, and the reference, with the same check."""
    arguments = (inputs.maps.unsqueeze(1), inputs.canonical, inputs.table, *inputs.options)
    fast = compiled(reference_overlay, *arguments)
    found: dict[str, Callable[[int], Any] | None] = {
        "show": _show_cam_on_image(inputs) if inputs.case.blend == "uniform" else None,
        "matplotlib": _matplotlib(inputs) if inputs.case.blend == "proportional" else None,
        "compile": lambda copy: fast(*arguments),
        "eager": lambda copy: reference_overlay(*arguments),
    }
    return {name: Candidate(run, inputs.error, SHARE_OFF) for name, run in found.items() if run is not None}


def _show_cam_on_image(inputs: Inputs) -> Callable[[int], Any] | None:
    if inputs.case.dtype == torch.uint8 or inputs.case.layout != "NHWC":
        return None  # it takes neither
    try:
        # Beside a CPU build of PyTorch, torchvision does not load without.
        importlib.import_module("tests.helpers.torchvision_cpu")
        show_cam_on_image = importlib.import_module("pytorch_grad_cam.utils.image").show_cam_on_image
    except ImportError:
        return None
    images = list(inputs.images.numpy())

    def run(copy: int) -> list[np.ndarray]:
        maps = inputs.levels().numpy()
        return [show_cam_on_image(image, each, use_rgb=True) for image, each in zip(images, maps, strict=True)]

    return run


def _matplotlib(inputs: Inputs) -> Callable[[int], Any] | None:
    try:
        from matplotlib.colors import ListedColormap
    except ImportError:
        return None
    colormap = ListedColormap(inputs.table.numpy())  # jet as ours, so that the same is drawn
    byte = inputs.case.dtype == torch.uint8

    def run(copy: int) -> Tensor:
        level = inputs.levels()
        color = torch.from_numpy(colormap((level * 255).round().int().numpy())[..., :3]).float()
        pixels = inputs.canonical.permute(0, 2, 3, 1)
        pixels = pixels / 255 if byte else pixels
        return (torch.lerp(pixels, color, 0.5 * level.unsqueeze(-1)) * 255).round().to(torch.uint8)

    return run


def measure(case: Case, effort: Effort) -> Row:
    """One row. The number of threads is set already."""
    inputs = Inputs(case)
    timings, errors = compare(
        {"ours": ours(inputs), **competitors(inputs)}, what=_label(case.columns()), warm=True, effort=effort
    )
    mine = timings["ours"]
    row = {**case.columns(), "rounds": mine.rounds, "error": errors["ours"], **mine.milliseconds()}
    return row | beside(timings, errors, COMPARED)


def run(quick: bool = False) -> Report:
    """Measure everything, or for `quick` two small cases in a few rounds.

    Raises:
        NotCompiled: the reference serves.
        WrongResult: somebody's pictures are wrong.
    """
    require_compiled("overlay")
    found = []
    with torch.no_grad():
        for case in tqdm(cases(quick), desc="overlay", disable=None):
            with threads(case.threads):
                found.append(measure(case, QUICK if quick else Effort(seconds=1.0)))
    return report(found)


def report(found: list[Row]) -> Report:
    """The rows as a report, with the tables and the bars."""
    columns = [
        Column("maps", "map_size"),
        Column("layout", "layout"),
        Column("dtype", "dtype"),
        Column("blend", "blend"),
        Column("ms", "ms", ".3g"),
        Column("p20", "ms_p20", ".3g"),
        Column("p80", "ms_p80", ".3g"),
    ]
    for name, title in COMPARED.items():
        columns += [Column(f"{title} ms", f"{name}_ms", ".3g"), Column(f"vs {title}", f"vs_{name}", ".3f")]
    shapes = dict.fromkeys((row["images"], row["size"]) for row in found)
    return Report(
        name="overlay",
        title="overlay",
        introduction=f"{INTRODUCTION} {found[0]['threads']} threads.",
        rows=found,
        tables=[
            Table(
                f"{images} images of {size} x {size} pixels" if images > 1 else f"One image of {size} x {size} pixels",
                [row for row in found if (row["images"], row["size"]) == (images, size)],
                columns,
            )
            for images, size in shapes
        ],
        bars=[
            Bar(
                "at least 5 times faster than show_cam_on_image, 32 images of 224 x 224 pixels",
                "vs_show",
                SHOW_LIMIT,
                applies=lambda row: (row["images"], row["size"]) == (32, 224),
            ),
            Bar("no slower than PyTorch and matplotlib", "vs_matplotlib", 1.0),
            Bar("no slower than torch.compile", "vs_compile", 1.0),
            Bar("no slower than the eager reference", "vs_eager", 1.0),
        ],
        label=_label,
    )


def _label(row: Row) -> str:
    return (
        f"{row['blend']}, {row['images']} x {row['size']} x {row['size']} pixels {row['layout']} {row['dtype']}, "
        f"maps {row['map_size']} x {row['map_size']}"
    )
