"""The short way to the compiled CPU kernels: past PyTorch's dispatcher, for calls that nothing but the kernel wants.

The way through the dispatcher is a large part of a small call, and largest right after a network has run, when the
caches hold nothing of what is on that way (`benchmarks/results/cam.md` and `logit_difference.md` time whole calls). The
functions here return None where they do not serve a call: a tensor is not a plain one on the CPU, an argument is not
valid, gradients are recorded, a mode, a transform, a trace or a profiler is active, another backend is forced, or the
library was not compiled. The op serves it then, or raises.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from diffcam_fast.backends import native
from diffcam_fast.backends.library import NAMESPACE


def _watchers() -> tuple[Callable[[], Any], ...]:
    """What has to see a call where it is there: true (or not None) then."""
    return (
        torch._C._len_torch_dispatch_stack,
        torch._C._is_torch_function_mode_enabled,
        torch._C._get_tracing_state,
        torch._C._functorch.maybe_current_level,
        torch._C._autograd._profiler_enabled,
    )


def _connect() -> tuple[ModuleType | None, str | None]:
    """The compiled functions, or why they or what they need of PyTorch is not there."""
    if native.absent_because is not None:
        return None, native.absent_because
    try:
        compiled = importlib.import_module("diffcam_fast._C")
        served = compiled.connect(
            Tensor,
            Tensor.__dlpack_c_exchange_api__,
            getattr(torch.ops, NAMESPACE).thread_pool(),
            torch.is_grad_enabled,
            Tensor.is_neg,
            _watchers(),
        )
    except (ImportError, AttributeError) as error:
        return None, f"{error} (torch {torch.__version__})"
    if not served:
        return None, f"torch {torch.__version__} offers no version 1 of DLPack's exchange in C"
    return compiled, None


def _not_served(*arguments: Any) -> None:
    return None


_compiled: ModuleType | None
#: Why there is no short way, or None where there is.
absent_because: str | None
_compiled, absent_because = _connect()

#: `diffcam_fast.cam` of (activations, gradients, method, relu, normalize, eps, whether the gradients have a target
#: dimension for certain), or None.
cam: Callable[..., Tensor | None] = _not_served

#: `diffcam_fast.logit_difference` of (logits, classes, baseline, top_k, temperature, alpha, ranks): a tuple of its
#: results, or None.
logit_difference: Callable[..., tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None] = _not_served


def serve(wanted: bool) -> None:
    """Serve calls from now on, or none.

    Args:
        wanted: whether the compiled CPU kernels are to serve CPU tensors.
    """
    global cam, logit_difference
    compiled = _compiled if wanted else None
    cam = _not_served if compiled is None else compiled.direct_cam
    logit_difference = _not_served if compiled is None else compiled.direct_logit_difference


def is_serving() -> bool:
    """Whether calls are served now."""
    return cam is not _not_served
