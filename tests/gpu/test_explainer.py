"""The explainer on a GPU: the maps of the CPU, nothing that waits, half precision, graphs, compiled models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import diffcam_fast as dcf
from tests.explain.networks import NETWORKS, Tapped, Tokens, make
from tests.gpu.cases import BACKENDS, DEVICE, Failures, each, forced, largest, need_gpu, waiting_is_an_error
from tests.tolerances import PEER_SHARE_OF_RANGE

KINDS = {kind.__name__: kind for kind in NETWORKS}

TARGETS = {
    "logsumexp": dcf.LogitDifference(),
    "pairwise": dcf.LogitDifference(top_k=2, pairwise=True),
    "finer": dcf.Finer(),
    "logit": dcf.Logit(),
    "log probability": dcf.LogProbability(),
}

#: bfloat16 has 8 bits; what a small network makes of them.
HALF_SHARE_OF_RANGE = 0.15


def _explainer(network: Tapped, **options: Any) -> dcf.Explainer:
    reshape = dcf.tokens_to_positions() if isinstance(network, Tokens) else None
    return dcf.Explainer(network, network.layers, reshape=reshape, **options)


def _images(network: Tapped, dtype: torch.dtype, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return network.images(dtype=dtype)


@each(backend=BACKENDS, kind=KINDS)
def test_maps_are_those_of_the_cpu(backend: str, kind: str) -> None:
    failures = Failures()
    network = make(KINDS[kind])
    images = _images(network, torch.float64)
    expected = {name: _explainer(network, target=target)(images, [[0, 1]] * 2).maps for name, target in TARGETS.items()}
    network = network.to(DEVICE)
    with forced(backend):
        for name, target in TARGETS.items():
            found = _explainer(network, target=target)(images.to(DEVICE), [[0, 1]] * 2).maps
            failures.check(found.device.type == DEVICE, f"{name}: maps on {found.device}")
            failures.at_most(largest(found.cpu() - expected[name]), PEER_SHARE_OF_RANGE, name)
    failures.report()


@each(backend=BACKENDS, kind=KINDS)
def test_nothing_waits_for_the_device(backend: str, kind: str) -> None:
    need_gpu()
    failures = Failures()
    network = make(KINDS[kind], torch.float32).to(DEVICE)
    images = _images(network, torch.float32).to(DEVICE)
    classes = {"predicted": None, "one": 1, "host": [[0, 1]] * 2, "device": torch.tensor([[0, 1]] * 2).to(DEVICE)}
    with forced(backend):
        for name, target in TARGETS.items():
            explainer = _explainer(network, target=target)
            for asked in classes.values():
                explainer(images, asked)
            with waiting_is_an_error():
                found = [explainer(images, asked).maps for asked in classes.values()]
            failures.check(all(bool(maps.isfinite().all()) for maps in found), f"{name}: not finite")
    failures.report()


@each(backend=BACKENDS, kind=("PooledConvolutions", "Residual", "Tokens"))
def test_half_precision(backend: str, kind: str) -> None:
    failures = Failures()
    network = make(KINDS[kind], torch.float32).to(DEVICE)
    images = _images(network, torch.float32).to(DEVICE)
    with forced(backend):
        expected = _explainer(network, relu=False)(images, 1).maps
        with torch.autocast(DEVICE, torch.bfloat16):
            autocast = _explainer(network, relu=False)(images, 1).maps
        half = _explainer(network.bfloat16(), relu=False)(images.bfloat16(), 1).maps
    for name, found in (("autocast", autocast), ("bfloat16", half)):
        failures.check(found.dtype == torch.float32, f"{name}: {found.dtype}")
        failures.at_most(largest(found - expected), HALF_SHARE_OF_RANGE, name)
    failures.report()


@each(backend=BACKENDS)
def test_channels_last(backend: str) -> None:
    network = make(KINDS["PooledConvolutions"], torch.float32).to(DEVICE)
    images = _images(network, torch.float32).to(DEVICE)
    with forced(backend):
        expected = _explainer(network)(images, 1).maps
        network = network.to(memory_format=torch.channels_last)
        found = _explainer(network)(images.contiguous(memory_format=torch.channels_last), 1).maps
    assert largest(found - expected) <= PEER_SHARE_OF_RANGE


@each(backend=BACKENDS, kind=("PooledConvolutions", "InPlaceAfter", "Residual", "Volume", "Tokens"))
def test_a_captured_explanation_is_the_same(backend: str, kind: str) -> None:
    need_gpu()
    failures = Failures()
    network = make(KINDS[kind], torch.float32).to(DEVICE)
    with forced(backend):
        explainer = _explainer(network)
        captured = explainer.capture(_images(network, torch.float32).to(DEVICE))
        for seed in (1, 2, 3):
            images = _images(network, torch.float32, seed).to(DEVICE)
            expected = explainer(images)
            with waiting_is_an_error():
                found = captured(images)
            failures.at_most(largest(found.maps - expected.maps), PEER_SHARE_OF_RANGE, f"images {seed}: maps")
            failures.at_most(largest(found.logits - expected.logits), 1e-4, f"images {seed}: logits")
            failures.same(found.classes, expected.classes, f"images {seed}: classes")
    failures.report()


@each(backend=BACKENDS)
def test_a_compiled_model(backend: str) -> None:
    network = make(KINDS["PooledConvolutions"], torch.float32).to(DEVICE)
    images = _images(network, torch.float32).to(DEVICE)
    compiled: nn.Module = torch.compile(network)
    with forced(backend):
        expected = _explainer(network)(images, 1).maps
        compiled(images)
        found = dcf.Explainer(compiled, network.layers)(images, 1).maps
    assert largest(found - expected) <= PEER_SHARE_OF_RANGE


@each(backend=BACKENDS)
def test_a_compiled_explainer(backend: str) -> None:
    network = make(KINDS["PooledConvolutions"], torch.float32).to(DEVICE)
    images = _images(network, torch.float32).to(DEVICE)
    with forced(backend):
        explainer = _explainer(network)
        expected = explainer(images, 1).maps
        found = explainer.compile()(images, 1).maps
    assert largest(found - expected) <= PEER_SHARE_OF_RANGE
