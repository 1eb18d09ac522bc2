"""Triton kernels: what serves a GPU, NVIDIA's or AMD's, where nothing was compiled. One file an op.

Importing this package does not import triton; serving the first call does. Each op file has a plain function with the
op's name and arguments, called below the op's boundary, and registers the same as a `triton_op` in the namespace
`diffcam_fast_triton`, which `torch.compile` sees through.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors too, as TRITON_INTERPRET=1 asks for."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def absent_because() -> str | None:
    """Why Triton cannot serve here, or None when it can.

    Neither imports triton nor wakes a device, so the process may still fork.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'diffcam_fast[triton]'"
    if interpreting() or torch.version.cuda is not None or torch.version.hip is not None:
        return None
    return f"torch {torch.__version__} was built without GPU support"


def serve(name: str, *arguments: Any) -> Any:
    """Run the op `diffcam_fast::<name>`."""
    return _implementation(name)(*arguments)


@functools.cache
def _implementation(name: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(importlib.import_module(f"{__name__}.{name}"), name)
    return function
