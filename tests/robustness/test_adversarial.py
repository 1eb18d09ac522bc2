"""Adversarial images against computations by hand, and that an attack leaves nothing behind."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from diffcam_fast.explain import Explainer
from diffcam_fast.robustness.adversarial import Adversarial, bim, carlini_wagner, fgsm

pytest.importorskip("foolbox", reason="foolbox is not installed: pip install 'diffcam_fast[robustness]'")

CLASSES = 4


class Sensitive(nn.Module):
    """A network whose decisions a small change turns; dropout and batch norm tell whether it was evaluated."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6 * 8 * 8, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.drop(self.layer(images).flatten(1)))


def _network(dtype: torch.dtype = torch.float64) -> Sensitive:
    torch.manual_seed(3)
    return Sensitive().to(dtype).train()  # in training mode: attacks have to see to it that it evaluates


def _images(count: int = 6, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(count, 3, 8, 8, dtype=dtype, generator=torch.Generator().manual_seed(5))


def _predicted(network: nn.Module, images: Tensor) -> Tensor:
    training = network.training
    with torch.no_grad():
        predicted = network.eval()(images).argmax(1)
    network.train(training)
    return predicted


def _gradient(network: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    images = images.clone().requires_grad_()
    training = network.training
    loss = functional.cross_entropy(network.eval()(images), classes, reduction="sum")
    network.train(training)
    return torch.autograd.grad(loss, images)[0]


ATTACKS = {
    "fgsm": lambda network, images, labels, **options: fgsm(network, images, labels, 0.05, **options),
    "bim": lambda network, images, labels, **options: bim(network, images, labels, 0.05, steps=3, **options),
    "carlini-wagner": lambda network, images, labels, **options: carlini_wagner(
        network, images, labels, steps=20, search_steps=3, **options
    ),
}


@pytest.mark.parametrize("targeted", [False, True], ids=["away", "toward"])
def test_fgsm_by_hand(targeted: bool) -> None:
    network, images = _network(), _images()
    labels = _predicted(network, images)
    classes = (labels + 1) % CLASSES if targeted else labels
    sign = -1 if targeted else 1
    expected = (images + sign * 0.05 * _gradient(network, images, classes).sign()).clamp(0, 1)
    found = fgsm(network, images, labels, 0.05, target_classes=classes if targeted else None)
    torch.testing.assert_close(found.images, expected, rtol=0, atol=1e-15)
    torch.testing.assert_close(found.l2, (expected - images).flatten(1).square().sum(1).sqrt())
    torch.testing.assert_close(found.linf, (expected - images).flatten(1).abs().amax(1))
    assert torch.equal(found.predicted, _predicted(network, expected))
    assert torch.equal(found.succeeded, found.predicted == classes if targeted else found.predicted != labels)
    assert found.succeeded.any()


def test_bim_by_hand_and_within_the_ball() -> None:
    network, images = _network(), _images()
    labels = _predicted(network, images)
    expected = images
    for _ in range(4):
        expected = expected + 0.03 * _gradient(network, expected, labels).sign()
        expected = (images + (expected - images).clamp(-0.05, 0.05)).clamp(0, 1)
    found = bim(network, images, labels, 0.05, steps=4, step_size=0.03)
    torch.testing.assert_close(found.images, expected, rtol=0, atol=1e-15)
    many = bim(network, images, labels, 0.05, steps=20)
    assert (many.images - images).abs().max() <= 0.05 + 1e-15
    assert many.images.min() >= 0
    assert many.images.max() <= 1
    assert (many.linf > 0.049).all()


def test_bim_of_one_full_step_is_fgsm() -> None:
    network, images = _network(), _images()
    once = bim(network, images, None, 0.05, steps=1, step_size=0.05)
    assert torch.equal(once.images, fgsm(network, images, None, 0.05).images)


def test_carlini_wagner_finds_the_nearest_point_beyond_a_plane() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 2, bias=False)).double()
    images = 0.4 + 0.2 * torch.rand(5, 3, 4, 4, dtype=torch.float64)
    logits = network(images).detach()
    weight = network[1].weight.detach()
    distance = (logits[:, 0] - logits[:, 1]).abs() / (weight[0] - weight[1]).norm()
    found = carlini_wagner(network, images, None, steps=300, search_steps=8, abort_early=False)
    assert found.succeeded.all()
    assert (found.l2 >= distance).all()
    assert (found.l2 <= 1.05 * distance).all()


