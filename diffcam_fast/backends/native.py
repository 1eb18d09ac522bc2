"""Loads the compiled op library, and says why when it cannot."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import torch

from diffcam_fast.backends.library import NAMESPACE, _library

LIBRARY_PATH = Path(__file__).resolve().parent.parent / "_ops.so"
BUILD_RECORD_PATH = LIBRARY_PATH.with_name("_build.json")

CPU_CAPABILITIES = ("default", "avx2", "avx512")

_library.define("cpu_capability(int request) -> int")
_library.define("thread_pool() -> int")


def build_record() -> dict[str, Any] | None:
    """What the build wrote down: compilers, flags, variants, and why anything was left out. None: nothing was built."""
    if not BUILD_RECORD_PATH.is_file():
        return None
    record: dict[str, Any] = json.loads(BUILD_RECORD_PATH.read_text(encoding="utf-8"))
    return record


def _load() -> str | None:
    """Load the library; the reason why it is absent, or None when it is there."""
    if not LIBRARY_PATH.is_file():
        record = build_record()
        if record is None:
            return "the package was not built (no compiled library beside it)"
        return f"the build left it out: {record['native']['reason']}"
    requested = os.environ.get("DIFFCAM_CPU_CAPABILITY")
    if requested is not None and requested not in CPU_CAPABILITIES:
        known = ", ".join(CPU_CAPABILITIES)
        return f"DIFFCAM_CPU_CAPABILITY must be one of {known}; got {requested!r}: nothing compiled is used"
    try:
        torch.ops.load_library(str(LIBRARY_PATH))
    except OSError as error:
        # A library built against another platform or a too old PyTorch: the package still works on its reference.
        return f"it does not load into torch {torch.__version__}: {error.__cause__ or error}"
    return None


#: Why there is no compiled library, or None when it is loaded.
absent_because: str | None = _load()


#: Whether the library brought CUDA kernels. Asked here, before anything can be put in their place.
built_for_cuda: bool = absent_because is None and torch._C._dispatch_has_kernel_for_dispatch_key(
    f"{NAMESPACE}::cam", "CUDA"
)


def cuda_absent_because() -> str | None:
    """Why there are no CUDA kernels for this process, or None when there are."""
    if absent_because is not None:
        return absent_because
    if not built_for_cuda:
        record = build_record()
        reason = None if record is None else record.get("cuda", {}).get("reason")
        return f"the build left the CUDA kernels out: {reason or 'it did not say why'}"
    if torch.version.hip is not None:
        return "this PyTorch is built for AMD GPUs, the compiled kernels are for NVIDIA's"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return None


def cpu_capability() -> str | None:
    """The instruction-set variant of the compiled kernels in use: default, avx2 or avx512; None without them."""
    if absent_because is not None:
        return None
    return CPU_CAPABILITIES[getattr(torch.ops, NAMESPACE).cpu_capability(-1)]


def set_cpu_capability(name: str) -> None:
    """Choose the variant of the compiled kernels, for tensors and for NumPy arrays, for the rest of the process.

    Args:
        name: "default", "avx2" or "avx512".

    Raises:
        ValueError: an unknown name, or one that this processor does not run.
        RuntimeError: there are no compiled kernels.
    """
    if name not in CPU_CAPABILITIES:
        raise ValueError(f"name: expected one of {', '.join(CPU_CAPABILITIES)}; got {name!r}")
    if absent_because is not None:
        raise RuntimeError(f"no compiled kernels: {absent_because}")
    in_use = CPU_CAPABILITIES[getattr(torch.ops, NAMESPACE).cpu_capability(CPU_CAPABILITIES.index(name))]
    if in_use != name:
        raise ValueError(f"name: this processor does not run {name!r}; still on {in_use!r}")
    # The NumPy module is a binary of its own and keeps its own choice.
    if importlib.util.find_spec("diffcam_fast._C") is not None:
        importlib.import_module("diffcam_fast._C").set_cpu_capability(name)
