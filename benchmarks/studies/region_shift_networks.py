"""The networks of the region-shift study: small ones that are fitted here, and fixed trunks with fitted heads."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.studies import networks, networks_imagenet
from benchmarks.studies.networks_fit import Normalize, fit, fit_probe, fitted

_WIDTH = 16
"""Channels of a residual network's first stage, a quarter of the original's."""


@dataclass(frozen=True)
class Subject:
    """A network whose maps are watched.

    Attributes:
        name: what it is called in tables.
        kind: "deep" or "wide", as the paper sorts them.
        weights: where they come from, in words.
        model: images from 0 to 1 to logits; in eval mode.
        layer: dotted name of the explained layer.
    """

    name: str
    kind: str
    weights: str
    model: nn.Module
    layer: str


@dataclass(frozen=True)
class Fit:
    """How networks are fitted to a set of images.

    Attributes:
        stem: of the set's name, in the cache.
        images: float32 (N, 3, H, W), from 0 to 1.
        labels: int64 (N,).
        class_count: how many classes there are.
        epochs: how often a fitted network sees each image.
        seed: of first weights and of the order of images.
        options: for `benchmarks.studies.networks_fit.fit`.
    """

    stem: str
    images: Tensor
    labels: Tensor
    class_count: int
    epochs: int
    seed: int
    options: dict[str, Any] = field(default_factory=dict)


def _block(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs)]


def _stem(size: int, outputs: int) -> list[nn.Module]:
    """From images of a size to a quarter of 64 pixels, or half of 32."""
    layers = [*_block(3, outputs, stride=2), nn.ReLU()]
    return layers if size <= 32 else [*layers, nn.MaxPool2d(2)]


def vgg_like(size: int, class_count: int) -> nn.Module:
    """Thirteen convolutions and three linear layers (Simonyan and Zisserman, ICLR 2015), a quarter as wide.

    With batch norm, the first of the five poolings for larger images only, and a mean over positions before the linear
    layers.
    """
    layers: list[nn.Module] = []
    channels = 3
    for stage, (count, outputs) in enumerate(((2, 16), (2, 32), (3, 64), (3, 128), (3, 128))):
        for _ in range(count):
            layers += [*_block(channels, outputs), nn.ReLU()]
            channels = outputs
        if stage < 3 or (stage == 3 and size > 32):
            layers.append(nn.MaxPool2d(2))
    hidden = [
        layer
        for _ in range(2)
        for layer in (nn.Linear(channels, channels, bias=False), nn.BatchNorm1d(channels), nn.ReLU())
    ]
    head = nn.Sequential(*hidden, nn.Linear(channels, class_count))
    return _classifier(nn.Sequential(*layers), head)


class Bottleneck(nn.Module):
    """Narrow, filter, widen, and a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.branch = nn.Sequential(
            *_block(inputs, width, 1),
            nn.ReLU(),
            *_block(width, width, 3, stride),
            nn.ReLU(),
            *_block(width, outputs, 1),
        )
        changes = stride != 1 or inputs != outputs
        self.shortcut = nn.Sequential(*_block(inputs, outputs, 1, stride)) if changes else nn.Identity()
        self.activation = nn.ReLU()
        nn.init.zeros_(self.branch[-1].weight)  # a block starts as its shortcut

    def forward(self, input: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, 4 width, H / stride, W / stride)."""
        return self.activation(self.branch(input) + self.shortcut(input))


def resnet_like(counts: tuple[int, ...]) -> Callable[[int, int], nn.Module]:
    """Stages of bottleneck blocks (He et al., CVPR 2016), a quarter as wide; the last keeps its input's resolution."""

    def build(size: int, class_count: int) -> nn.Module:
        layers = _stem(size, _WIDTH)
        channels = _WIDTH
        for stage, count in enumerate(counts):
            width = _WIDTH * 2**stage
            for position in range(count):
                stride = 2 if position == 0 and 0 < stage < len(counts) - 1 else 1
                layers.append(Bottleneck(channels, width, stride))
                channels = 4 * width
        return _classifier(nn.Sequential(*layers), nn.Linear(channels, class_count))

    return build