def test_carlini_wagner_moves_less_than_fgsm() -> None:
    network, images = _network(), _images(8)
    labels = _predicted(network, images)
    smallest = torch.full((8,), float("inf"), dtype=torch.float64)
    for strength in (0.01, 0.02, 0.05, 0.1, 0.2):
        signed = fgsm(network, images, labels, strength)
        smallest = torch.where(signed.succeeded, smallest.minimum(signed.l2), smallest)
    found = carlini_wagner(network, images, labels)
    assert found.succeeded.all()
    assert smallest.isfinite().sum() >= 4
    assert (found.l2 < smallest).all()


def test_carlini_wagner_gives_back_what_it_could_not_attack() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).double()
    with torch.no_grad():
        network[1].weight.copy_(torch.stack([torch.full((12,), 50.0), torch.zeros(12)]))
        network[1].bias.copy_(torch.tensor([-100.0, 0.0]))
    assert network(torch.zeros(1, 3, 2, 2, dtype=torch.float64)).argmax() == 1  # black is the other class
    images = torch.full((2, 3, 2, 2), 0.9, dtype=torch.float64)
    found = carlini_wagner(network, images, 0, steps=1, search_steps=1)
    assert torch.equal(found.images, images)
    assert not found.succeeded.any()
    assert found.l2.tolist() == found.linf.tolist() == [0, 0]


def test_confidence_and_target_class_are_reached() -> None:
    network, images = _network(), _images()
    labels = _predicted(network, images)
    target_classes = (labels + 2) % CLASSES
    found = carlini_wagner(network, images, labels, confidence=0.1, target_classes=target_classes)
    assert found.succeeded.all()
    logits = network.eval()(found.images).detach()
    chosen = logits.gather(1, target_classes[:, None])
    others = logits.scatter(1, target_classes[:, None], -torch.inf).amax(1, keepdim=True)
    assert (chosen - others >= 0.1 - 1e-12).all()


def test_independent_of_the_batch_where_asked() -> None:
    network, images = _network(), _images(3)
    together = carlini_wagner(network, images, None, steps=15, search_steps=3, abort_early=False)
    alone = [
        carlini_wagner(network, image[None], None, steps=15, search_steps=3, abort_early=False) for image in images
    ]
    torch.testing.assert_close(together.images, torch.cat([each.images for each in alone]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("attack", [fgsm, bim])
def test_strength_zero_gives_the_images_back(attack: Any) -> None:
    network, images = _network(torch.float32), _images(dtype=torch.float32)
    found = attack(network, images, None, 0)
    assert torch.equal(found.images, images)
    assert found.images.data_ptr() != images.data_ptr()
    assert not found.succeeded.any()
    assert found.l2.abs().max() == found.linf.abs().max() == 0


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_dtypes_and_the_explainer(name: str, dtype: torch.dtype) -> None:
    network, images = _network(dtype), _images(dtype=dtype)
    found = ATTACKS[name](network, images, None)
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    assert found.images.dtype == dtype
    assert found.l2.dtype == found.linf.dtype == accumulated
    assert found.images.min() >= 0
    assert found.images.max() <= 1
    assert not found.images.requires_grad
    assert found.succeeded.any()
    explanation = Explainer(network, "layer")(found.images, found.predicted)
    assert torch.equal(explanation.logits.argmax(1), found.predicted)


@pytest.mark.parametrize("name", ATTACKS)
def test_no_images(name: str) -> None:
    found = ATTACKS[name](_network(), _images()[:0], [])
    assert found.images.shape == (0, 3, 8, 8)
    assert [len(part) for part in found] == [0] * 5


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ATTACKS)
def test_leaves_no_trace(name: str, mode: Any) -> None:
    network, images = _network(), _images()
    network.head.weight.requires_grad_(False)
    network.layer[0].weight.grad = torch.ones_like(network.layer[0].weight)
    network.drop.eval()

    def state() -> list[Any]:
        tensors = [*network.state_dict().values(), images, torch.get_rng_state()]
        flags = [module.training for module in network.modules()]
        gradients = [None if p.grad is None else p.grad.tolist() for p in network.parameters()]
        hooks = [len(module._forward_hooks) for module in network.modules()]
        return [
            [tensor.tolist() for tensor in tensors],
            [p.requires_grad for p in network.parameters()],
            flags,
            gradients,
            hooks,
            torch.is_grad_enabled(),
        ]

    expected = ATTACKS[name](network, images, None)
    with mode():
        before = state()
        found = ATTACKS[name](network, images, None)
        assert state() == before
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


class _InPlace(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.mul_(1.5).sub_(0.25))


@pytest.mark.parametrize("name", ATTACKS)
def test_a_model_that_normalises_in_place(name: str) -> None:
    network, images = _network(), _images()
    before = images.clone()
    found = ATTACKS[name](_InPlace(network), images, None)
    assert torch.equal(images, before)
    assert torch.equal(found.predicted, _predicted(network, found.images * 1.5 - 0.25))
    torch.testing.assert_close(found.linf, (found.images - images).flatten(1).abs().amax(1))


def test_images_made_in_inference_mode() -> None:
    network = _network()
    with torch.inference_mode():
        images = _images()
    found = fgsm(network, images, None, 0.05)
    assert torch.equal(found.images, fgsm(network, images.clone(), None, 0.05).images)


def test_no_perturbation_where_the_loss_is_flat() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).double()
    with torch.no_grad():
        network[1].bias.copy_(torch.tensor([5000.0, 0.0]))
    images = torch.full((1, 3, 2, 2), 0.5, dtype=torch.float64)
    found: Adversarial = fgsm(network, images, 0, 0.1)
    assert torch.equal(found.images, images)


