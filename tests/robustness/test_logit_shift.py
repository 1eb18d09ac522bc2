"""Shifted logits: what they leave alone, what they change, and that the copy is a model like any other."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffcam_fast.explain import Explainer, Finer, Logit, LogitDifference, LogProbability, Probability
from diffcam_fast.reference.cam import METHODS
from diffcam_fast.robustness.logit_shift import CORNERS, CornerSum, RegionSum, shift_logits
from tests.explain.networks import NETWORKS, InPlaceAfter, PooledConvolutions, Residual, Tapped, Tokens, make
from tests.tolerances import GAUGE_PROBABILITY, GAUGE_SHARE_OF_RANGE

BASELINES = ("logsumexp", "expected", "mean", "max")
INVARIANT = [*(LogitDifference(baseline) for baseline in BASELINES), LogitDifference(top_k=2), Finer()]
INVARIANT += [Probability(), LogProbability()]


def _squared(output: Tensor) -> Tensor:
    return output.flatten(1).square().mean(1)


def _maps(network: nn.Module, images: Tensor, target: Any, method: str = "gradcam", layer: str = "layer") -> Tensor:
    explainer = Explainer(network, layer, method, target, normalize=None, size=None, relu=False)
    return explainer(images, torch.tensor([[0, 3]] * len(images))).maps


def _change(network: nn.Module, other: nn.Module, images: Tensor, target: Any, method: str = "gradcam") -> float:
    """Largest difference of raw maps, as a share of their range."""
    one, two = (_maps(model, images, target, method) for model in (network, other))
    span = one.amax((2, 3)) - one.amin((2, 3))
    return float(((one - two).abs().amax((2, 3)) / span).max())


@pytest.mark.parametrize("kind", [PooledConvolutions, InPlaceAfter, Residual])
@pytest.mark.parametrize(
    "shift", [CornerSum(0.3), RegionSum(-0.2, ((1, 3), (0, 2))), _squared], ids=["corner", "region", "function"]
)
def test_probabilities_and_differences_stay_single_logits_do_not(kind: type[Tapped], shift: Any) -> None:
    network = make(kind, torch.float32)
    images = network.images(4, torch.float32)
    shifted = shift_logits(network, "layer", shift)
    one, two = network(images).detach(), shifted(images).detach()
    moved = two - one
    assert moved.abs().min() > 1e-3
    torch.testing.assert_close(moved, moved[:, :1].expand_as(moved), rtol=0, atol=1e-5)
    assert (one.softmax(1) - two.softmax(1)).abs().max() <= GAUGE_PROBABILITY
    for method in METHODS:
        for target in INVARIANT:
            assert _change(network, shifted, images, target, method) <= GAUGE_SHARE_OF_RANGE, (method, target)
    assert _change(network, shifted, images, Logit()) > 0.1
    assert _change(network, shifted, images, Finer(alpha=0.5)) > 0.05


@pytest.mark.parametrize("corner", CORNERS)
def test_the_known_case_by_hand(corner: str) -> None:
    network = make(PooledConvolutions)
    images = network.images(3)
    activations: list[Tensor] = []
    with network.layer.register_forward_hook(lambda module, inputs, output: activations.append(output.detach())):
        logits = network(images).detach()
    (activation,) = activations
    row, column = CORNERS[corner]
    strength = 0.7
    added = strength * activation[:, :, row, column].sum(1, keepdim=True)
    shifted = shift_logits(network, network.layer, CornerSum(strength, corner))
    torch.testing.assert_close(shifted(images).detach(), logits + added, rtol=0, atol=1e-13)

    # Spatially pooled gradients: strength / S for the weight of every channel. Element-wise ones: at the corner alone.
    positions = activation[0, 0].numel()
    pooled = _maps(shifted, images, Logit()) - _maps(network, images, Logit())
    uniform = (strength / positions) * activation.sum(1, keepdim=True).expand_as(pooled)
    torch.testing.assert_close(pooled, uniform, rtol=0, atol=1e-12)
    local = _maps(shifted, images, Logit(), "hirescam") - _maps(network, images, Logit(), "hirescam")
    expected = torch.zeros_like(local)
    expected[:, :, row, column] = added
    torch.testing.assert_close(local, expected, rtol=0, atol=1e-12)


def test_region_by_hand() -> None:
    activations = torch.arange(2 * 3 * 4 * 5, dtype=torch.float64).reshape(2, 3, 4, 5)
    expected = 2 * activations[:, :, 1:3, 2:5].sum((1, 2, 3))
    torch.testing.assert_close(RegionSum(2.0, [(1, 3), (2, 5)])(activations), expected)
    signal = activations.flatten(2)
    torch.testing.assert_close(RegionSum(2.0, ((0, 1),))(signal), 2 * signal[:, :, 0].sum(1))


def test_logits_near_five_thousand() -> None:
    network = make(PooledConvolutions, torch.float32)
    images = network.images(4, torch.float32)
    shifted = shift_logits(network, "layer", lambda output: 5000 + output[:, :, 0, 0].sum(1))
    assert shifted(images).min() > 4900
    # The logits themselves have lost digits: the shares of the rivals are off by a thousandth.
    for baseline in BASELINES:
        assert _change(network, shifted, images, LogitDifference(baseline)) <= 1e-2


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_model_like_any_other(kind: type[Tapped]) -> None:
    network = make(kind)
    images = network.images(3)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    expected = network(images).detach()
    shifted = shift_logits(network, network.layers[0], _squared)
    assert type(shifted) is type(network)
    assert [name for name, _ in shifted.named_modules()] == [name for name, _ in network.named_modules()]
    moved = shifted(images).detach() - expected
    assert moved.abs().min() > 0
    for count in (1, 2):  # any batch, called again
        torch.testing.assert_close(shifted(images[:count]).detach() - expected[:count], moved[:count])
    with torch.inference_mode():
        torch.testing.assert_close(shifted(images) - expected, moved)
    with torch.no_grad():
        for parameter in shifted.parameters():
            parameter.fill_(7)
    shifted.train().half()
    assert torch.equal(network(images), expected)
    assert not any(module.training for module in network.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies_are_shifted_by_their_own_layer(how: str) -> None:
    network = make(PooledConvolutions)
    images = network.images()
    shifted = shift_logits(network, "layer", CornerSum(2.0))
    expected = shifted(images).detach()
    if how == "deepcopy":
        again = copy.deepcopy(shifted)
    elif how == "pickle":
        again = pickle.loads(pickle.dumps(shifted))
    else:
        file = io.BytesIO()
        torch.save(shifted, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    assert torch.equal(again(images), expected)
    with torch.no_grad():
        again.layer[1].weight.zero_()
        again.layer[2].bias.zero_()
        again.layer[2].running_mean.zero_()
        again.layer[1].bias.zero_()
    torch.testing.assert_close(again(images), again.head.bias.expand(2, -1))  # the layer is zero, and so is the shift
    assert torch.equal(shifted(images), expected)


def test_shifts_add_up() -> None:
    network = make(Residual)
    images = network.images()
    one, two = (shift_logits(network, name, CornerSum(2.0)) for name in ("layer", "late"))
    both = shift_logits(one, "late", CornerSum(2.0))
    torch.testing.assert_close(both(images) + network(images), one(images) + two(images))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_once(dtype: torch.dtype) -> None:
    network = make(PooledConvolutions, dtype)
    images = network.images(3, dtype)
    found: list[Tensor] = []

    def shift(output: Tensor) -> Tensor:
        found.append(CornerSum(3.0)(output))
        return found[-1]

    shifted = shift_logits(network, "layer", shift)(images)
    assert shifted.dtype == dtype
    assert found[0].dtype == torch.float32
    assert torch.equal(shifted, (network(images).float() + found[0][:, None]).to(dtype))


def test_in_training_with_gradients_for_the_copy_alone() -> None:
    network = make(PooledConvolutions).train()
    shifted = shift_logits(network, "layer", CornerSum(2.0))
    assert shifted.training
    shifted(network.images()).sum().backward()
    assert shifted.early[0].weight.grad is not None
    assert network.early[0].weight.grad is None
    assert not shifted.layer._forward_hooks  # nothing left from the pass


def test_what_a_hook_hands_on_is_what_the_shift_is_computed_of() -> None:
    network = make(PooledConvolutions)
    images = network.images()
    shifted = shift_logits(network, "layer", _squared)
    with shifted.layer.register_forward_hook(lambda module, inputs, output: output * 0):
        torch.testing.assert_close(shifted(images), network.head.bias.expand(2, -1))


def test_layers_before_and_after_the_shifted_one() -> None:
    network = make(PooledConvolutions)
    images = network.images()
    late = shift_logits(network, "layer", CornerSum(5.0))
    early = shift_logits(network, "early", CornerSum(5.0))
    for shifted, layer, same in ((late, "early", False), (early, "layer", True)):
        one, two = (_maps(model, images, Logit(), layer=layer) for model in (network, shifted))
        assert torch.allclose(one, two, rtol=0, atol=1e-12) is same


def test_tokens_and_wrappers() -> None:
    network = make(Tokens)
    images = network.images()
    shifted = shift_logits(nn.DataParallel(network), "layer", lambda tokens: tokens[:, 1:, 0].mean(1))
    assert type(shifted) is Tokens
    assert (shifted(images) - network(images)).abs().min() > 0


def test_threads_do_not_meet() -> None:
    network = make(PooledConvolutions)
    shifted = shift_logits(network, "layer", _squared)
    batches = [network.images(1 + index % 3) for index in range(8)]
    expected = [shifted(images).detach() for images in batches]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(20):
            with torch.no_grad():
                if not torch.equal(shifted(batches[index]), expected[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not shifted.layer._forward_hooks


def test_a_pass_that_fails_leaves_nothing_behind() -> None:
    network = make(PooledConvolutions)
    shifted = shift_logits(network, "layer", CornerSum(2.0))
    images = network.images()
    expected = shifted(images)
    for wrong in (images[:, :2], images.float()):
        with pytest.raises(RuntimeError):
            shifted(wrong)
    assert not shifted.layer._forward_hooks
    assert torch.equal(shifted(images), expected)


def test_other_libraries_see_it() -> None:
    captum = pytest.importorskip("captum.attr")
    network = make(PooledConvolutions)
    images = network.images()
    shifted = shift_logits(network, "layer", CornerSum(5.0))
    for model in (network, shifted):
        theirs = captum.LayerGradCam(model, model.layer).attribute(images, torch.tensor([3, 3])).detach()
        torch.testing.assert_close(theirs, _maps(model, images, Logit())[:, 1:], rtol=0, atol=1e-10)


class _Twice(Tapped):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)
        self.idle = nn.Identity()
        self.pair = nn.Flatten()
        self.head = nn.Linear(3, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layer(self.layer(images)).mean((2, 3)))


@pytest.mark.parametrize(
    ("shift", "error", "message"),
    [
        (lambda output: output.sum(), ValueError, r"shift: expected one floating point .* shape \(2,\); got .*\(\)"),
        (lambda output: output.argmax(1).flatten(1)[:, 0], ValueError, "shift: expected one floating point number"),
        (lambda output: 1.0, TypeError, "shift: expected the function to return a tensor; got float"),
        (RegionSum(1.0, ((0, 99), (0, 1))), ValueError, "shift: expected a region within the layer's"),
        (RegionSum(1.0, ((0, 1),)), ValueError, "shift: expected a region within the layer's"),
    ],
)
def test_refusals_of_a_pass(shift: Any, error: type[Exception], message: str) -> None:
    network = make(PooledConvolutions)
    with pytest.raises(error, match=message):
        shift_logits(network, "layer", shift)(network.images())


def test_refusals_of_layers() -> None:
    network = make(_Twice)
    for layer, times in (("layer", 2), ("idle", 0)):
        with pytest.raises(
            ValueError, match=f"expected the model to call '{layer}' once in a pass; it was .* {times} "
        ):
            shift_logits(network, layer, _squared)(network.images())
    with pytest.raises(ValueError, match=r"shift: expected activations \(N, C, H, W\)"):
        shift_logits(network, "head", CornerSum(1.0))(network.images())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda n: shift_logits(len, "layer", _squared), TypeError, "model: expected a torch.nn.Module"),
        (lambda n: shift_logits(n, "latest", _squared), ValueError, "layer: the model has no layer 'latest'"),
        (lambda n: shift_logits(n, 3, _squared), TypeError, "layer: expected a module or a dotted name; got int"),
        (lambda n: shift_logits(n, n, _squared), ValueError, "layer: expected a layer within the model"),
        (lambda n: shift_logits(n, "layer", 3.0), TypeError, "shift: expected a function"),
        (lambda n: shift_logits(n, "layer", CornerSum), TypeError, "shift: expected a function"),
        (lambda n: CornerSum("big"), TypeError, "strength: expected a number; got str"),
        (lambda n: CornerSum(float("nan")), ValueError, "strength: expected a finite number; got nan"),
        (lambda n: CornerSum(1.0, "middle"), ValueError, "corner: expected one of top left, .*; got 'middle'"),
        (lambda n: RegionSum(1.0, ()), TypeError, "region: expected pairs of integers"),
        (lambda n: RegionSum(1.0, ((0, 1.5),)), TypeError, "region: expected pairs of integers"),
        (lambda n: RegionSum(1.0, ((2, 2),)), ValueError, r"region: expected 0 <= start < stop; got \(2, 2\)"),
        (lambda n: RegionSum(1.0, ((-1, 2),)), ValueError, "region: expected 0 <= start < stop"),
    ],
)
def test_refusals(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(make(PooledConvolutions))