class SeparableBlock(nn.Module):
    """Two separable convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels in (inputs, outputs):
            layers += [
                nn.ReLU(),
                nn.Conv2d(channels, channels, 3, 1, 1, groups=channels, bias=False),
                *_block(channels, outputs, 1),
            ]
        self.branch = nn.Sequential(*layers, nn.MaxPool2d(3, stride, 1) if stride > 1 else nn.Identity())
        changes = stride != 1 or inputs != outputs
        self.shortcut = nn.Sequential(*_block(inputs, outputs, 1, stride)) if changes else nn.Identity()

    def forward(self, input: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        return self.branch(input) + self.shortcut(input)


def xception_like(size: int, class_count: int) -> nn.Module:
    """Separable convolutions with shortcuts (Chollet, CVPR 2017): three blocks in, four in the middle, one out."""
    layers = _stem(size, 32)
    channels = 32
    for outputs, stride in ((64, 1), (128, 2), (192, 2), (192, 1), (192, 1), (192, 1), (192, 1), (256, 1)):
        layers.append(SeparableBlock(channels, outputs, stride))
        channels = outputs
    return _classifier(nn.Sequential(*layers, nn.ReLU()), nn.Linear(channels, class_count))


def _classifier(features: nn.Module, head: nn.Module) -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            normalize=Normalize((0.5,) * 3, (0.25,) * 3),
            features=features,
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            head=head,
        )
    )


FITTED: dict[str, tuple[str, Callable[[int, int], nn.Module]]] = {
    "VGG-like 16": ("deep", vgg_like),
    "ResNet-50-like": ("deep", resnet_like((3, 4, 6, 3))),
    "ResNet-101-like": ("deep", resnet_like((3, 4, 23, 3))),
    "Xception-like": ("wide", xception_like),
}
"""By name: deep or wide, and what builds it for a size of images and a number of classes."""


def fit_subject(name: str, how: Fit, cache: Path) -> Subject:
    """One of `FITTED`, fitted now or before."""
    kind, build = FITTED[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(how.seed)
        model = build(how.images.shape[-1], how.class_count)

    def train() -> None:
        generator = torch.Generator().manual_seed(how.seed)
        fit(model, how.images, how.labels, epochs=how.epochs, generator=generator, **how.options)

    recipe = {
        "network": name,
        "images": list(how.images.shape),
        "classes": how.class_count,
        "epochs": how.epochs,
        "seed": how.seed,
        "options": how.options,
        "form": 1,
    }
    fitted(cache, f"region_shift-{how.stem}", recipe, model, train)
    return Subject(name, kind, "fitted here", model.requires_grad_(False), "features")


def inception_subject(how: Fit, size: int, count: int, cache: Path) -> Subject:
    """Inception-v3's ImageNet trunk on enlarged images, with a linear layer fitted to the first images.

    Args:
        how: what it is fitted to.
        size: of the enlarged images, in pixels.
        count: how many images the layer is fitted to.
        cache: folder that the layer is kept in.
    """
    trunk = networks_imagenet.load_inception_v3(cache)
    trunk.fc = nn.Identity()
    front = nn.Sequential(
        OrderedDict(
            normalize=Normalize((0.5,) * 3, (0.5,) * 3),
            enlarge=nn.Upsample(size=(size, size), mode="bilinear", align_corners=False),
            trunk=trunk,
        )
    ).eval()
    head = nn.Linear(2048, how.class_count)

    def train() -> None:
        found = fit_probe(front, how.images[:count], how.labels[:count], how.class_count)
        head.load_state_dict(found.state_dict())

    recipe = {"network": "inception_v3", "size": size, "count": count, "images": list(how.images.shape), "form": 1}
    fitted(cache, f"region_shift-{how.stem}", recipe, head, train)
    model = nn.Sequential(OrderedDict([*front.named_children(), ("head", head)])).eval().requires_grad_(False)
    return Subject("Inception-v3", "wide", "ImageNet trunk, head fitted here", model, "trunk.Mixed_7c")


def real_subject(name: str, cache: Path) -> tuple[Subject, networks.Network]:
    """A network with its own weights; see `benchmarks.studies.networks`."""
    network = networks.load(name, cache)
    kind = "wide" if "inception" in name or "xception" in name else "deep"
    model = network.model.requires_grad_(False)
    return Subject(name, kind, "pretrained", model, network.layer), network
