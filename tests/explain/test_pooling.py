"""Max pooling on channels-last copies: the same bits, where it serves and where it must not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from diffcam_fast.compat.captum import LayerGradCam
from diffcam_fast.compat.pytorch_grad_cam import EigenCAM, GradCAM
from diffcam_fast.compat.torchcam.methods import CAM
from diffcam_fast.compat.torchcam.methods import GradCAM as TorchcamGradCAM
from diffcam_fast.explain import Explainer, pooling
from diffcam_fast.explain.capture import Capture
from diffcam_fast.explain.pooling import FasterPooling, max_poolings
from tests.explain.test_side_effects import _unchanged

SPECIAL = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1.0, -1.0, 2.0])


@contextmanager
def _noted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Size]]:
    """The shapes of what was pooled on copies."""
    found: list[torch.Size] = []
    pooled = pooling._pooled
    with monkeypatch.context() as patch:

        def noting(layer: nn.Module, images: Tensor, **options: Any) -> Any:
            found.append(images.shape)
            return pooled(layer, images, **options)

        patch.setattr(pooling, "_pooled", noting)
        yield found


def _images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    whole = {4: torch.int32, 2: torch.int16}[one.dtype.itemsize]
    # The payload of a NaN is nobody's to rely on.
    same = (one.view(whole) == other.view(whole)) | (one.isnan() & other.isnan())
    return one.stride() == other.stride() and bool(same.all())


@st.composite
def _poolings(draw: st.DrawFn) -> nn.MaxPool2d:
    def pair(low: int, high: int) -> tuple[int, int]:
        return draw(st.integers(low, high)), draw(st.integers(low, high))

    kernel = pair(1, 4)
    padding = tuple(draw(st.integers(0, length // 2)) for length in kernel)
    return nn.MaxPool2d(kernel, pair(1, 3), padding, pair(1, 2), ceil_mode=draw(st.booleans()))


@given(
    layer=_poolings(),
    shape=st.tuples(st.integers(1, 4), st.integers(16, 70), st.integers(8, 24), st.integers(8, 24)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    values=st.sampled_from([2**9, 2**13, 2**20]),
    special=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_same_bits(
    layer: nn.MaxPool2d, shape: tuple[int, ...], dtype: torch.dtype, values: int, special: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    if special:
        images = SPECIAL[torch.randint(len(SPECIAL), shape, generator=generator)].to(dtype)
    else:
        images = torch.randn(shape, generator=generator).to(dtype)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(pooling, "_VALUES", 1)
        patch.setattr(pooling, "_VALUES_AT_A_TIME", values)
        expected = layer(images)
        with _noted(patch) as noted, FasterPooling([layer]):
            found = layer(images)
    assert noted == [images.shape]
    assert _same_bits(found, expected)


@given(
    layer=_poolings(),
    shape=st.tuples(st.integers(1, 3), st.integers(16, 40), st.integers(8, 20), st.integers(8, 20)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_same_gradients(layer: nn.MaxPool2d, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Ties, as a ReLU makes them.
    images = torch.randn(shape, generator=generator).relu().to(dtype).requires_grad_()
    expected = layer(images)
    gradient = torch.randn(expected.shape, generator=generator).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pooling, "_VALUES", 1)
        patch.setattr(pooling, "_VALUES_AT_A_TIME", 2**11)
        with _noted(patch) as noted, FasterPooling([layer], recorded=True):
            found = layer(images)
    assert noted == [images.shape]
    assert _same_bits(found.detach(), expected.detach())
    (mine,), (theirs,) = (torch.autograd.grad(pooled, images, gradient) for pooled in (found, expected))
    assert _same_bits(mine, theirs)


class TestRecorded:
    def test_second_derivatives(self) -> None:
        layer, images = nn.MaxPool2d(3, 2, 1), _images(1, 16, 64, 64).requires_grad_()

        def second() -> Tensor:
            (first,) = torch.autograd.grad((layer(images) ** 3).sum(), images, create_graph=True)
            return torch.autograd.grad(first.square().sum(), images)[0]

        expected = second()
        with FasterPooling([layer], recorded=True):
            found = second()
        assert torch.equal(found, expected)
        assert expected.any()

    def test_changes_in_place_are_noticed(self) -> None:
        layer, images = nn.MaxPool2d(3, 2, 1), _images(1, 16, 64, 64).requires_grad_()
        changed = images + 1
        with FasterPooling([layer], recorded=True):
            pooled = layer(changed)
        changed.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            pooled.sum().backward()

    def test_derivatives_that_go_forward(self, monkeypatch: pytest.MonkeyPatch) -> None:
        layer, images = nn.MaxPool2d(3, 2, 1), _images(1, 16, 64, 64).requires_grad_()
        with torch.autograd.forward_ad.dual_level(), _noted(monkeypatch) as noted:
            dual = torch.autograd.forward_ad.make_dual(images, torch.ones_like(images))
            with FasterPooling([layer], recorded=True):
                found = layer(dual)
            tangent = torch.autograd.forward_ad.unpack_dual(found).tangent
        assert noted == []
        assert torch.equal(tangent, torch.ones_like(tangent))


class Subclass(nn.MaxPool2d):
    pass


class TestWhere:
    layer = nn.MaxPool2d(3, 2, 1)

    @pytest.mark.parametrize(
        "images",
        [
            _images(1, 15, 64, 64),
            _images(1, 16, 45, 45),
            _images(1, 16, 64, 64, dtype=torch.float64),
            _images(1, 16, 64, 64).contiguous(memory_format=torch.channels_last),
            _images(1, 16, 64, 128)[..., ::2],
            _images(16, 64, 64),
            _images(0, 16, 64, 64),
            _images(1, 16, 64, 64).to("meta"),
            _images(1, 16, 64, 64).to_mkldnn(),
        ],
        ids=["channels", "small", "double", "channels-last", "strided", "unbatched", "empty", "meta", "mkldnn"],
    )
    def test_not_on_other_images(self, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
        with torch.no_grad(), _noted(monkeypatch) as noted, FasterPooling([self.layer]):
            found = self.layer(images)
        assert noted == []
        expected = self.layer(images)
        assert (found.shape, found.layout, found.device) == (expected.shape, expected.layout, expected.device)
        assert images.is_meta or torch.equal(found.to_dense(), expected.to_dense())

    def test_not_where_something_is_recorded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        images = _images(1, 16, 64, 64).requires_grad_()
        with _noted(monkeypatch) as noted, FasterPooling([self.layer]):
            self.layer(images).sum().backward()
        assert noted == []
        assert images.grad is not None

    def test_not_in_transforms(self, monkeypatch: pytest.MonkeyPatch) -> None:
        images = _images(2, 1, 16, 64, 64)
        with torch.no_grad(), _noted(monkeypatch) as noted, FasterPooling([self.layer]):
            found = torch.vmap(self.layer)(images)
        assert noted == []
        assert torch.equal(found[1], self.layer(images[1]))

    def test_not_in_another_thread(self, monkeypatch: pytest.MonkeyPatch) -> None:
        images = _images(1, 16, 64, 64)
        found: list[Tensor] = []

        def other() -> None:
            with torch.no_grad():
                found.append(self.layer(images))

        with _noted(monkeypatch) as noted, FasterPooling([self.layer]):
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
        assert noted == []
        assert torch.equal(found[0], self.layer(images))

    def test_not_in_what_is_compiled_meanwhile(self, monkeypatch: pytest.MonkeyPatch) -> None:
        images = _images(1, 16, 64, 64)
        layer = nn.MaxPool2d(3, 2, 1)
        compiled = torch.compile(lambda given: layer(given) + 1, backend="eager", fullgraph=True)
        with torch.no_grad():
            with _noted(monkeypatch) as noted, FasterPooling([layer]):
                within = compiled(images)
            assert noted == []
            assert torch.equal(within, layer(images) + 1)
            assert torch.equal(compiled(images), within)

    @pytest.mark.parametrize(
        "hook",
        [
            lambda layer, seen: layer.register_forward_hook(lambda module, args, output: seen.append(args[0].shape)),
            lambda layer, seen: layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape)),
            lambda layer, seen: nn.modules.module.register_module_forward_pre_hook(
                lambda module, args: seen.append(args[0].shape)
            ),
        ],
        ids=["forward", "pre", "global"],
    )
    def test_not_where_the_caller_looks(
        self, hook: Callable[[nn.Module, list[torch.Size]], Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        layer, images, seen = nn.MaxPool2d(2), _images(1, 16, 64, 64), []
        handle = hook(layer, seen)
        try:
            with torch.no_grad(), _noted(monkeypatch) as noted, FasterPooling([layer]):
                layer(images)
        finally:
            handle.remove()
        assert noted == []
        assert seen == [images.shape]

    def test_not_where_forward_is_replaced(self, monkeypatch: pytest.MonkeyPatch) -> None:
        layer, images = nn.MaxPool2d(2), _images(1, 16, 64, 64)
        layer.forward = lambda given: given + 1  # type: ignore[method-assign]
        with torch.no_grad(), FasterPooling([layer]):
            assert torch.equal(layer(images), images + 1)

    def test_not_where_indices_are_wanted(self) -> None:
        layer, images = nn.MaxPool2d(2, return_indices=True), _images(1, 16, 64, 64)
        with torch.no_grad(), FasterPooling([layer]):
            found, indices = layer(images)
        assert torch.equal(images.flatten(2).gather(2, indices.flatten(2)), found.flatten(2))

    def test_not_subclasses(self) -> None:
        model = nn.Sequential(Subclass(2), nn.MaxPool2d(2), nn.MaxPool1d(2), nn.Sequential(nn.MaxPool2d(3)))
        assert max_poolings(model) == [model[1], model[3][0]]

    def test_a_layer_that_is_used_twice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        layer, images = nn.MaxPool2d(3, 1, 1), _images(2, 16, 64, 64)
        with torch.no_grad(), _noted(monkeypatch) as noted, FasterPooling([layer]):
            found = layer(layer(images))
        assert noted == [images.shape] * 2
        assert torch.equal(found, layer(layer(images)))

    def test_hooks_of_ours_that_are_there_already_see_what_was_pooled(self) -> None:
        layer, images = nn.MaxPool2d(2), _images(1, 16, 64, 64)
        with torch.no_grad(), Capture({"layer": layer}) as capture, FasterPooling([layer]):
            layer(images)
        assert torch.equal(capture.outputs()["layer"].output, layer(images))

    def test_errors_are_pytorchs(self) -> None:
        layer, images = nn.MaxPool2d(80), _images(1, 16, 64, 64)
        with pytest.raises(RuntimeError, match="small") as plain:
            layer(images)
        with torch.no_grad(), FasterPooling([layer]), pytest.raises(RuntimeError) as ours:
            layer(images)
        assert str(ours.value).splitlines()[0] == str(plain.value).splitlines()[0]
        assert not layer._forward_hooks
        assert not layer._forward_pre_hooks


class Pooled(nn.Module):
    """A small network that pools before the layer, in it, and after it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.first, self.layer, self.last = nn.MaxPool2d(3, 2, 1), nn.Conv2d(32, 64, 3, padding=1), nn.MaxPool2d(2)
        self.head = nn.Linear(64, 7)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.layer(self.first(self.stem(x)).relu_())).mean((2, 3)))


