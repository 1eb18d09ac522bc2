"""What users of captum's LayerGradCam rely on."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from diffcam_fast.compat.captum import LayerGradCam
from diffcam_fast.compat.originals import original
from tests.compat.networks import Flat, Pooled, images, make
from tests.tolerances import COMPAT_SHARE_OF_RANGE, MAP_SHARE_OF_RANGE


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


@pytest.fixture
def theirs() -> Any:
    pytest.importorskip("captum")
    return original("captum", "attr")


def test_signatures_and_attributes(theirs: Any) -> None:
    for name in ("__init__", "attribute", "interpolate", "has_convergence_delta", "get_name"):
        expected = list(inspect.signature(getattr(theirs.LayerGradCam, name)).parameters.values())
        found = list(inspect.signature(getattr(LayerGradCam, name)).parameters.values())
        assert [p.name for p in found[: len(expected)]] == [p.name for p in expected]
        assert [p.default for p in found[: len(expected)]] == [p.default for p in expected]
        assert all(p.kind is p.KEYWORD_ONLY for p in found[len(expected) :])
    model = make(Flat)
    one, other = LayerGradCam(model, model.late, [0]), theirs.LayerGradCam(model, model.late, [0])
    for name in dir(other):
        assert hasattr(one, name), name
    for name in ("forward_func", "layer", "device_ids", "gradient_func", "multiplies_by_inputs"):
        assert getattr(one, name) == getattr(other, name), name
    assert one.has_convergence_delta() is other.has_convergence_delta() is False
    assert one.get_name() == other.get_name() == "Layer Grad Cam"
    assert type("GuidedLRPof1", (LayerGradCam,), {}).get_name() == "Guided L R Pof 1"
    assert isinstance(one, theirs.LayerAttribution) and isinstance(one, theirs.GradientAttribution)
    assert LayerGradCam.attribute.__name__ == "attribute"
    x = images(Flat)
    delta = other.compute_convergence_delta(torch.ones(3, 2), torch.zeros_like(x), x, target=1)
    assert torch.equal(one.compute_convergence_delta(torch.ones(3, 2), torch.zeros_like(x), x, target=1), delta)


@pytest.mark.parametrize("strict", (False, True))
@pytest.mark.parametrize("options", ({}, {"attribute_to_layer_input": True}))
def test_no_hooks_stay_and_an_exception_does_no_harm(options: dict[str, bool], strict: bool) -> None:
    model, x = make(Flat), images(Flat)
    cam = LayerGradCam(model, model.late, strict=strict)
    assert hooks(model) == 0
    expected = cam.attribute(x, 1, **options)
    with pytest.raises(RuntimeError):
        cam.attribute(x[:, :2], 1, **options)
    with pytest.raises(IndexError):
        cam.attribute(x, 99, **options)
    cam.forward_func = lambda x: model(x) / (1 // 0)
    with pytest.raises(ZeroDivisionError):
        cam.attribute(x, 1, **options)
    cam.forward_func = model
    assert hooks(model) == 0 and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert torch.is_autocast_cache_enabled()
    assert torch.equal(cam.attribute(x, 1, **options), expected)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_ten_thousand_calls_keep_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(inplace=True), nn.Linear(3, 2))
    x = torch.randn(1, 2)
    # One does without the history of what lies before the layer, one does not.
    cams = [LayerGradCam(model, model[0]), LayerGradCam(model, model[1])]

    def kept() -> tuple[int, int]:
        gc.collect()
        things = gc.get_objects()
        return len(things), sum(issubclass(type(thing), Tensor) for thing in things)

    def explain(times: int) -> None:
        for _ in range(times):
            for cam in cams:
                cam.attribute(x, 1)

    explain(5)
    before = kept()
    gc.disable()
    try:
        explain(5000)
        # Nothing waits for the collector of cycles either.
        waiting = sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())
    finally:
        gc.enable()
    after = kept()
    assert waiting <= before[1]
    assert after[1] <= before[1] and after[0] <= before[0] + 10
    gone = weakref.ref(model)
    del model
    cams.clear()
    assert gone() is None


def test_what_lies_before_the_layer_is_not_recorded(theirs: Any) -> None:
    model, x = make(Flat), images(Flat)

    def saved(cam: Any) -> int:
        sizes = []
        with saved_tensors_hooks(lambda tensor: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor):
            cam(model, model.late).attribute(x, 1)
        return sum(sizes)

    assert saved(LayerGradCam) < saved(theirs.LayerGradCam) / 2


def test_frozen_parameters_and_no_grad(theirs: Any) -> None:
    model, x = make(Pooled), images(Pooled)
    expected = theirs.LayerGradCam(model, model.late).attribute(x, 1)
    model.requires_grad_(False)
    for layer_input in (False, True):
        with torch.no_grad():
            found = LayerGradCam(model, model.relu if layer_input else model.late).attribute(
                x, 1, attribute_to_layer_input=layer_input
            )
        assert (found - expected).abs().max() <= MAP_SHARE_OF_RANGE[torch.float32]
    assert not any(parameter.requires_grad for parameter in model.parameters())


class _Queries(nn.Module):
    """What the layer is given is the model's own, and no input's."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queries", torch.randn(1, 3, 4))
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.layer(self.queries) * x).sum(1))