class _NoGradient(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([images.detach().mean((1, 2, 3)), images.detach().amax((1, 2, 3))], 1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda n, x: fgsm(len, x, None, 0.1), TypeError, "model: expected a torch.nn.Module"),
        (lambda n, x: fgsm(n, x.long(), None, 0.1), TypeError, "images: expected a floating point tensor"),
        (lambda n, x: fgsm(n, x + 1, None, 0.1), ValueError, r"images: expected values within the bounds 0.0 to 1.0"),
        (lambda n, x: fgsm(n, x * torch.nan, None, 0.1), ValueError, "images: .*got nan to nan"),
        (lambda n, x: fgsm(n, x, None, -0.1), ValueError, "strength: expected at least 0; got -0.1"),
        (lambda n, x: fgsm(n, x, None, float("inf")), ValueError, "strength: expected a finite number"),
        (lambda n, x: fgsm(n, x, None, "weak"), TypeError, "strength: expected a number; got str"),
        (lambda n, x: fgsm(n, x, None, 0.1, bounds=(1, 0)), ValueError, "bounds: expected the smallest value first"),
        (lambda n, x: fgsm(n, x, None, 0.1, bounds=1), TypeError, "bounds: expected two numbers"),
        (lambda n, x: fgsm(n, x, [0, 1], 0.1), ValueError, r"labels: expected an integer or shape \(6,\)"),
        (lambda n, x: fgsm(n, x, 4, 0.1), ValueError, "labels: expected indices from 0 to 3 for 4 classes; got 4 to 4"),
        (lambda n, x: fgsm(n, x, torch.ones(6), 0.1), TypeError, "labels: expected integers; got torch.float32"),
        (lambda n, x: fgsm(n, x, ["cat"] * 6, 0.1), TypeError, "labels: expected integers; got <U3"),
        (lambda n, x: fgsm(n, x, 1, 0.1, target_classes=-1), ValueError, "target_classes: expected indices from 0"),
        (lambda n, x: fgsm(n, x, 1, 0.1, target_classes=1), ValueError, "target_classes: .*other than the labels"),
        (lambda n, x: fgsm(n.layer, x, None, 0.1), ValueError, "model: expected logits"),
        (lambda n, x: fgsm(_NoGradient(), x, None, 0.1), ValueError, "model: .*depend on the images differentiably"),
        (lambda n, x: bim(n, x, None, 0.1, steps=0), ValueError, "steps: expected at least 1; got 0"),
        (lambda n, x: bim(n, x, None, 0.1, steps=1.5), TypeError, "steps: expected an integer; got float"),
        (lambda n, x: bim(n, x, None, 0.1, step_size=0), ValueError, "step_size: expected a positive number; got 0"),
        (lambda n, x: carlini_wagner(n, x, None, confidence=-1), ValueError, "confidence: expected at least 0"),
        (lambda n, x: carlini_wagner(n, x, None, search_steps=0), ValueError, "search_steps: expected at least 1"),
        (lambda n, x: carlini_wagner(n, x, None, step_size=-1), ValueError, "step_size: expected a positive number"),
        (lambda n, x: carlini_wagner(n, x, None, initial_constant=0), ValueError, "initial_constant: expected a posi"),
        (lambda n, x: carlini_wagner(n, x, None, abort_early=1), TypeError, "abort_early: expected a bool; got int"),
    ],
)
def test_refusals(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(_network(), _images())


def test_without_foolbox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "foolbox", None)
    with pytest.raises(ImportError, match=r"pip install 'diffcam_fast\[robustness\]'"):
        fgsm(_network(), _images(), None, 0.1)