EXPLANATIONS: dict[str, Callable[[nn.Module, nn.Module, Tensor], Any]] = {
    "Explainer": lambda model, layer, images: Explainer(model, layer)(images).maps,
    "GradCAM": lambda model, layer, images: torch.from_numpy(GradCAM(model, [layer])(images)),
    "EigenCAM": lambda model, layer, images: torch.from_numpy(EigenCAM(model, [layer])(images)),
    "captum": lambda model, layer, images: LayerGradCam(model, layer).attribute(images, 1),
    "captum, a method": lambda model, layer, images: LayerGradCam(model.forward, layer).attribute(images, 1),
}


@pytest.mark.parametrize("explain", EXPLANATIONS.values(), ids=EXPLANATIONS)
@pytest.mark.parametrize("layer", ["layer", "first"])
def test_explanations(
    explain: Callable[[nn.Module, nn.Module, Tensor], Tensor], layer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = Pooled(), _images(2, 3, 48, 40)
    with _noted(monkeypatch) as noted, _unchanged(model):
        found = explain(model, model.get_submodule(layer), images)
    assert (2, 32, 48, 40) in noted
    monkeypatch.setattr(pooling, "_CHANNELS", 1000)
    assert torch.equal(found, explain(model, model.get_submodule(layer), images))
    assert (found.flatten(1).amax(1) > found.flatten(1).amin(1)).all()


class TestTorchcam:
    """Its passes are the user's own, recorded or not."""

    @pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
    @pytest.mark.parametrize("method", [TorchcamGradCAM, CAM])
    def test_maps(self, method: type, mode: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
        model, images = Pooled(), _images(2, 3, 48, 40)
        with _unchanged(model), _noted(monkeypatch) as noted, method(model, "layer") as extractor, mode():
            logits = model(images)
            (found,) = extractor([1, 2], logits)
        assert noted[0] == (2, 32, 48, 40)
        monkeypatch.setattr(pooling, "_CHANNELS", 1000)
        with method(model, "layer") as extractor, mode():
            plain = model(images)
            (expected,) = extractor([1, 2], plain)
        assert torch.equal(found, expected)
        assert torch.equal(logits, plain)

    def test_the_users_gradients(self) -> None:
        model, images = Pooled(), _images(2, 3, 48, 40).requires_grad_()
        wanted = [images, *model.parameters()]
        expected = torch.autograd.grad(model(images).square().sum(), wanted)
        with TorchcamGradCAM(model, "layer"):
            found = torch.autograd.grad(model(images).square().sum(), wanted)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))

    def test_hooks_are_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, images = Pooled(), _images(2, 3, 48, 40)
        with _noted(monkeypatch) as noted, TorchcamGradCAM(model, "layer", enable_hooks=False):
            model(images)
        assert noted == []

    def test_after_an_error(self) -> None:
        model = Pooled()
        with TorchcamGradCAM(model, "layer"):
            with pytest.raises(RuntimeError, match="channels"):
                model(_images(2, 4, 48, 40))
            assert not model.first._forward_hooks
            assert not model.first._forward_pre_hooks
            model(_images(2, 3, 48, 40))
        assert not model._forward_hooks
        assert not model.first._forward_hooks

    def test_two_extractors(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, images = Pooled(), _images(2, 3, 48, 40)
        expected = model(images)
        with TorchcamGradCAM(model, "layer") as one, CAM(model, "layer") as other, _noted(monkeypatch) as noted:
            logits = model(images)
            maps = [extractor([1, 2], logits)[0] for extractor in (one, other)]
        assert noted == [(2, 32, 48, 40), (2, 64, 24, 20)]
        assert torch.equal(logits, expected)
        assert not torch.equal(*maps)

    def test_threads(self) -> None:
        model, images = Pooled(), _images(2, 3, 48, 40)
        expected = model(images)
        with TorchcamGradCAM(model, "layer"), ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: model(images).detach(), range(40)))
        assert all(torch.equal(logits, expected) for logits in found)
        assert not model.first._forward_hooks
