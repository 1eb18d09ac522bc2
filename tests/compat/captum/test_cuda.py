"""On a GPU: captum's attributions, and the dtypes that it has there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from diffcam_fast.compat.captum import LayerGradCam
from diffcam_fast.compat.originals import original
from tests.compat.networks import Flat, Pooled, images, make
from tests.tolerances import COMPAT_SHARE_OF_RANGE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture
def theirs() -> Any:
    pytest.importorskip("captum")
    return original("captum", "attr").LayerGradCam


@pytest.mark.parametrize("on_device", (False, True))
@pytest.mark.parametrize("target", (4, [4, 0, 6], torch.tensor(4), torch.tensor([4, 0, 6])), ids=str)
@pytest.mark.parametrize("kind", (Flat, Pooled))
def test_attributions(kind: Any, target: Any, on_device: bool, theirs: Any) -> None:
    model, x = make(kind, torch.float64).cuda(), images(kind, dtype=torch.float64).cuda()
    if on_device or (isinstance(target, torch.Tensor) and target.dim() > 0):
        target = torch.as_tensor(target).cuda()  # captum wants them there
    for of_input in (False, True):
        expected = theirs(model, model.late).attribute(x, target, None, of_input).detach()
        found = LayerGradCam(model, model.late).attribute(x, target, None, of_input)
        assert found.device == expected.device
        assert (found - expected).abs().max() <= COMPAT_SHARE_OF_RANGE * (expected.max() - expected.min())


def test_wrapped_in_data_parallel() -> None:
    """Images may be where they are: the wrapper would have scattered them."""
    model, x = make(Flat).cuda(), images(Flat)
    expected = LayerGradCam(model, model.late).attribute(x.cuda(), 4)
    assert torch.equal(LayerGradCam(nn.DataParallel(model), model.late).attribute(x, 4), expected)


@pytest.mark.parametrize("summed", (False, True))
def test_autocast(summed: bool, theirs: Any) -> None:
    model, x = make(Flat).cuda(), images(Flat).cuda()
    with torch.autocast("cuda", torch.float16):
        expected = theirs(model, model.late[1]).attribute(x, 4, attr_dim_summation=summed)
        found = LayerGradCam(model, model.late[1]).attribute(x, 4, attr_dim_summation=summed)
    assert found.dtype == expected.dtype
    assert (found - expected).abs().max() <= 2**-6 * expected.abs().max()
