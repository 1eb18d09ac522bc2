"""The compiled ops give back what they take."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch

from diffcam_fast.backends import absent_because, direct

OPS = torch.ops.diffcam_fast
ACTIVATIONS = torch.rand(1, 32, 8, 8)
GRADIENTS = torch.randn(1, 1, 32, 8, 8)
GRAD_RAW = torch.ones(1, 1, 8, 8)
LOGITS = torch.randn(1, 10)
CLASSES = torch.tensor([[3]])


class _Usage(ctypes.Structure):
    """What glibc's `mallinfo2` returns; `uordblks` counts the bytes in use."""

    _fields_ = (
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")),
        *((name, ctypes.c_size_t) for name in ("uordblks", "fordblks", "keepcost")),
    )


def _bytes_in_use() -> int:
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        pytest.skip("glibc 2.33 or newer counts the bytes in use; this C library does not")
    mallinfo2.restype = _Usage
    return int(mallinfo2().uordblks)


@pytest.mark.skipif(absent_because("cpu") is not None, reason=f"no compiled kernels: {absent_because('cpu')}")
@pytest.mark.parametrize(
    "call",
    [
        lambda: OPS.cam(ACTIVATIONS, GRADIENTS, "gradcam++", True, "minmax", 1e-7),
        lambda: direct.cam(ACTIVATIONS, GRADIENTS, "gradcam++", True, "minmax", 1e-7, True),
        lambda: direct.cam(ACTIVATIONS, GRADIENTS[..., :3], "gradcam++", True, "minmax", 1e-7, True),
        lambda: direct.logit_difference(LOGITS, CLASSES, "max", 3, 1.0, 1.0, (1, 2, 3)),
        lambda: direct.logit_difference(LOGITS, CLASSES, "finer", None, 1.0, 1.0, (1, 1)),
        lambda: OPS.cam_backward(GRAD_RAW, ACTIVATIONS, GRADIENTS, "gradcam++", True, True),
        lambda: OPS.logit_difference(LOGITS, CLASSES, "logsumexp", 3, 1.0, 1.0, []),
        lambda: OPS.logit_difference(LOGITS, CLASSES, "finer", 0, 1.0, 1.0, [1, 2, 3]),
        lambda: OPS.saliency_contrast(ACTIVATIONS, GRADIENTS, True),
        lambda: OPS.cpu_capability(-1),
    ],
    ids=[
        "cam",
        "direct cam",
        "direct cam refused",
        "direct difference",
        "direct difference refused",
        "cam_backward",
        "logit_difference",
        "finer",
        "saliency_contrast",
        "cpu_capability",
    ],
)
def test_no_growth_over_many_calls(call: Callable[[], object]) -> None:
    calls = 5000
    for _ in range(calls):
        call()
    before = _bytes_in_use()
    for _ in range(calls):
        call()
    assert (_bytes_in_use() - before) / calls < 8, "bytes a call"
