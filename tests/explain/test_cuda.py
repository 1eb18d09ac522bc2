"""On a GPU: the same maps, and nothing waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch
from torch import Tensor

from diffcam_fast.explain import (
    Explainer,
    Explanation,
    Finer,
    Logit,
    LogitDifference,
    LogProbability,
    Target,
    tokens_to_positions,
)
from tests.explain.networks import NETWORKS, InPlaceAfter, PooledConvolutions, Residual, Tapped, Tokens, make
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
    for _ in range(2):  # libraries set themselves up; the first pass checks what the later ones rely on
        explainer(images, asked).maps.sum()
    with _waiting_is_an_error():
        maps = explainer(images, asked).maps
    assert maps.isfinite().all()


def _same(found: Explanation, expected: Explanation) -> None:
    assert (found.maps - expected.maps).abs().max() <= PEER_SHARE_OF_RANGE
    for name, maps in expected.layer_maps.items():
        assert (found.layer_maps[name] - maps).abs().max() <= PEER_SHARE_OF_RANGE
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.delta, expected.delta)
    assert torch.equal(found.classes, expected.classes)


def test_all_classes_wait_for_nothing() -> None:
    network = make(PooledConvolutions, torch.float32)
    images = network.images(dtype=torch.float32)
    classes = [[0, 1, 2, 3, 4] * 4] * 2
    expected = Explainer(network, "layer")(images, classes)
    network.cuda()
    on_device = torch.tensor(classes).cuda()
    explainer = Explainer(network, "layer")
    for _ in range(2):
        explainer(images.cuda(), on_device)
    images = images.cuda()
    with _waiting_is_an_error():
        found = explainer(images, on_device)
        maps = found.maps
    assert (maps.cpu() - expected.maps).abs().max() <= PEER_SHARE_OF_RANGE


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("kind", [PooledConvolutions, InPlaceAfter, Residual])
class TestCapture:
    def _setting(
        self, kind: type[Tapped], precision: str, layout: torch.memory_format
    ) -> tuple[Tapped, Tensor, AbstractContextManager[None]]:
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        network = make(kind, dtype).cuda().to(memory_format=layout)
        images = network.images(dtype=dtype).cuda().to(memory_format=layout)
        return network, images, torch.autocast("cuda", torch.bfloat16) if precision == "autocast" else nullcontext()

    def test_equals_the_explainer(self, kind: type[Tapped], precision: str, layout: torch.memory_format) -> None:
        network, images, context = self._setting(kind, precision, layout)
        explainer = Explainer(network, network.layers)
        with context:
            captured = explainer.capture(images)
            batches = [torch.randn_like(images) for _ in range(3)]
            expected = [explainer(batch) for batch in batches]
            with _waiting_is_an_error():
                found = [captured(batch) for batch in batches]
        for one, other in zip(found, expected, strict=True):
            _same(one, other)

    def test_classes_are_given_at_each_call(
        self, kind: type[Tapped], precision: str, layout: torch.memory_format
    ) -> None:
        network, images, context = self._setting(kind, precision, layout)
        explainer = Explainer(network, "layer", target=LogitDifference(top_k=2))
        with context:
            captured = explainer.capture(images, [[0, 1]] * 2)
            for classes in (None, [[2, 3], [4, 0]], torch.tensor([[1, 2], [3, 4]]).cuda()):
                found, expected = (
                    captured(images, classes),
                    explainer(images, [[0, 1]] * 2 if classes is None else classes),
                )
                _same(found, expected)
                assert torch.equal(found.rivals, expected.rivals)


class TestCaptured:
    def test_refuses_what_was_not_captured(self) -> None:
        network = make(PooledConvolutions, torch.float32).cuda()
        images = network.images(dtype=torch.float32).cuda()
        captured = Explainer(network).capture(images)
        with pytest.raises(ValueError, match=r"images: expected shape .* as captured"):
            captured(images[:1])
        with pytest.raises(ValueError, match="images: expected shape"):
            captured(images.cpu())
        with pytest.raises(ValueError, match="classes: this graph explains the predicted classes"):
            captured(images, 1)
        with pytest.raises(ValueError, match="classes: expected as many as were captured"):
            Explainer(network).capture(images, 1)(images, [[0, 1]] * 2)
        with pytest.raises(ValueError, match="example: expected the model on the images' device"):
            Explainer(make(PooledConvolutions, torch.float32)).capture(images)

    def test_on_a_side_stream_and_with_other_weights(self) -> None:
        network = make(PooledConvolutions, torch.float32).cuda()
        images = network.images(dtype=torch.float32).cuda()
        explainer = Explainer(network)
        captured = explainer.capture(images)
        with torch.no_grad():
            network.head.weight.normal_()
        expected = explainer(images)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        found = []
        for turn in range(6):
            with torch.cuda.stream(stream if turn % 2 else torch.cuda.current_stream()):
                found.append(captured(images if turn < 4 else torch.zeros_like(images)))
        torch.cuda.synchronize()
        for explanation in found[:4]:
            _same(explanation, expected)
        assert (found[5].logits - expected.logits).abs().max() > 0

    def test_leaves_the_model_as_it_was(self) -> None:
        network = make(PooledConvolutions, torch.float32).cuda().train()
        images = network.images(dtype=torch.float32).cuda()
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        captured = Explainer(network).capture(images)
        captured(images)
        assert network.training
        assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
        assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("kind", [PooledConvolutions, InPlaceAfter])
def test_side_streams(kind: type[Tapped]) -> None:
    network = make(kind, torch.float32).cuda()
    images = network.images(dtype=torch.float32).cuda()
    explainer = Explainer(network, "layer")
    expected = explainer(images)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = explainer(images)
        maps = found.maps
    stream.synchronize()
    assert (maps - expected.maps).abs().max() <= PEER_SHARE_OF_RANGE
