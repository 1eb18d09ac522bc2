"""An explanation changes nothing: not the model, not gradients, not modes, whoever else uses the model meanwhile."""

from __future__ import annotations

import gc
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from diffcam_fast.explain import Explainer, LogitDifference, tokens_to_positions
from tests.explain.networks import InPlaceAfter, PooledConvolutions, Residual, Tapped, Tokens, make
from tests.tolerances import PEER_SHARE_OF_RANGE


def _state(model: nn.Module) -> dict[str, Any]:
    """Everything about a model and its surroundings that an explanation could leave a trace in."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "training": [module.training for module in model.modules()],
        "hooks": [list(getattr(module, name)) for module in model.modules() for name in hooks],
        "attributes": [sorted(module.__dict__) for module in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "grad": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "grad identity": [id(parameter.grad) for parameter in model.parameters()],
        "values": [tensor.clone() for tensor in model.state_dict().values()],
        "versions": [p._version for p in [*model.parameters(), *model.buffers()] if not p.is_inference()],
        "random": torch.get_rng_state(),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()),
        "threads": torch.get_num_threads(),
    }


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    before = _state(model)
    yield
    for name, value in _state(model).items():
        assert _same(value, before[name]), f"{name} changed"


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, list):
        return len(one) == len(other) and all(_same(*pair) for pair in zip(one, other, strict=True))
    return bool(one == other)


@contextmanager
def _both(one: AbstractContextManager[Any], other: AbstractContextManager[Any]) -> Iterator[None]:
    with one, other:
        yield


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "plain": nullcontext,
    "no_grad": torch.no_grad,
    "enable_grad inside no_grad": lambda: _both(torch.no_grad(), torch.enable_grad()),
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast in inference_mode": lambda: _both(torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)),
}


@pytest.mark.parametrize("layers", [None, "layer", ["early", "layer"]], ids=str)
@pytest.mark.parametrize("surroundings", SURROUNDINGS)
@pytest.mark.parametrize("training", ["eval", "train", "mixed"])
def test_leaves_no_trace(surroundings: str, training: str, layers: Any) -> None:
    network = make(PooledConvolutions, torch.float32)
    images = network.images(dtype=torch.float32)
    expected = Explainer(network, layers)(images, [[0, 1]] * 2)
    if training != "eval":
        network.train()
    if training == "mixed":
        network.early[1].eval()
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    with SURROUNDINGS[surroundings](), _unchanged(network):
        explanation = Explainer(network, layers)(images, [[0, 1]] * 2)
        maps = explanation.maps
    assert explanation.layers == expected.layers
    if "autocast" in surroundings:
        assert explanation.logits.dtype == torch.bfloat16
        assert maps.dtype == torch.float32
        assert (maps - expected.maps).abs().mean() < 0.02
    else:
        assert torch.equal(maps, expected.maps)
        assert torch.equal(explanation.logits, expected.logits)
    assert not images.requires_grad


def test_images_made_in_inference_mode() -> None:
    network = make(PooledConvolutions, torch.float32)
    with torch.inference_mode():
        images = network.images(dtype=torch.float32)
        inside = Explainer(network)(images).maps
    assert torch.equal(Explainer(network)(images).maps, inside)
    assert torch.equal(Explainer(network)(images.clone()).maps, inside)


def test_images_made_in_inference_mode_that_the_tail_uses() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return (self.layer(x) * x).mean((2, 3))

    model = Gated()
    with torch.inference_mode():
        images = torch.randn(2, 3, 8, 8)
    expected = Explainer(model, "layer")(images.clone()).maps
    assert torch.equal(Explainer(model, "layer")(images).maps, expected)


def test_images_that_require_gradients() -> None:
    network = make(InPlaceAfter)
    images = network.images().requires_grad_()
    explanation = Explainer(network, "layer")(images)
    assert images.grad is None
    assert not explanation.maps.requires_grad
    assert not explanation.logits.requires_grad


def test_frozen_parameters() -> None:
    network = make(Residual)
    images = network.images()
    expected = Explainer(network, network.layers)(images).maps
    network.requires_grad_(False)
    with _unchanged(network):
        frozen = Explainer(network, network.layers)(images).maps
    assert torch.equal(frozen, expected)


@pytest.mark.parametrize("kind", [PooledConvolutions, InPlaceAfter, Tokens])
def test_bfloat16(kind: type[Tapped]) -> None:
    network = make(kind, torch.float32)
    images = network.images(4, torch.float32)
    reshape = tokens_to_positions() if kind is Tokens else None
    expected = Explainer(network, "layer", reshape=reshape)(images, [[0, 1]] * 4)
    network.bfloat16()
    explanation = Explainer(network, "layer", reshape=reshape)(images.bfloat16(), [[0, 1]] * 4)
    assert explanation.logits.dtype == torch.bfloat16
    assert explanation.maps.dtype == explanation.delta.dtype == torch.float32
    assert (explanation.maps - expected.maps).abs().mean() < 0.03


@pytest.mark.parametrize("kind", [PooledConvolutions, InPlaceAfter, Residual])
def test_channels_last(kind: type[Tapped]) -> None:
    network = make(kind, torch.float32)
    images = network.images(dtype=torch.float32)
    expected = Explainer(network, network.layers)(images, [[0, 1]] * 2).maps
    network.to(memory_format=torch.channels_last)
    found = Explainer(network, network.layers)(images.to(memory_format=torch.channels_last), [[0, 1]] * 2).maps
    assert (found - expected).abs().max() <= PEER_SHARE_OF_RANGE


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_weights_that_autocast_has_cached_are_not_used(mode: Callable[[], AbstractContextManager[Any]]) -> None:
    network = make(PooledConvolutions, torch.float32)
    images = network.images(dtype=torch.float32)
    with mode(), torch.autocast("cpu", torch.bfloat16):
        logits = network(images)
        explanation = Explainer(network, "early")(images)
    assert torch.equal(explanation.logits, logits)


def test_autocast_caches_nothing_of_an_explanation() -> None:
    network = make(PooledConvolutions, torch.float32)
    images = network.images(dtype=torch.float32)
    caching = []
    for module in (network.early, network.head):
        module.register_forward_hook(lambda *args: caching.append(torch.is_autocast_cache_enabled()))
    with torch.autocast("cpu", torch.bfloat16):
        Explainer(network, "layer")(images)
        assert caching == [False, False]
        network(images).float().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


class TestAfterErrors:
    def _fails(self, explainer: Explainer, images: Tensor, error: type[Exception], message: str) -> None:
        for surroundings in SURROUNDINGS.values():
            with surroundings(), _unchanged(explainer.model), pytest.raises(error, match=message):
                explainer(images)

    @pytest.mark.parametrize("layers", [None, "layer"])
    def test_the_model_raises(self, layers: str | None) -> None:
        network = make(PooledConvolutions, torch.float32).train()

        def fail(module: nn.Module, inputs: Any) -> None:
            raise KeyError("broken head")

        network.head.register_forward_pre_hook(fail)
        self._fails(Explainer(network, layers), network.images(dtype=torch.float32), KeyError, "broken head")

    def test_the_backward_raises(self) -> None:
        network = make(InPlaceAfter, torch.float32).train()

        class Broken(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return x.clone()

            @staticmethod
            def backward(ctx: Any, gradient: Tensor) -> Tensor:
                raise KeyError("broken backward")

        network.head[2].forward = Broken.apply
        explainer = Explainer(network, "layer")
        self._fails(explainer, network.images(dtype=torch.float32), KeyError, "broken backward")

    def test_the_target_raises(self) -> None:
        network = make(InPlaceAfter, torch.float32).train()
        explainer = Explainer(network, "layer", target=lambda z, c: z[:, 99])
        self._fails(explainer, network.images(dtype=torch.float32), IndexError, "out of bounds")

    def test_a_layer_cannot_be_hooked(self) -> None:
        network = make(PooledConvolutions, torch.float32)

        def refuse(*args: Any, **options: Any) -> None:
            raise RuntimeError("no hooks here")

        network.layer.register_forward_hook = refuse
        explainer = Explainer(network, ["early", "layer"])
        self._fails(explainer, network.images(dtype=torch.float32), RuntimeError, "no hooks here")


class TestThreads:
    @pytest.fixture(autouse=True)
    def frequent_switches(self) -> Iterator[None]:
        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        yield
        sys.setswitchinterval(before)

    def _run(self, jobs: list[Callable[[], None]]) -> None:
        start = threading.Barrier(len(jobs))

        def run(job: Callable[[], None]) -> None:
            start.wait()
            job()

        with ThreadPoolExecutor(len(jobs)) as pool:
            for future in [pool.submit(run, job) for job in jobs]:
                future.result()

    @pytest.mark.parametrize("layers", [None, ["early", "layer"]], ids=str)
    @pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
    def test_one_explainer(self, layers: Any, training: bool) -> None:
        network = make(PooledConvolutions, torch.float32)
        batches = [network.images(2, torch.float32) for _ in range(4)]
        expected = [Explainer(network, layers)(images, [[0, 1]] * 2).maps for images in batches]
        network.train(training)
        explainer = Explainer(network, layers)

        def job(index: int) -> Callable[[], None]:
            def explain() -> None:
                for _ in range(25):
                    assert torch.equal(explainer(batches[index], [[0, 1]] * 2).maps, expected[index])

            return explain

        with _unchanged(network):
            self._run([job(index) for index in range(4)])

    def test_several_explainers_and_plain_inference_on_one_model(self) -> None:
        network = make(PooledConvolutions, torch.float32)
        images = network.images(2, torch.float32)
        logits = network(images).detach()

        def explains(layers: Any, target: Any) -> Callable[[], None]:
            explainer = Explainer(network, layers, target=target)
            expected = explainer(images).maps

            def explain() -> None:
                for _ in range(25):
                    assert torch.equal(explainer(images).maps, expected)

            return explain

        def infer() -> None:
            for _ in range(100):
                with torch.no_grad():
                    output = network(images)
                assert output.grad_fn is None
                assert torch.equal(output, logits)

        jobs = [explains("early", LogitDifference()), explains(None, LogitDifference("max")), infer]
        with _unchanged(network):
            self._run([*jobs, explains(["layer", "early"], LogitDifference(top_k=2))])

    def test_hooks_registered_at_the_same_time_are_all_called(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def slow(self: RemovableHandle, hooks: Any, *, extra_dict: Any = None) -> None:
            number = RemovableHandle.next_id
            time.sleep(0.001)
            initialise(self, hooks, extra_dict=extra_dict)
            self.id = number

        initialise = RemovableHandle.__init__
        network = make(PooledConvolutions, torch.float32)
        images = network.images(2, torch.float32)
        explainer = Explainer(network, "layer")
        monkeypatch.setattr(RemovableHandle, "__init__", slow)
        with _unchanged(network):
            self._run([lambda: [explainer(images) for _ in range(10)]] * 4)


def test_nothing_is_kept_in_memory() -> None:
    network = make(PooledConvolutions, torch.float32)
    explainer = Explainer(network, ["early", "layer"])
    kept = []
    network.layer.register_forward_hook(lambda module, inputs, output: kept.append(weakref.ref(output)))
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            explainer(network.images(dtype=torch.float32), [[0, 1, 2]] * 2).maps.sum()
        assert [reference() for reference in kept] == [None] * 3
    finally:
        gc.enable()
