"""The studies' networks have their real weights: as accurate as they are known to be, looking where they should."""

from __future__ import annotations

import functools

import pytest
import torch

import diffcam_fast as dcf
from benchmarks.studies import data, networks
from tests.studies.fetched import CACHE, fetched

pytest.importorskip("tests.helpers.torchvision_cpu")

IMAGENET = {"efficientnet_lite0": (18, 19), "efficientnet_b0": (18, 20), "inception_v3": (19, 20)}
BULL_MASTIFF, TIGER_CAT = 243, 282


@functools.cache
def load(name):
    return fetched(lambda: networks.load(name, CACHE))


def accuracy(network, images):
    with torch.inference_mode():
        predicted = torch.cat([network.model(part).argmax(1) for part in images.floats().split(50)])
    return float((predicted == images.labels).float().mean())


def test_cifar_resnet18_is_accurate():
    images = fetched(lambda: data.cifar10("test", CACHE)).first(1000)
    assert accuracy(load("cifar_resnet18"), images) >= 0.93


def test_the_probe_on_mobilenet_is_accurate():
    images = fetched(lambda: data.cifar10("test", CACHE)).first(100)
    assert accuracy(load("mobilenet_v2_cifar"), images) >= 0.7


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_networks_know_the_photos(name):
    network = load(name)
    photos = fetched(lambda: data.photos(CACHE, network.size))
    labelled = photos.labels >= 0
    with torch.inference_mode():
        best = network.model(photos.floats()[labelled]).topk(5).indices == photos.labels[labelled, None]
    assert (int(best[:, 0].sum()), int(best.any(1).sum())) == IMAGENET[name]


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_networks_look_at_the_dog_above_and_the_cat_below(name):
    network = load(name)
    photos = fetched(lambda: data.photos(CACHE, network.size))
    both = photos.floats()[photos.names.index("both.png")][None]
    explainer = dcf.Explainer(network.model, network.layer, target=dcf.Logit(), size=None)
    maps = explainer(both, torch.tensor([[BULL_MASTIFF, TIGER_CAT]])).maps[0]
    heights = torch.linspace(0, 1, maps.shape[1])
    dog, cat = ((maps.sum(2) * heights).sum(1) / maps.sum((1, 2))).tolist()
    assert dog < 0.4
    assert cat > 0.6


@pytest.mark.parametrize("name", networks.NAMES)
def test_what_is_said_of_a_network_is_so(name):
    network = load(name)
    assert not any(module.training for module in network.model.modules())
    assert {value.dtype for value in network.model.parameters()} == {torch.float32}
    outputs = []
    hook = network.model.get_submodule(network.layer).register_forward_hook(lambda *call: outputs.append(call[2]))
    with torch.inference_mode():
        logits = network.model(torch.full((1, 3, network.size, network.size), 0.5))
    hook.remove()
    assert logits.shape == (1, len(network.labels))
    assert min(outputs[0].shape[2:]) >= 4
    assert network.bounds == (0.0, 1.0)


def test_loaded_twice_is_the_same():
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    again = networks.load("mobilenet_v2_cifar", CACHE) if load("mobilenet_v2_cifar") else None
    with torch.inference_mode():
        assert torch.equal(load("mobilenet_v2_cifar").model(images), again.model(images))


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"network: got 'resnet18', expected cifar_resnet18, .* or torchvision:NAME"):
        networks.load("resnet18", tmp_path)
    with pytest.raises(ValueError, match="torchvision has no classifier 'resnet19'"):
        networks.load("torchvision:resnet19", tmp_path)


def test_torchvision_without_a_network_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with pytest.raises(RuntimeError, match="pretrained weights of 'torchvision:resnet18' could not be loaded"):
        networks.load("torchvision:resnet18", tmp_path)


def test_torchvision_with_weights_in_place(tmp_path, monkeypatch):
    """Stands in for the download: the rest of the way, from torchvision's preset to the network's description."""
    from tests.helpers.torchvision_cpu import models

    torch.manual_seed(0)
    state = models.resnet18(weights=None).state_dict()
    monkeypatch.setattr(models.ResNet18_Weights, "get_state_dict", lambda *_, **__: state)
    network = networks.load("torchvision:resnet18", tmp_path)
    assert (network.size, network.layer, len(network.labels)) == (224, "network.layer4", 1000)
    assert network.model.normalize.std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])
