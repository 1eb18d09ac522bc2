"""`cam` on one image: what the GPU needs, launch after launch in a graph, and what a call from Python costs."""

from __future__ import annotations

from functools import partial

import torch

import diffcam_fast as dcf
from benchmarks.gpu.cam_inputs import DTYPES, LAYOUTS, Inputs, Kind
from benchmarks.gpu.case import Case
from benchmarks.gpu.timing import Settings, captured, in_turns, whole_calls
from benchmarks.report import Row
from benchmarks.speed.measure import check
from diffcam_fast.backends import serving
from diffcam_fast.reference.cam import METHODS

SHAPE = (1, 2048, 7, 7)

#: Launches in a graph; the time of one is that of the graph by their number, gaps between launches included.
LAUNCHES = 300


def kinds(settings: Settings) -> list[Kind]:
    """The default method in all forms, the others in the plainest."""
    if settings.quick:
        return [Kind("gradcam", (1, 64, 7, 7), "contiguous", torch.float32)]
    found = [Kind("gradcam", SHAPE, layout, dtype) for dtype in DTYPES for layout in LAYOUTS]
    return found + [Kind(method, SHAPE, "contiguous", torch.float32) for method in METHODS if method != "gradcam"]


def cases(settings: Settings) -> list[Case]:
    """Ours and eager."""
    return [Case(kind.label, partial(_measure, kind, settings)) for kind in kinds(settings)]


def _measure(kind: Kind, settings: Settings) -> Row:
    copies = settings.cold_copies(kind.bytes)
    inputs = Inputs(kind, copies, settings)
    launches = 3 if settings.quick else max(LAUNCHES, copies)
    contenders = {"ours": inputs.ours(), "eager": inputs.eager()}
    errors = check(contenders, kind.label)
    cold = in_turns(
        {name: captured(one.run, copies, launches, settings) for name, one in contenders.items()}, 1, settings, launches
    )
    warm = in_turns(
        {name: captured(one.run, 1, launches, settings) for name, one in contenders.items()}, 1, settings, launches
    )
    activations, gradients = inputs.pairs[0]
    calls = whole_calls(
        {
            "ours": lambda: dcf.cam(activations, gradients, kind.method),
            "add": lambda: torch.add(activations, gradients),
            "eager": lambda: contenders["eager"].run(0),
        },
        settings,
    )
    return {
        **kind.columns(),
        "backend": serving(settings.device),
        "error": errors["ours"],
        "gpu_us": 1e6 * cold["ours"].median,
        "gpu_us_p20": 1e6 * cold["ours"].p20,
        "gpu_us_p80": 1e6 * cold["ours"].p80,
        "warm_gpu_us": 1e6 * warm["ours"].median,
        "eager_gpu_us": 1e6 * cold["eager"].median,
        "vs_eager": cold["ours"].median / cold["eager"].median,
        "call_us": 1e6 * calls["ours"].median,
        "add_us": 1e6 * calls["add"].median,
        "eager_call_us": 1e6 * calls["eager"].median,
        "call_vs_add": calls["ours"].median / calls["add"].median,
    }


def compile_cases(settings: Settings) -> list[Case]:
    """Ours and torch.compile, both in graphs."""
    return [Case(kind.label, partial(_measure_compiled, kind, settings), seconds=15.0) for kind in kinds(settings)[:4]]


def _measure_compiled(kind: Kind, settings: Settings) -> Row:
    copies = settings.cold_copies(kind.bytes)
    inputs = Inputs(kind, copies, settings)
    launches = 3 if settings.quick else max(LAUNCHES, copies)
    contenders = {"ours": inputs.ours(), "compile": inputs.compiled()}
    check(contenders, kind.label)
    graphs = {name: captured(one.run, copies, launches, settings) for name, one in contenders.items()}
    timings = in_turns(graphs, 1, settings, launches)
    return {
        **kind.columns(),
        "compile_gpu_us": 1e6 * timings["compile"].median,
        "vs_compile": timings["ours"].median / timings["compile"].median,
    }
