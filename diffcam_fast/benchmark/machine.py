"""What a figure was measured on: machine, versions, and the caches that an input has to be larger than."""

from __future__ import annotations

import ctypes
import datetime
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

import diffcam_fast
from diffcam_fast.backends import native, serving

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")

# Parameters of glibc's `mallopt`, as its malloc.h numbers them.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4

_keeps_freed_memory = False

#: Taken where the system does not say how large its last-level cache is.
ASSUMED_LAST_LEVEL_CACHE = 64 << 20


def describe(command: str, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Machine and versions, as JSON-ready values. Call it before anything is measured.

    Args:
        command: what was run, as a person would type it.
        device: what is measured.
    """
    device = torch.device(device)
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": {
            "cpu": _cpu_model(),
            "architecture": platform.machine(),
            "processors": processors(),
            "caches": caches(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            # Far above zero: something else was running, and figures for more than one thread mean little.
            "load_average_at_start": round(os.getloadavg()[0], 2),
            "keeps_freed_memory": _keeps_freed_memory,
            **({"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}),
        },
        "versions": {
            "diffcam_fast": diffcam_fast.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "device": str(device),
        "backend": serving(device.type),
        "cpu_capability": native.cpu_capability(),
        "build": native.build_record(),
    }


def processors() -> int:
    """How many processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> bool:
    """Have this process keep the memory that tensors leave, for the next ones; from now on and for good.

    By itself glibc hands large pieces back to the system when the last tensor in them goes, and asks for new ones page
    by page. Where several candidates take turns it is then their neighbours' habits that decide who waits for the
    system: a library that holds on to its tensors until its next call spares itself the wait, and leaves it to others.

    Returns:
        Whether the C library can be told so.
    """
    global _keeps_freed_memory
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        _keeps_freed_memory = bool(library.mallopt(_MMAP_MAX, 0)) and bool(library.mallopt(_TRIM_THRESHOLD, -1))
    return _keeps_freed_memory


def caches() -> dict[str, int]:
    """Bytes of each cache that the first processor uses, such as {"L1 data": 32768, "L3": 33554432}."""
    found = {}
    for folder in sorted(CACHES.glob("index*")):
        level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        label = f"L{level}" if kind == "Unified" else f"L{level} {kind.lower()}"
        found[label] = int(size.removesuffix("K")) * 1024
    return found


def last_level_cache(device: torch.device | str = "cpu") -> int:
    """Bytes of a device's last-level cache, or `ASSUMED_LAST_LEVEL_CACHE` where the system does not say."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return max(caches().values(), default=ASSUMED_LAST_LEVEL_CACHE)


def one_line(environment: dict[str, Any]) -> str:
    """The machine and the versions, for the head of a table."""
    machine, versions = environment["machine"], environment["versions"]
    sizes = "".join(f"{name} {_size(size)}, " for name, size in machine["caches"].items())
    gpu = f"{machine['gpu']}; " if "gpu" in machine else ""
    memory = f"{machine['memory_gib']} GiB" + (", freed memory kept" if machine.get("keeps_freed_memory") else "")
    return (
        f"{gpu}{machine['cpu']}, {machine['processors']} processors, {sizes}{memory}; "
        f"diffcam_fast {versions['diffcam_fast']} ({environment['cpu_capability'] or 'reference only'}), "
        f"torch {versions['torch']}, NumPy {versions['numpy']}, Python {versions['python']}"
    )


def commit_line(environment: dict[str, Any]) -> str:
    """The commit, and whether the files were those of the commit."""
    if environment["commit"] is None:
        return "none (not a Git work tree with a commit)"
    return environment["commit"] + ("" if environment["clean"] else ", with uncommitted changes")


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _size(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"
