"""The CUDA kernels of saliency_contrast, run as host code."""

from __future__ import annotations

import ctypes
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cuda import sweeps
from tests.cuda_host import Device, build_op, load, ops
from tests.cuda_host.__main__ import sweep
from tests.cuda_host.build import KERNELS
from tests.cuda_host.saliency_contrast_cases import saliency_contrast_cases
from tests.ops.test_saliency_contrast import DTYPES, assert_right, problems, random_maps, tensors


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return load(build_op("saliency_contrast"))


def test_sweep_agrees_with_float64_reference(library: ctypes.CDLL) -> None:
    failures = sweep(library, saliency_contrast_cases(), range(2))
    assert not failures, "\n".join(failures)


@given(problem=problems(), capability=st.sampled_from([80, 90, 100]), seed=st.integers(0, 2**31))
@settings(max_examples=100)
def test_agrees_with_float64_reference(
    library: ctypes.CDLL, problem: dict[str, Any], capability: int, seed: int
) -> None:
    saliency, rivals = tensors(problem)
    device = Device(capability, seed=seed)
    found = ops.saliency_contrast(library, device, saliency, rivals, problem["per_channel"])
    assert_right(found, saliency, rivals, problem["per_channel"])


@pytest.mark.parametrize("per_channel", [True, False])
def test_rows_of_many_pieces(library: ctypes.CDLL, per_channel: bool) -> None:
    """More pieces than a warp has lanes, and pieces that are longer so that there are not too many of them."""
    for shape in ((1, 2, 190, 200), (1, 1, 300, 300)):
        saliency, rivals = random_maps(*shape), random_maps(1, 1, *shape[1:], seed=1)
        found = ops.saliency_contrast(library, Device(), saliency, rivals, per_channel)
        assert_right(found, saliency, rivals, per_channel)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_map_has_nothing_more_than_itself(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    saliency = random_maps(2, 3, 13, 8, dtype=dtype)
    for per_channel in (True, False):
        assert not ops.saliency_contrast(library, Device(), saliency, saliency.unsqueeze(1), per_channel).any()


def test_size_of_the_maps_does_not_matter(library: ctypes.CDLL) -> None:
    saliency, rivals = random_maps(1, 2, 30, 20), random_maps(1, 2, 2, 30, 20, seed=1)
    expected = ops.saliency_contrast(library, Device(), saliency, rivals)
    for own, other in ((2.0**-120, 2.0**10), (2.0**100, 2.0**-100)):
        found = ops.saliency_contrast(library, Device(), saliency * own, rivals * other)
        assert (found - expected).abs().amax() <= 1e-6


def test_zeros_and_what_is_not_finite(library: ctypes.CDLL) -> None:
    saliency, rivals = random_maps(2, 2, 6, 5), random_maps(2, 2, 2, 6, 5, seed=1)
    nothing = torch.zeros(2, 2, 6, 5)
    assert not ops.saliency_contrast(library, Device(), nothing, nothing.unsqueeze(1)).any()
    clean = ops.saliency_contrast(library, Device(), saliency, rivals)
    for value in (math.nan, math.inf, -math.inf):
        broken = rivals.clone()
        broken[1, 0, 1, 2, 3] = value
        found = ops.saliency_contrast(library, Device(), saliency, broken)
        assert found[1, 0, 1].isnan().all()
        found[1, 0, 1] = clean[1, 0, 1]
        assert torch.equal(found, clean)


@pytest.mark.parametrize("shape", [(0, 2, 3, 6), (2, 0, 3, 6), (2, 1, 0, 6), (2, 1, 3, 0)])
def test_nothing_to_do_launches_nothing(library: ctypes.CDLL, shape: tuple[int, ...]) -> None:
    found = ops.saliency_contrast(library, Device(), torch.zeros(shape[0], *shape[2:]), torch.zeros(shape))
    assert found.numel() == 0 and library.shim_launches() == 0


def test_two_launches(library: ctypes.CDLL) -> None:
    ops.saliency_contrast(library, Device(), random_maps(2, 3, 6, 5), random_maps(2, 5, 3, 6, 5))
    assert library.shim_launches() == 2


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("distance > 0; distance /= 2", "distance > 1; distance /= 2"),
        ("items - 1 - turn", "items - 2 - turn"),
        ("rows.access == Access::groups && count == kGroup", "count == kGroup"),
        ("energy == 0 ? T(1) : ", ""),
    ],
    ids=["lanes left out", "the wrong piece", "strides left out", "zero energy"],
)
def test_a_mistake_is_noticed(tmp_path: Path, right: str, wrong: str) -> None:
    copy = shutil.copytree(KERNELS, tmp_path / "cuda")
    source = copy / "saliency_contrast.cu"
    text = source.read_text()
    assert text.count(right) >= 1
    source.write_text(text.replace(right, wrong))
    if not wrong:
        library = load(build_op("saliency_contrast", kernels=copy))
        nothing = torch.zeros(1, 1, 6)
        assert ops.saliency_contrast(library, Device(), nothing, nothing.unsqueeze(1)).isnan().any()
        return
    done = sweeps.run("saliency_contrast", "--kernels", copy, "--seeds", "1", "--every", "3")
    assert done.returncode != 0 and " 0 failed" not in done.stdout
