"""Which backend serves a call, why, and how to force one.

The choice is made below the op boundary, by PyTorch's dispatcher: `torch.compile` sees one and the same op whatever
serves it. For each kind of device the compiled library is asked first, then Triton (on GPUs), then the reference.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from diffcam_fast.backends import direct, library, native, triton

BACKENDS = ("reference", "cpu", "cuda", "triton")

#: Dispatch keys of the devices that a backend other than the reference may serve. PyTorch for AMD calls its GPUs CUDA.
_KEYS = ("CPU", "CUDA") if torch.version.cuda or torch.version.hip else ("CPU",)

_lock = threading.RLock()
_forced: str | None = None
_overrides: list[torch.library.Library] = []


def absent_because(backend: str) -> str | None:
    """Why a backend cannot serve here, or None when it can."""
    _known(backend)
    if backend == "cpu":
        return native.absent_because
    if backend == "cuda":
        return native.cuda_absent_because()
    if backend == "triton":
        return triton.absent_because()
    return None


def forced_backend() -> str | None:
    """The backend that is forced, or None when each call is served by the best one."""
    return _forced


def serving(device: torch.device | str) -> str:
    """The backend that serves tensors on a device now; "none" where the forced one cannot."""
    kind = torch.device(device).type.upper()
    if kind in _KEYS:
        return _chosen(kind, _forced) or "none"
    return "reference" if _forced in (None, "reference") else "none"


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Force one backend inside a `with` block, for the whole process.

    Meant for comparing and debugging. Calls that the backend cannot serve raise and say why.

    Args:
        backend: "auto", "reference", "cpu", "cuda" or "triton".

    Raises:
        ValueError: an unknown backend.
        RuntimeError: a backend that is not available here; the message says why.
    """
    forced = None if backend == "auto" else backend
    previous = _forced
    _force(forced)
    try:
        yield
    finally:
        _force(previous)


def _known(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of auto, {', '.join(BACKENDS)}; got {backend!r}")


def _chosen(key: str, forced: str | None) -> str | None:
    """The backend that serves a dispatch key; None where the forced one cannot."""
    able = ["reference"]
    if key == "CPU":
        if triton.interpreting():
            able.append("triton")
        if native.absent_because is None:
            able.append("cpu")
    else:
        if triton.absent_because() is None:
            able.append("triton")
        if native.cuda_absent_because() is None:
            able.append("cuda")
    if forced is not None:
        return forced if forced in able else None
    # The interpreter is for tests: nobody wants to be served by it.
    return next(name for name in reversed(able) if not (key == "CPU" and name == "triton"))


def _registered(key: str) -> str:
    """The backend behind a dispatch key where nothing overrides it."""
    if key == "CPU":
        return "cpu" if native.absent_because is None else "reference"
    return "cuda" if native.built_for_cuda else "reference"


def _force(backend: str | None) -> None:
    global _forced
    with _lock:
        if backend is not None:
            reason = absent_because(backend)
            if reason is not None:
                raise RuntimeError(f"backend {backend!r} is not available: {reason}")
        _forced = backend
        _arrange()


def _arrange() -> None:
    """Put the chosen backend's implementations before what is registered, wherever the two differ."""
    for override in _overrides:
        override._destroy()
    _overrides.clear()
    for key in _KEYS:
        chosen = _chosen(key, _forced)
        if chosen == _registered(key):
            continue
        override = torch.library.Library(library.NAMESPACE, "IMPL", key)
        _overrides.append(override)
        with warnings.catch_warnings():
            # PyTorch warns that a kernel is replaced; that is what was asked for, and it is put back.
            warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
            for name, reference in library.references.items():
                override.impl(name, _implementation(chosen, name, reference))
    direct.serve(_chosen("CPU", _forced) == "cpu")
    library.guard_references(None if _forced in (None, "reference") else _refuse)


def _implementation(backend: str | None, name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    if backend == "reference":
        return reference
    if backend == "triton":
        return partial(triton.serve, name)
    return lambda *arguments: _refuse(name, arguments)


def _refuse(name: str, arguments: tuple[Any, ...]) -> None:
    devices = sorted({str(value.device) for value in arguments if isinstance(value, torch.Tensor)})
    able = "CPU tensors" if _forced == "cpu" else "tensors on a GPU"
    raise RuntimeError(
        f"backend {_forced!r} is forced and cannot serve {library.NAMESPACE}::{name} on {', '.join(devices)}: "
        f"it serves {able} only"
    )


def arrange_from_environment() -> None:
    """Choose backends, as DIFFCAM_BACKEND says. Import never fails: one that is not there is reported by a warning."""
    requested = os.environ.get("DIFFCAM_BACKEND", "auto")
    try:
        if requested != "auto":
            _known(requested)
            _force(requested)
            return
    except (ValueError, RuntimeError) as error:
        warnings.warn(f"DIFFCAM_BACKEND={requested}: {error}; using auto", RuntimeWarning, stacklevel=2)
    _force(None)
