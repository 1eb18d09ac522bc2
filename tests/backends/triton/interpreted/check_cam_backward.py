"""`cam_backward` in Triton's interpreter against the float64 reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffcam_fast.backends.triton.cam_backward import cam_backward
from diffcam_fast.reference.cam import METHODS
from diffcam_fast.reference.cam import cam_backward as reference
from tests.ops.test_cam import LAYOUTS, _tensors, problems
from tests.tolerances import HALF_ERROR_RATIO, INTERPRETED_BFLOAT16, MAP_SHARE_OF_RANGE

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BOTH = (True, True)


def _assert_agree(grad_raw: Tensor, activations: Tensor, gradients: Tensor, method: str, needs: tuple = BOTH) -> None:
    found = cam_backward(grad_raw, activations, gradients, method, *needs)
    plain = reference(grad_raw, activations, gradients, method, *needs)
    exact = reference(grad_raw.double(), activations.double(), gradients.double(), method, *needs)
    dtype = activations.dtype
    for got, own, want, needed in zip(found, plain, exact, needs, strict=True):
        assert got.shape == want.shape and got.dtype == dtype and got.stride() == own.stride()
        if not needed or want.numel() == 0:
            continue
        scale = want.abs().amax().clamp_min(1e-6)
        error = (got.double() - want).abs().amax() / scale
        if dtype in MAP_SHARE_OF_RANGE:
            assert error <= MAP_SHARE_OF_RANGE[dtype]
            continue
        allowed = HALF_ERROR_RATIO * ((own.double() - want).abs().amax() / scale) + MAP_SHARE_OF_RANGE[torch.float32]
        assert error <= max(allowed, INTERPRETED_BFLOAT16 if dtype == torch.bfloat16 else 0)


def _grad_raw(activations: Tensor, gradients: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    dtype = torch.float64 if activations.dtype == torch.float64 else torch.float32
    return torch.randn((*gradients.shape[:2], *activations.shape[2:]), generator=generator, dtype=dtype)


@settings(max_examples=20)
@given(problem=problems(), needs=st.sampled_from([BOTH, (True, False), (False, True)]))
def test_agrees_with_float64_reference(problem: dict, needs: tuple[bool, bool]) -> None:
    activations, gradients = _tensors(problem)
    _assert_agree(_grad_raw(activations, gradients), activations, gradients, problem["method"], needs)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_several_blocks(method: str, layout: str) -> None:
    generator = torch.Generator().manual_seed(4)
    activations = LAYOUTS[layout](torch.rand(1, 35, 18, 18, generator=generator))
    gradients = torch.randn(1, 2, 35, 18, 18, generator=generator)
    _assert_agree(_grad_raw(activations, gradients), activations, gradients, method)
    weights = gradients[..., 0, 0]
    _assert_agree(_grad_raw(activations, weights), activations, weights, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("shape", "targets"), [((0, 3, 4), 1), ((2, 3, 4), 0), ((2, 0, 4), 1), ((2, 3, 0), 2), ((1, 1, 1), 1)]
)
def test_empty_and_smallest(method: str, shape: tuple[int, ...], targets: int) -> None:
    activations, gradients = torch.rand(shape), torch.randn(shape[0], targets, *shape[1:])
    _assert_agree(_grad_raw(activations, gradients), activations, gradients, method)
    weights = gradients.sum(-1)
    _assert_agree(_grad_raw(activations, weights), activations, weights, method)


def test_offsets_of_more_than_32_bits(tmp_path: Path) -> None:
    # A file with a hole: nothing of what lies between the elements exists.
    apart = 2**31 + 5
    storage = torch.from_file(str(tmp_path / "hole"), shared=True, size=apart + 64, dtype=torch.float16)
    near = torch.rand(1, 2, 3, 4, generator=torch.Generator().manual_seed(5)).half()
    far = storage.as_strided((1, 2, 3, 4), (0, apart, 4, 1)).copy_(near)
    gradients = near.unsqueeze(1) - 0.5
    grad_raw = _grad_raw(near, gradients)
    for method in ("xgradcam", "layercam"):
        expected = cam_backward(grad_raw, near, gradients, method, *BOTH)
        for got, want in zip(cam_backward(grad_raw, far, gradients, method, *BOTH), expected, strict=True):
            assert torch.equal(got, want)


def test_maps_gradient_of_any_layout() -> None:
    activations, gradients = torch.rand(1, 4, 5, 6), torch.randn(1, 2, 4, 5, 6)
    grad_raw = torch.randn(1, 2, 6, 5).transpose(2, 3)
    _assert_agree(grad_raw, activations, gradients, "hirescam")
