"""Where a result comes from: machine, versions, commit and command. Every committed result carries this."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

import diffcam_fast as dcf
from diffcam_fast.backends import native

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")

#: Taken where the system does not say how large its last-level cache is.
ASSUMED_LAST_LEVEL_CACHE = 64 << 20


def describe(command: str) -> dict[str, Any]:
    """Machine, versions and commit, as JSON-ready values. Call it before results are written.

    Args:
        command: what was run, as a person would type it.
    """
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
        },
        "versions": {
            "diffcam_fast": dcf.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "cpu_capability": native.cpu_capability(),
        "build": native.build_record(),
        **_commit(),
    }


def processors() -> int:
    """How many processors this process may run on."""
    return len(os.sched_getaffinity(0))


def caches() -> dict[str, int]:
    """Bytes of each cache that the first processor uses, such as {"L1 data": 32768, "L3": 33554432}."""
    found = {}
    for folder in sorted(CACHES.glob("index*")):
        level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        label = f"L{level}" if kind == "Unified" else f"L{level} {kind.lower()}"
        found[label] = int(size.removesuffix("K")) * 1024
    return found


def last_level_cache() -> int:
    """Bytes of the last-level cache, or `ASSUMED_LAST_LEVEL_CACHE` where the system does not say."""
    return max(caches().values(), default=ASSUMED_LAST_LEVEL_CACHE)


def one_line(environment: dict[str, Any]) -> str:
    """The machine and the versions, for the head of a table."""
    machine, versions = environment["machine"], environment["versions"]
    sizes = ", ".join(f"{name} {_size(size)}" for name, size in machine["caches"].items())
    return (
        f"{machine['cpu']}, {machine['processors']} processors, {sizes}, {machine['memory_gib']} GiB; "
        f"diffcam_fast {versions['diffcam_fast']} ({environment['cpu_capability'] or 'reference only'}), "
        f"torch {versions['torch']}, NumPy {versions['numpy']}, Python {versions['python']}"
    )


def commit_line(environment: dict[str, Any]) -> str:
    """The commit, and whether the files were those of the commit."""
    if environment["commit"] is None:
        return "none (not a Git work tree with a commit)"
    return environment["commit"] + ("" if environment["clean"] else ", with uncommitted changes")


def _commit() -> dict[str, Any]:
    # The results themselves change with every run, and say nothing about the code that was measured.
    status = _git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    return {
        "commit": _git("rev-parse", "--verify", "--quiet", "HEAD") or None,
        "clean": None if status is None else status == "",
    }


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        # No git, or no repository: the record says that the commit is not known.
        return None
    return result.stdout.strip()


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _size(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"
