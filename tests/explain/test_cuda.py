"""On a GPU: the same maps, and nothing waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from diffcam_fast.explain import Explainer, Finer, Logit, LogitDifference, LogProbability, Target, tokens_to_positions
from tests.explain.networks import NETWORKS, Tapped, Tokens, make
from tests.tolerances import PEER_SHARE_OF_RANGE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("kind", NETWORKS)
def test_maps_agree_with_the_cpu(kind: type[Tapped]) -> None:
    network = make(kind)
    images = network.images()
    reshape = tokens_to_positions() if kind is Tokens else None
    expected = Explainer(network, network.layers, reshape=reshape)(images, [[0, 1]] * 2)
    found = Explainer(network.cuda(), network.layers, reshape=reshape)(images.cuda(), [[0, 1]] * 2)
    assert found.maps.is_cuda
    assert (found.maps.cpu() - expected.maps).abs().max() <= PEER_SHARE_OF_RANGE


@pytest.mark.parametrize("classes", ["predicted", "one", "host", "device"])
@pytest.mark.parametrize(
    "target",
    [LogitDifference(), LogitDifference(top_k=2, pairwise=True), Finer(), Logit(), LogProbability()],
    ids=str,
)
@pytest.mark.parametrize("kind", NETWORKS)
def test_nothing_waits_for_the_device(kind: type[Tapped], target: Target, classes: str) -> None:
    network = make(kind, torch.float32).cuda()
    images = network.images(dtype=torch.float32).cuda()
    asked = {"predicted": None, "one": 1, "host": [[0, 1]] * 2, "device": torch.tensor([[0, 1]] * 2).cuda()}[classes]
    reshape = tokens_to_positions() if kind is Tokens else None
    explainer = Explainer(network, network.layers, target=target, reshape=reshape)
    explainer(images, asked).maps.sum()  # libraries set themselves up
    with _waiting_is_an_error():
        maps = explainer(images, asked).maps
    assert maps.isfinite().all()
