"""The real networks that the studies explain, each as a module that takes images from 0 to 1."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from benchmarks.studies import networks_cifar, networks_imagenet
from benchmarks.studies.data import CIFAR10_CLASSES
from benchmarks.studies.networks_fit import Normalize
from diffcam_fast.explain.layers import choose_layer
from diffcam_fast.models.efficientnet_lite import LITE0_PREPROCESSING, load_efficientnet_lite0
from diffcam_fast.models.imagenet_classes import imagenet_labels
from diffcam_fast.models.loading import load_model

_TORCHVISION = "torchvision:"


@dataclass(frozen=True)
class Network:
    """A classifier and what one must know to explain and to attack it.

    Attributes:
        name: what it was loaded by.
        model: float32 images (N, 3, size, size) from 0 to 1 to logits; in eval mode, normalisation inside.
        size: height and width of its images, in pixels.
        labels: the names of its classes.
        layer: dotted name of the layer that is explained.
        bounds: least and largest value of a pixel.
    """

    name: str
    model: nn.Module
    size: int
    labels: tuple[str, ...]
    layer: str
    bounds: tuple[float, float] = (0.0, 1.0)


class NetworkError(ValueError):
    """There is no network of that name, or it is of no use here."""


def load(name: str, cache: Path) -> Network:
    """A network with its real weights, in eval mode, on the CPU, in float32.

    Args:
        name: one of `NAMES`, or "torchvision:NAME" for a classifier of torchvision with its own pretrained weights,
            which are downloaded.
        cache: folder that fetched and fitted weights are kept in.

    Raises:
        NetworkError: an unknown name, or a network with other classes.
        FetchRefusedError: the weights are not in the cache, and no registry served them.
        RuntimeError: torchvision's weights could not be downloaded.
        ImportError: a package is missing.
    """
    if name.startswith(_TORCHVISION):
        try:
            network = _torchvision(name)
        except ValueError as error:
            raise NetworkError(f"network: {error}") from error
    elif name in _LOADERS:
        network = _LOADERS[name](cache)
    else:
        raise NetworkError(f"network: got {name!r}, expected {', '.join(NAMES)} or {_TORCHVISION}NAME")
    network.model.eval()
    return network


def _cifar_resnet18(cache: Path) -> Network:
    return Network("cifar_resnet18", networks_cifar.load_resnet18(cache), 32, CIFAR10_CLASSES, "layer4")


def _mobilenet_v2_cifar(cache: Path) -> Network:
    return Network("mobilenet_v2_cifar", networks_cifar.load_mobilenet_v2(cache), 32, CIFAR10_CLASSES, "features")


def _efficientnet_lite0(cache: Path) -> Network:
    model = _normalized(load_efficientnet_lite0(), LITE0_PREPROCESSING.mean, LITE0_PREPROCESSING.std)
    return Network("efficientnet_lite0", model, 224, imagenet_labels(), "network.head_activation")


def _efficientnet_b0(cache: Path) -> Network:
    model = networks_imagenet.load_efficientnet_b0(cache)
    model = _normalized(model, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return Network("efficientnet_b0", model, 224, imagenet_labels(), "network.features")


def _inception_v3(cache: Path) -> Network:
    model = _normalized(networks_imagenet.load_inception_v3(cache), (0.5,) * 3, (0.5,) * 3)
    return Network("inception_v3", model, 299, imagenet_labels(), "network.Mixed_7c")


_LOADERS: dict[str, Callable[[Path], Network]] = {
    "cifar_resnet18": _cifar_resnet18,
    "efficientnet_lite0": _efficientnet_lite0,
    "efficientnet_b0": _efficientnet_b0,
    "inception_v3": _inception_v3,
    "mobilenet_v2_cifar": _mobilenet_v2_cifar,
}

NAMES = tuple(_LOADERS)
"""The networks that come out of packages or are fitted here."""


def _torchvision(name: str) -> Network:
    # Imports a build for GPUs beside a PyTorch without them, too.
    import tests.helpers.torchvision_cpu  # noqa: F401

    loaded = load_model(name)
    if loaded.labels is None:
        raise ValueError(f"{name!r} has other classes than ImageNet's")
    preprocessing = loaded.preprocessing
    model = _normalized(loaded.model, preprocessing.mean, preprocessing.std).eval()
    size = preprocessing.size[0]
    return Network(name, model, size, loaded.labels, choose_layer(model, torch.full((1, 3, size, size), 0.5)))


def _normalized(network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> nn.Module:
    return nn.Sequential(OrderedDict(normalize=Normalize(mean, std), network=network))
