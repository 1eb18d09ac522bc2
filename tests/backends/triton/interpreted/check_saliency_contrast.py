"""`saliency_contrast` in Triton's interpreter against the float64 reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from diffcam_fast.backends.triton import saliency_contrast as kernels
from diffcam_fast.backends.triton.saliency_contrast import saliency_contrast
from tests.ops.test_saliency_contrast import DTYPES, LAYOUTS, assert_right, problems, random_maps, tensors

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@settings(max_examples=40)
@given(problem=problems())
def test_agrees_with_float64_reference(problem: dict[str, Any]) -> None:
    saliency, rivals = tensors(problem)
    assert_right(saliency_contrast(saliency, rivals, problem["per_channel"]), saliency, rivals, problem["per_channel"])


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "off by one"])
def test_several_pieces_and_steps(monkeypatch: pytest.MonkeyPatch, per_channel: bool, layout: str) -> None:
    """Rows in many pieces, and pieces of many steps, whose last lie beyond the row's end."""
    for size in ((13, 25), (16, 20)):
        saliency, rivals = random_maps(1, 2, *size), random_maps(1, 2, 2, *size, seed=1)
        saliency, rivals = LAYOUTS[layout](saliency, 1), LAYOUTS[layout](rivals, 2)
        for block, most in ((64, 64), (32, 4)):
            monkeypatch.setattr(kernels, "_BLOCK", block)
            monkeypatch.setattr(kernels, "_MOST_PIECES", most)
            assert_right(saliency_contrast(saliency, rivals, per_channel), saliency, rivals, per_channel)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_map_has_nothing_more_than_itself(dtype: torch.dtype) -> None:
    saliency = random_maps(2, 3, 13, 8, dtype=dtype)
    for per_channel in (True, False):
        assert not saliency_contrast(saliency, saliency.unsqueeze(1), per_channel).any()


def test_size_of_the_maps_does_not_matter() -> None:
    saliency, rivals = random_maps(1, 2, 9, 8), random_maps(1, 2, 2, 9, 8, seed=1)
    expected = saliency_contrast(saliency, rivals, True)
    for own, other in ((2.0**-120, 2.0**10), (2.0**100, 2.0**-100)):
        assert (saliency_contrast(saliency * own, rivals * other, True) - expected).abs().amax() <= 1e-6


def test_zeros_and_what_is_not_finite() -> None:
    saliency, rivals = random_maps(2, 2, 6, 5), random_maps(2, 2, 2, 6, 5, seed=1)
    nothing = torch.zeros(2, 2, 6, 5)
    assert not saliency_contrast(nothing, nothing.unsqueeze(1), True).any()
    clean = saliency_contrast(saliency, rivals, True)
    for value in (math.nan, math.inf, -math.inf):
        broken = rivals.clone()
        broken[1, 0, 1, 2, 3] = value
        found = saliency_contrast(saliency, broken, True)
        assert found[1, 0, 1].isnan().all()
        found[1, 0, 1] = clean[1, 0, 1]
        assert torch.equal(found, clean)


@pytest.mark.parametrize("shape", [(0, 2, 3, 6), (2, 0, 3, 6), (2, 1, 0, 6), (2, 1, 3, 0)])
def test_empty(shape: tuple[int, ...]) -> None:
    found = saliency_contrast(torch.zeros(shape[0], *shape[2:]), torch.zeros(shape), True)
    assert found.shape == shape and found.dtype == torch.float32