def test_buffers_are_not_marked() -> None:
    model = _Queries()
    cam = LayerGradCam(model, model.layer)
    for options in ({}, {"create_graph": True}):
        assert cam.attribute(torch.randn(1, 3, 4), 1, None, True, grad_kwargs=options).any()
        assert not model.queries.requires_grad


def test_a_model_that_differentiates_on_its_way(theirs: Any) -> None:
    class Forces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.layer, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.first(x).square().sum(), x, create_graph=True)
            return self.head(self.layer(slope).mean((2, 3)).tanh())

    torch.manual_seed(0)
    model, x = Forces(), torch.randn(2, 3, 8, 8)
    expected = theirs.LayerGradCam(model, model.layer).attribute(x, 1)
    cam = LayerGradCam(model, model.layer)
    for _ in range(2):
        found = cam.attribute(x, 1)
        assert (found - expected).abs().max() <= COMPAT_SHARE_OF_RANGE * (expected.max() - expected.min())


def test_another_layer_and_another_model(theirs: Any) -> None:
    """As captum's own concept vectors use an attribution method."""
    model, other, x = make(Flat, in_place=True), make(Pooled), images(Flat)
    cam, original_cam = LayerGradCam(model, model.relu), theirs.LayerGradCam(model, model.relu)
    for function, layer in ((model, model.relu), (model, model.late), (other, other.late), (model, model.relu)):
        for each in (cam, original_cam):
            each.forward_func, each.layer = function, layer
        expected = original_cam.attribute(x, 1)
        assert (cam.attribute(x, 1) - expected).abs().max() <= COMPAT_SHARE_OF_RANGE * (expected.max() - expected.min())


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    """Threads take turns so often that what one leaves behind meets the others."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def test_several_threads_explain_one_model(hasty_threads: None) -> None:
    model, x = make(Flat), images(Flat)
    cam = LayerGradCam(model, model.late)
    expected = [cam.attribute(x, target) for target in range(4)]
    expected_of_input = cam.attribute(x, 1, None, True)
    wrong: list[int] = []

    def work(target: int) -> None:
        for _ in range(40):
            if not torch.equal(cam.attribute(x, target), expected[target]):
                wrong.append(target)
            if not torch.equal(cam.attribute(x, 1, None, True), expected_of_input):
                wrong.append(-1)

    threads = [threading.Thread(target=work, args=(target,)) for target in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and hooks(model) == 0


@pytest.mark.parametrize("of_input", (False, True))
def test_what_other_threads_do_with_the_model_is_theirs(of_input: bool) -> None:
    model, x = make(Flat), images(Flat)
    expected = LayerGradCam(model, model.late).attribute(x, 1, None, of_input)
    outputs = []

    def elsewhere() -> None:
        with torch.no_grad():
            outputs.append(model(x + 1))

    def function(x: Tensor) -> Tensor:
        output = model(x)
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return output

    assert torch.equal(LayerGradCam(function, model.late).attribute(x, 1, None, of_input), expected)
    assert len(outputs) == 1 and not outputs[0].requires_grad


def test_copies_and_pickles() -> None:
    model, x = make(Flat), images(Flat)
    cam = LayerGradCam(model, model.relu)
    expected = cam.attribute(x, 1)
    for other in (copy.deepcopy(cam), pickle.loads(pickle.dumps(cam))):
        assert other.layer is other.forward_func.relu is not model.relu
        assert torch.equal(other.attribute(x, 1), expected)


def test_history_is_not_tried_without_twice() -> None:
    model, x = make(Flat, in_place=True), images(Flat)
    passes = []

    def function(x: Tensor) -> Tensor:
        passes.append(x.shape)
        return model(x)

    cam = LayerGradCam(function, model.relu)
    counts = []
    for layer in (model.relu, model.relu, model.late, model.late):
        cam.layer = layer
        passes.clear()
        cam.attribute(x, 1)
        counts.append(len(passes))
    assert counts == [2, 1, 1, 1]


def test_several_devices_are_the_originals(theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks would see replicas, each in a thread of its own."""
    model, x = make(Flat), images(Flat)
    spread = nn.Sequential(nn.DataParallel(model), nn.Identity())
    expected = theirs.LayerGradCam(model, model.late).attribute(x, 1)
    calls = []
    attribute = theirs.LayerGradCam.attribute
    monkeypatch.setattr(theirs.LayerGradCam, "attribute", lambda *args: calls.append(args) or attribute(*args))
    for function, device_ids, by_captum in (
        (lambda x: model(x), [0, 1], True),
        (spread, [0, 1], True),
        (spread, [0], False),
        (model, [0, 1], False),
        (nn.DataParallel(model), [0, 1], False),
    ):
        calls.clear()
        found = LayerGradCam(function, model.late, device_ids).attribute(x, 1, relu_attributions=False)
        assert bool(calls) is by_captum
        assert (found - expected).abs().max() <= COMPAT_SHARE_OF_RANGE * (expected.max() - expected.min())


