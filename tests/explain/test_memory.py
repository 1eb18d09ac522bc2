"""How much memory an explanation takes at its peak, counted allocation by allocation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from diffcam_fast.explain import Explainer


def _peak(work: Callable[[], Any]) -> int:
    """Bytes allocated at the same time, at most."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = work()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    del result
    return peak


class Network(nn.Module):
    """A trunk that needs much memory, a layer that needs less, and a tail."""

    def __init__(self, tail: nn.Module) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2))
        self.layer = nn.Conv2d(32, 16, 3, padding=1)
        self.tail = tail

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.layer(self.trunk(x)))


POOLED = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 100))
DEEP = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(16, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 256, 10))
ACTIVATIONS = 4 * 16 * 32 * 32 * 4
#: Maps, logits and what else is small.
SLACK = 4 * 32 * 32 * 4 * 8


def _measured(tail: nn.Module) -> tuple[int, int]:
    torch.manual_seed(0)
    network = Network(tail).eval()
    images = torch.randn(4, 3, 64, 64)
    explainer = Explainer(network, "layer", size=None)

    def plain() -> Tensor:
        with torch.inference_mode():
            return network(images)

    for _ in range(2):
        plain()
        explainer(images)
    return _peak(plain), _peak(lambda: explainer(images))


@pytest.mark.parametrize("tail", [POOLED, DEEP], ids=["pooled", "deep"])
def test_no_more_than_inference_activations_and_gradients(tail: nn.Module) -> None:
    plain, explained = _measured(tail)
    assert explained <= plain + 2 * ACTIVATIONS + SLACK


def test_the_trunk_keeps_nothing() -> None:
    """The peak of this network is in its trunk, where explaining adds nothing."""
    plain, explained = _measured(POOLED)
    assert plain >= 4 * 32 * 64 * 64 * 4
    assert explained <= plain + SLACK


def test_nothing_stays_allocated() -> None:
    torch.manual_seed(0)
    network = Network(DEEP).eval()
    images = torch.randn(4, 3, 64, 64)
    explainer = Explainer(network, ["layer", "trunk"])
    for _ in range(2):
        explainer(images).maps.sum()  # the weights of an interpolation are kept
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        for _ in range(3):
            explainer(images, [[0, 1, 2]] * 4).maps.sum()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert len(events) > 100
    assert sum(event.nbytes() for event in events) == 0
