"""Which backend serves a call, why, and how to force one.

The choice is made below the op boundary, by PyTorch's dispatcher: a compiled implementation registered for a device
wins over the reference, and `torch.compile` sees one and the same op whatever serves it.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from diffcam_fast.backends import library, native

BACKENDS = ("reference", "cpu")

_lock = threading.RLock()
_forced: str | None = None


def absent_because(backend: str) -> str | None:
    """Why a backend cannot serve here, or None when it can."""
    _known(backend)
    return None if backend == "reference" else native.absent_because


def forced_backend() -> str | None:
    """The backend that is forced, or None when each call is served by the best one."""
    return _forced


def serving(device: torch.device | str) -> str:
    """The backend that serves tensors on a device now."""
    if _forced is not None:
        return _forced
    return "cpu" if torch.device(device).type == "cpu" and native.absent_because is None else "reference"


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Force one backend inside a `with` block, for the whole process.

    Meant for comparing and debugging. Calls that the backend cannot serve raise and say why.

    Args:
        backend: "auto", "reference" or "cpu".

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


_override: torch.library.Library | None = None


def _force(backend: str | None) -> None:
    global _forced, _override
    with _lock:
        if backend is not None:
            reason = absent_because(backend)
            if reason is not None:
                raise RuntimeError(f"backend {backend!r} is not available: {reason}")
        _forced = backend
        if _override is not None:
            _override._destroy()
            _override = None
        if backend == "reference" and native.absent_because is None:
            _override = torch.library.Library(library.NAMESPACE, "IMPL", "CPU")
            with warnings.catch_warnings():
                # PyTorch warns that a kernel is replaced; that is what was asked for, and it is put back.
                warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
                for name, reference in library.references.items():
                    _override.impl(name, reference)
        library.guard_references(None if backend in (None, "reference") else _refuse)


def _refuse(name: str, arguments: tuple[Any, ...]) -> None:
    devices = sorted({str(value.device) for value in arguments if isinstance(value, torch.Tensor)})
    raise RuntimeError(
        f"backend {_forced!r} is forced and cannot serve {library.NAMESPACE}::{name} on {', '.join(devices)}: "
        f"it serves CPU tensors only"
    )


def force_from_environment() -> None:
    """Apply DIFFCAM_BACKEND. Import never fails: a backend that is not there is reported by a warning."""
    requested = os.environ.get("DIFFCAM_BACKEND", "auto")
    if requested == "auto":
        return
    try:
        _known(requested)
        _force(requested)
    except (ValueError, RuntimeError) as error:
        warnings.warn(f"DIFFCAM_BACKEND={requested}: {error}; using auto", RuntimeWarning, stacklevel=2)
