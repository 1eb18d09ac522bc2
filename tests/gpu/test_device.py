"""What makes an op at home on a GPU: its stream, its device, graphs, no waiting, few launches."""

from __future__ import annotations

import math
from unittest import SkipTest

import torch
from torch.profiler import ProfilerActivity, profile

from diffcam_fast.backends import absent_because, serving
from tests.gpu.cases import BACKENDS, DEVICE, KERNELS, Failures, each, forced, largest, need_gpu, waiting_is_an_error
from tests.gpu.ops import CALLS

#: Clock cycles that a stream is kept busy for: far longer than it takes to queue an op.
BUSY = 50_000_000


def test_compiled_kernels_serve_where_they_are() -> None:
    best = next(name for name in BACKENDS if absent_because(name) is None)
    assert serving(DEVICE) == best, f"{DEVICE} is served by {serving(DEVICE)}, the best there is {best}"


@each(backend=BACKENDS, call=CALLS)
def test_runs_on_the_current_stream(backend: str, call: str) -> None:
    need_gpu()
    failures = Failures()
    chosen = CALLS[call]
    expected = chosen(chosen.inputs)
    side = torch.cuda.Stream()
    with forced(backend):
        chosen(chosen.on())
        ready = chosen.on()
        late = tuple(torch.zeros_like(value) for value in ready)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            # On any other stream the op would run before its inputs are there.
            torch.cuda._sleep(BUSY)
            for empty, value in zip(late, ready, strict=True):
                empty.copy_(value)
            found = chosen(late)
        side.synchronize()
    chosen.compare(failures, found, expected, call)
    failures.report()


@each(backend=BACKENDS, call=CALLS)
def test_runs_on_the_tensors_device(backend: str, call: str) -> None:
    need_gpu()
    if torch.cuda.device_count() < 2:
        raise SkipTest("one GPU only")
    failures = Failures()
    chosen = CALLS[call]
    with forced(backend), torch.cuda.device(0):
        found = chosen(chosen.on("cuda:1"))
        failures.check(all(value.device == torch.device("cuda:1") for value in found), "results on another device")
        failures.check(torch.cuda.current_device() == 0, "the current device was changed")
    chosen.compare(failures, found, chosen(chosen.inputs), call)
    failures.report()


@each(backend=KERNELS, call=CALLS)
def test_is_captured_in_a_graph(backend: str, call: str) -> None:
    need_gpu()
    failures = Failures()
    chosen = CALLS[call]
    with forced(backend):
        held = chosen.on()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            chosen(held)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = chosen(held)
        for turn in range(3):
            fresh = tuple(
                value.flip(0) * 0.5 if value.is_floating_point() and turn == 1 else value for value in chosen.inputs
            )
            for empty, value in zip(held, fresh, strict=True):
                empty.copy_(value)
            for result in found:
                result.fill_(math.nan if result.is_floating_point() else 77)
            graph.replay()
            torch.cuda.synchronize()
            chosen.compare(failures, found, chosen(fresh), f"{call}, replay {turn}")
    failures.report()


@each(backend=BACKENDS, call=CALLS)
def test_nothing_waits_for_the_device(backend: str, call: str) -> None:
    need_gpu()
    chosen = CALLS[call]
    with forced(backend):
        inputs = chosen.on()
        chosen(inputs)
        with waiting_is_an_error():
            found = chosen(inputs)
    assert largest(found[0]) >= 0


@each(call=CALLS)
def test_few_launches_and_nothing_else(call: str) -> None:
    need_gpu()
    chosen = CALLS[call]
    with forced("cuda"):
        inputs = chosen.on()
        chosen(inputs)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            chosen(inputs)
            torch.cuda.synchronize()
    names = [event.name for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    if not names:
        raise SkipTest("the profiler sees no kernels on this machine")
    assert len(names) <= chosen.launches, f"at most {chosen.launches} launches; got {names}"
    assert all("diffcam" in name for name in names), names
