"""`cam` on batches far larger than the cache: beside a copy, Triton and eager PyTorch, and beside torch.compile."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.gpu.cam_inputs import DTYPES, LAYOUTS, Inputs, Kind
from benchmarks.gpu.case import Case
from benchmarks.gpu.timing import CopyCeiling, Settings, compare
from benchmarks.report import Row
from diffcam_fast.backends import absent_because, serving, use_backend
from diffcam_fast.reference.cam import METHODS

#: Channels, height, width of a network's last layers.
LAYERS = ((2048, 7, 7), (1024, 14, 14), (512, 28, 28), (256, 56, 56))

#: Bytes of activations and gradients together. More than is asked for, so that the clock's own error is small.
BYTES = 512 << 20


def kinds(settings: Settings) -> list[Kind]:
    """What is measured, the most telling first: every shape before every layout, dtype and method."""
    if settings.quick:
        return [Kind("gradcam", (2, 64, 7, 7), layout, torch.float32) for layout in LAYOUTS]
    return [
        Kind(
            method, (BYTES // (2 * dtype.itemsize * channels * height * width), channels, height, width), layout, dtype
        )
        for method in METHODS
        for dtype in DTYPES
        for layout in LAYOUTS
        for channels, height, width in LAYERS
    ]


def cases(settings: Settings) -> list[Case]:
    """Ours, Triton, eager and the copy."""
    ceiling = CopyCeiling(settings)
    return [Case(kind.label, partial(_measure, kind, ceiling, settings)) for kind in kinds(settings)]


def _measure(kind: Kind, ceiling: CopyCeiling, settings: Settings) -> Row:
    inputs = Inputs(kind, settings.cold_copies(kind.bytes), settings)
    contenders = {"ours": inputs.ours(), "eager": inputs.eager(), "copy": ceiling.candidate}
    timings, errors = compare(contenders, kind.label, len(inputs.pairs), settings)
    mine = timings["ours"]
    row = {
        **kind.columns(),
        "backend": serving(settings.device),
        "error": errors["ours"],
        "rounds": mine.rounds,
        **mine.milliseconds(),
        "gb_per_s": 1e-9 * kind.bytes / mine.median,
        "copy_gb_per_s": ceiling.gb_per_s(timings["copy"]),
        "eager_ms": 1e3 * timings["eager"].median,
        "vs_eager": mine.median / timings["eager"].median,
    }
    row["share_of_copy"] = row["gb_per_s"] / row["copy_gb_per_s"]
    if absent_because("triton") is None and settings.on_gpu:
        with use_backend("triton"):
            contenders = {"ours": inputs.ours(), "copy": ceiling.candidate}
            timings, errors = compare(contenders, f"{kind.label}, triton", len(inputs.pairs), settings)
        row["triton_ms"] = 1e3 * timings["ours"].median
        row["triton_share"] = 1e-9 * kind.bytes / timings["ours"].median / ceiling.gb_per_s(timings["copy"])
    return row


def compile_cases(settings: Settings) -> list[Case]:
    """Ours and torch.compile; as many as there is time for."""
    return [Case(kind.label, partial(_measure_compiled, kind, settings), seconds=15.0) for kind in _by_value(settings)]


def _by_value(settings: Settings) -> list[Kind]:
    """First one of every shape for the default method, then dtypes and layouts, then the other methods."""
    found = kinds(settings)
    methods = list(dict.fromkeys(kind.method for kind in found))
    return sorted(found, key=lambda kind: (methods.index(kind.method), kind.dtype != torch.float32))


def _measure_compiled(kind: Kind, settings: Settings) -> Row:
    inputs = Inputs(kind, settings.cold_copies(kind.bytes), settings)
    contenders = {"ours": inputs.ours(), "compile": inputs.compiled()}
    timings, _ = compare(contenders, kind.label, len(inputs.pairs), settings)
    return {
        **kind.columns(),
        "ours_beside_compile_ms": 1e3 * timings["ours"].median,
        "compile_ms": 1e3 * timings["compile"].median,
        "vs_compile": timings["ours"].median / timings["compile"].median,
    }