class _Beside(nn.Module):
    """Calls the layer, and does without."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        self.model(x)
        return self.model.early(x).amax((2, 3))


class _Dictionary(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"values": x}


class _Integers(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.round().long()


def _with(layer: nn.Module, by_name: bool = False) -> tuple[Any, nn.Module]:
    def function(x: Tensor) -> Tensor:
        y = layer(input=x) if by_name else layer(x)
        return y.reshape(len(x), -1)

    return function, layer


@pytest.mark.parametrize(
    ("call", "errors", "message"),
    (
        (lambda m, x: (m, m.late, [x], 1), (TypeError, AssertionError), "inputs: expected a tensor or a tuple"),
        (lambda m, x: (m, "late", x, 1), (TypeError,), "layer: expected a torch.nn.Module; got str"),
        (lambda m, x: (m, [m.late], x, 1), (TypeError,), "layer: expected a torch.nn.Module; got list"),
        (lambda m, x: (m, nn.Identity(), x, 1), (ValueError, AssertionError), "layer: expected forward_func to call"),
        (lambda m, x: (m, m.late, x), (ValueError, AssertionError), "target: expected one that leaves a single"),
        (lambda m, x: (m, m.late, x, True), (TypeError, AssertionError), "target: expected None.*got bool"),
        (lambda m, x: (m, m.late, x, "cat"), (TypeError, AssertionError), "target: expected None.*got str"),
        (lambda m, x: (m, m.late, x, [1.0, 2, 3]), (TypeError, AssertionError), "target: expected integers; got float"),
        (lambda m, x: (m, m.late, x, torch.ones(3)), (TypeError,), "target: expected integers; got torch.float32"),
        (
            lambda m, x: (m, m.late, x, torch.ones(3, 1, 1).int()),
            (ValueError, AssertionError),
            "integers of shape",
        ),
        (lambda m, x: (m, m.late, x, [[1], [1, 2], [1]]), (ValueError,), "target: expected as many integers"),
        (lambda m, x: (m, m.late, x, [1, 2]), (ValueError, AssertionError), "target: expected one for each example"),
        (lambda m, x: (m, m.late, x, [(1,), (2,)]), (ValueError, AssertionError), "target: expected one for each"),
        (lambda m, x: (m, m.late, x, (1, 2)), (ValueError, AssertionError), "target: expected at most 1 ind"),
        (lambda m, x: (m, m.late, x, 7), (IndexError,), "target: expected an index below 7"),
        (lambda m, x: (m, m.late, x, [0, 7, 1]), (IndexError,), "target: expected indices below 7; got 0 to 7"),
        (lambda m, x: (m, m.late, x, [0, -8, 1]), (IndexError,), "target: expected indices below 7; got -8 to 1"),
        (lambda m, x: (lambda x: m(x)[:, 0], m.late, x, [0, 1, 2]), (ValueError,), r"of shape \(N, K\); got \(3,\)"),
        (lambda m, x: (lambda x: (m(x),), m.late, x, 1), (TypeError,), "forward_func: expected it to return a tensor"),
        (lambda m, x: (lambda x: m(x).detach(), m.late, x, 1), (ValueError, RuntimeError), "forward_func: its output"),
        (lambda m, x: (_Beside(m), m.late, x, 1), (ValueError, RuntimeError), "layer: the scores do not depend on it"),
        (lambda m, x: (*_with(_Dictionary()), x, 1), (TypeError, AssertionError), "layer: expected tensors.*got dict"),
        (lambda m, x: (*_with(_Integers()), x, 1), (TypeError, AssertionError), "layer: expected floating point"),
        (lambda m, x: (*_with(nn.Flatten(0)), x, 1), (ValueError, AssertionError), r"\(N, C, \*positions\); got shape"),
        (lambda m, x: (*_with(nn.ReLU(), True), x, 1, None, True), (ValueError,), "expected inputs with at least one"),
    ),
)
def test_refusals(call: Any, errors: tuple[type[Exception], ...], message: str) -> None:
    model = make(Flat)
    function, layer, *arguments = call(model, images(Flat))
    for error in errors:
        with pytest.raises(error, match=message):
            LayerGradCam(function, layer).attribute(*arguments)
    assert hooks(model) == 0
