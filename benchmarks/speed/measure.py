"""Timing, as in `diffcam_fast.benchmark.measure`, with what only a comparison with torch.compile needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch._inductor.config

from diffcam_fast.backends import absent_because, forced_backend, serving
from diffcam_fast.backends.library import NAMESPACE
from diffcam_fast.benchmark.measure import (
    COLD_CACHES,
    QUICK,
    Candidate,
    Effort,
    ReadCeiling,
    Timing,
    WrongResult,
    check,
    cold_copies,
    compare,
    in_words,
    thread_counts,
    threads,
)

__all__ = [
    "COLD_CACHES",
    "QUICK",
    "Candidate",
    "Effort",
    "NotCompiled",
    "ReadCeiling",
    "Timing",
    "WrongResult",
    "beside",
    "check",
    "cold_copies",
    "compare",
    "compiled",
    "in_words",
    "require_compiled",
    "thread_counts",
    "threads",
]


class NotCompiled(Exception):
    """The compiled kernels do not serve, so there is nothing to compare."""


def require_compiled(op: str) -> None:
    """Refuse to compare where the reference would be compared with itself.

    Raises:
        NotCompiled: and why the compiled kernel does not serve.
    """
    if serving("cpu") != "cpu":
        reason = absent_because("cpu") or f"backend {forced_backend()!r} is forced"
        raise NotCompiled(f"{op} is served by the {serving('cpu')} backend: {reason}")
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", "CPU"):
        raise NotCompiled(f"{op} is served by the reference backend: the compiled library has no kernel for it")


def compiled(function: Callable[..., Any], *example: Any) -> Callable[..., Any]:
    """`torch.compile` of a function for one shape, compiled here and now for the threads in use.

    Args:
        function: what is compiled, as one graph.
        example: the arguments of a first call.
    """
    # What was compiled for other shapes counts against a limit, beyond which the function would run uncompiled.
    torch._dynamo.reset()
    fast = torch.compile(function, fullgraph=True, dynamic=False)
    # In this process: no pool of compilers is left behind on the processors.
    with torch._inductor.config.patch(compile_threads=1):
        fast(*example)
    return fast


def beside(timings: Mapping[str, Timing], errors: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    """Columns of those that "ours" is compared with: error, times, and our median as a share of theirs.

    Args:
        timings: from `compare`, "ours" among them.
        errors: from `compare`.
        names: of the others; those that were not timed are left out.
    """
    columns: dict[str, float] = {}
    for name in names:
        if name in timings:
            columns[f"{name}_error"] = errors[name]
            columns |= timings[name].milliseconds(f"{name}_")
            columns[f"vs_{name}"] = timings["ours"].median / timings[name].median
    return columns
