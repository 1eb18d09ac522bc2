"""`cam` in Triton's interpreter against the float64 reference."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import diffcam_fast as dcf
from diffcam_fast.backends import use_backend
from diffcam_fast.backends.triton.cam import cam
from diffcam_fast.reference.cam import METHODS
from diffcam_fast.reference.cam import cam as reference
from tests.ops.test_cam import LAYOUTS, _assert_agree, _lay_out_targets, _tensors, problems

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def _random(shape: tuple[int, ...], targets: int, layout: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    activations = LAYOUTS[layout](torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype))
    gradients = torch.randn((shape[0], targets, *shape[1:]), generator=generator, dtype=torch.float64).to(dtype)
    return activations, _lay_out_targets(gradients, layout)


@settings(max_examples=25)
@given(problem=problems())
def test_agrees_with_float64_reference(problem: dict) -> None:
    activations, gradients = _tensors(problem)
    # Values near zero divide by nearly nothing under "max" without ReLU: that ratio is no measure of the kernel.
    relu = problem["relu"] or problem["normalize"] == "max"
    options = (problem["method"], relu, problem["normalize"], 1e-3)
    _assert_agree(cam(activations, gradients, *options), activations, gradients, options)


# Tiles of one channel; tiles in which positions are a multiple of 4; weights from a kernel of their own, positions side
# by side and not; several blocks of positions, finished by one program; sums over splits of many channels.
@pytest.mark.parametrize(
    ("method", "shape", "targets", "layout", "dtype"),
    [
        ("gradcam++", (1, 3, 56, 56), 2, "contiguous", torch.float32),
        ("xgradcam", (2, 70, 14, 14), 1, "contiguous", torch.bfloat16),
        ("gradcam", (2, 70, 14, 14), 1, "channels-last", torch.float16),
        ("layercam", (1, 40, 6, 6), 4, "tokens", torch.float32),
        ("gradcam", (1, 2, 65, 65), 1, "contiguous", torch.float32),
        ("gradcam++", (1, 3, 46, 45), 3, "contiguous", torch.float64),
        ("gradcam++", (1, 33, 18, 17), 2, "channels-last", torch.float32),
        ("xgradcam", (1, 3, 11, 7, 6), 1, "strided", torch.float32),
        ("hirescam", (1, 70, 34, 32), 1, "contiguous", torch.float32),
        ("elementwise", (1, 6, 34, 34), 2, "strided", torch.float64),
    ],
)
def test_every_kernel_and_tile(
    method: str, shape: tuple[int, ...], targets: int, layout: str, dtype: torch.dtype
) -> None:
    activations, gradients = _random(shape, targets, layout, dtype)
    # Raw maps too: a factor that a whole map is off by is gone after normalisation.
    for options in ((method, True, "minmax", 1e-7), (method, False, "none", 1e-7)):
        _assert_agree(cam(activations, gradients, *options), activations, gradients, options)


@pytest.mark.parametrize("method", METHODS)
def test_constant_gradients(method: str) -> None:
    # Sums of activations in one tile, and by the kernel that weights.
    for shape, layout in (((2, 40, 7, 5), "contiguous"), ((1, 34, 17, 17), "channels-last")):
        activations, _ = _random(shape, 1, layout, torch.float32)
        weights = torch.randn(shape[0], 3, shape[1], generator=torch.Generator().manual_seed(2))
        options = (method, False, "none", 1e-7)
        _assert_agree(cam(activations, weights, *options), activations, weights, options)


@pytest.mark.parametrize("method", ["gradcam++", "hirescam"])
def test_offsets_of_more_than_32_bits(method: str, tmp_path: Path) -> None:
    # A file with a hole: nothing of what lies between the elements exists.
    apart = 2**31 + 5
    storage = torch.from_file(str(tmp_path / "hole"), shared=True, size=apart + 64, dtype=torch.float16)
    near, _ = _random((1, 2, 3, 4), 1, "contiguous", torch.float16)
    far = storage.as_strided((1, 2, 3, 4), (0, apart, 4, 1)).copy_(near)
    gradients = torch.randn(1, 1, 2, 3, 4, generator=torch.Generator().manual_seed(2)).half()
    options = (method, True, "minmax", 1e-7)
    assert torch.equal(cam(far, gradients, *options), cam(near, gradients, *options))
    far_gradients = storage.as_strided((1, 1, 2, 3, 4), (0, 0, apart, 4, 1)).copy_(gradients)
    assert torch.equal(cam(near, far_gradients, *options), cam(near, gradients, *options))


def test_overlapping_windows() -> None:
    # Channels and positions both lie side by side: a channel's rows do not start at multiples of anything.
    signal = torch.rand(24, generator=torch.Generator().manual_seed(3))
    activations = signal.unfold(0, 20, 1).unsqueeze(0)
    options = ("gradcam", True, "minmax", 1e-3)
    _assert_agree(cam(activations, activations.unsqueeze(1), *options), activations, activations.unsqueeze(1), options)


# What finishes large maps is the same whatever pooled them.
@pytest.mark.parametrize(
    ("method", "poison", "spatial"),
    [
        *((method, poison, (7, 7)) for method in METHODS for poison in (math.nan, math.inf, -math.inf)),
        ("gradcam", math.nan, (33, 32)),
        ("elementwise", math.inf, (33, 32)),
    ],
)
def test_non_finite_input_stays_in_its_image(method: str, poison: float, spatial: tuple[int, int]) -> None:
    activations, gradients = _random((4, 5, *spatial), 1, "contiguous", torch.float32)
    options = (method, True, "minmax", 1e-7)
    clean = cam(activations, gradients, *options)
    activations[1, 3, 2, 4] = poison
    gradients[2, 0, 4, 6, 6] = math.nan
    found = cam(activations, gradients, *options)
    assert torch.equal(found[[0, 3]], clean[[0, 3]])
    assert torch.equal(found.isfinite(), reference(activations, gradients, *options).isfinite())


@pytest.mark.parametrize("method", ["gradcam", "layercam"])
@pytest.mark.parametrize(
    ("shape", "targets"),
    [
        ((0, 3, 4, 4), 1),
        ((2, 3, 4, 4), 0),
        ((2, 0, 4, 4), 1),
        ((1, 0, 20, 20), 1),
        ((2, 3, 0, 4), 1),
        ((1, 3, 1, 1), 2),
    ],
)
def test_empty_and_smallest(method: str, shape: tuple[int, ...], targets: int) -> None:
    activations, gradients = _random(shape, targets, "contiguous", torch.float32)
    for values in (gradients, gradients.flatten(3).sum(-1)):
        found = cam(activations, values, method, True, "minmax", 1e-7)
        assert found.shape == (shape[0], targets, *shape[2:])
        assert torch.equal(found, torch.zeros_like(found))


def test_constant_map_becomes_zeros() -> None:
    ones = torch.ones(2, 8, 6, 6)
    assert torch.equal(cam(ones, ones.unsqueeze(1), "gradcam", True, "minmax", 1e-7), torch.zeros(2, 1, 6, 6))


def test_serves_the_op() -> None:
    activations, gradients = torch.rand(2, 5, 4, 4), torch.randn(2, 5, 4, 4)
    with use_backend("triton"):
        found = dcf.cam(activations, gradients)
        assert torch.equal(found, cam(activations, gradients.unsqueeze(1), "gradcam", True, "minmax", 1e-7).squeeze(1))
