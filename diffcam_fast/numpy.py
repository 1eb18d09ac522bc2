"""The ops on NumPy arrays: compiled, without torch tensors in between.

Where the package was not compiled, the reference serves: same results, slower.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from diffcam_fast.backends import forced_backend
from diffcam_fast.ops.cam import cam as cam_on_tensors
from diffcam_fast.ops.cam import check as check_cam
from diffcam_fast.ops.cam import has_target_dimension
from diffcam_fast.ops.logit_difference import check_options, check_range, check_tensors
from diffcam_fast.ops.logit_difference import logit_difference as logit_difference_on_tensors

_compiled: ModuleType | None
_absent_because: str | None
try:
    _compiled = importlib.import_module("diffcam_fast._C")
    _absent_because = None
except ImportError as error:
    _compiled = None
    _absent_because = str(error)

_DTYPES = ("float32", "float64", "float16", "bfloat16")


class LogitDifferenceArrays(NamedTuple):
    """What `logit_difference` returns: fields and shapes as those of `diffcam_fast.logit_difference`."""

    delta: NDArray[Any]
    cotangent: NDArray[Any]
    rivals: NDArray[np.int64] | None
    differences: NDArray[Any] | None


def absent_because() -> str | None:
    """Why the compiled NumPy module is not there, or None when it is."""
    return _absent_because


def _threads(threads: int | None) -> int:
    if threads is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not isinstance(threads, int) or isinstance(threads, bool) or threads < 1:
        raise ValueError(f"threads: expected a positive int or None; got {threads!r}")
    return threads


def _array(name: str, value: Any) -> NDArray[Any]:
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name}: expected a numpy.ndarray; got {type(value).__name__}")
    if value.dtype.name not in _DTYPES or not value.dtype.isnative:
        raise TypeError(f"{name}: expected dtype {', '.join(_DTYPES)} in native byte order; got {value.dtype}")
    if any(step % value.itemsize for step in value.strides):
        # A field of a record array: its steps are no whole number of items.
        return np.ascontiguousarray(value)
    return value


def _tensor(array: NDArray[Any]) -> torch.Tensor:
    # torch shares memory with neither bfloat16 nor read-only nor flipped arrays: those few are copied.
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(np.ascontiguousarray(array).view(np.int16).copy()).view(torch.bfloat16)
    if not array.flags.writeable or any(step < 0 for step in array.strides):
        array = array.copy()
    return torch.from_numpy(array)


def _shape_only(array: NDArray[Any]) -> torch.Tensor:
    return torch.empty(array.shape, dtype=getattr(torch, array.dtype.name), device="meta")


def cam(
    activations: NDArray[Any],
    gradients: NDArray[Any],
    method: str = "gradcam",
    *,
    relu: bool = True,
    normalize: str | None = "minmax",
    eps: float = 1e-7,
    threads: int | None = None,
) -> NDArray[Any]:
    """Class activation maps of NumPy arrays. Methods and formulas are those of `diffcam_fast.cam`.

    Args:
        activations: ``(N, C, *S)`` with one to three spatial dimensions; float32, float64, float16, or bfloat16 as
            ml_dtypes has it. Any strides; nothing is copied.
        gradients: same dtype; ``(N, C, *S)``, ``(N, T, C, *S)``, or ``(N, C)`` or ``(N, T, C)`` when they are the same
            at every position.
        method: "gradcam", "gradcam++", "xgradcam", "hirescam", "layercam" or "elementwise".
        relu: set negative evidence to zero.
        normalize: "minmax", "max" or None.
        eps: added to the denominator of the normalisation; positive.
        threads: how many threads may work. None: as many as this process may use. The result does not depend on it.

    Returns:
        Maps ``(N, *S)`` or ``(N, T, *S)``; float32, or float64 for float64 input.

    Raises:
        TypeError: an argument is not an array of a supported dtype.
        ValueError: shapes do not match, or an option is not valid.
    """
    count = _threads(threads)
    activations, gradients = _array("activations", activations), _array("gradients", gradients)
    if _compiled is None or forced_backend() == "reference":
        maps = cam_on_tensors(_tensor(activations), _tensor(gradients), method, relu=relu, normalize=normalize, eps=eps)
        return maps.numpy()
    shapes = _shape_only(activations), _shape_only(gradients)
    check_cam(*shapes, method, normalize, eps)
    has_targets = has_target_dimension(activations.shape, gradients.shape)
    if not has_targets:
        gradients = gradients[:, None]
    maps = _compiled.cam(
        _items(activations),
        _items(gradients),
        activations.dtype.name,
        method,
        relu,
        "none" if normalize is None else normalize,
        eps,
        count,
    )
    return maps if has_targets else maps[:, 0]


def logit_difference(
    logits: NDArray[Any],
    classes: NDArray[np.integer[Any]],
    *,
    baseline: str = "logsumexp",
    top_k: int | None = None,
    temperature: float = 1.0,
    alpha: float = 1.0,
    ranks: Sequence[int] = (1, 2, 3),
    threads: int | None = None,
) -> LogitDifferenceArrays:
    """Logit differences of NumPy arrays. Options and results are those of `diffcam_fast.logit_difference`.

    Args:
        logits: ``(N, K)``; float32, float64, float16 or bfloat16.
        classes: integers ``(N,)`` or ``(N, T)`` in ``[0, K)``.
        baseline: "logsumexp", "max", "mean", "expected" or "finer".
        top_k: compare with the k strongest rivals only; None: with all.
        temperature: of "logsumexp" and "expected"; positive.
        alpha: of "finer".
        ranks: of "finer": which of the nearest classes are compared.
        threads: how many threads may work. None: as many as this process may use.

    Returns:
        `LogitDifferenceArrays`.

    Raises:
        TypeError: an argument is not an array of a supported dtype.
        ValueError: shapes do not match, a class is out of range, or an option is not valid.
    """
    count = _threads(threads)
    logits = _array("logits", logits)
    if not isinstance(classes, np.ndarray) or not np.issubdtype(classes.dtype, np.integer):
        kind = classes.dtype if isinstance(classes, np.ndarray) else type(classes).__name__
        raise TypeError(f"classes: expected a numpy.ndarray of integers; got {kind}")
    chosen = np.ascontiguousarray(classes, dtype=np.int64)
    if _compiled is None or forced_backend() == "reference":
        result = logit_difference_on_tensors(
            _tensor(logits),
            torch.from_numpy(chosen),
            baseline=baseline,
            top_k=top_k,
            temperature=temperature,
            alpha=alpha,
            ranks=ranks,
        )
        return LogitDifferenceArrays(*(None if part is None else part.numpy() for part in result))  # type: ignore[arg-type]
    shape, classes_tensor = _shape_only(logits), torch.from_numpy(chosen)
    check_tensors(shape, classes_tensor.to("meta"))
    check_options(shape.shape[1], baseline, top_k, temperature, alpha, ranks)
    check_range(classes_tensor, shape.shape[1])
    parts = _compiled.logit_difference(
        _items(logits),
        chosen if chosen.ndim == 2 else chosen[:, None],
        logits.dtype.name,
        baseline,
        top_k or 0,
        temperature,
        alpha,
        list(ranks) if baseline == "finer" else [],
        count,
    )
    if chosen.ndim == 1:
        parts = [part[:, 0] for part in parts]
    if top_k is None and baseline != "finer":
        return LogitDifferenceArrays(parts[0], parts[1], None, None)
    return LogitDifferenceArrays(*parts)


def _items(array: NDArray[Any]) -> NDArray[Any]:
    # bfloat16 is no type of NumPy's own: it travels as the 16 bits that it is.
    return array.view(np.uint16) if array.dtype.name == "bfloat16" else array
