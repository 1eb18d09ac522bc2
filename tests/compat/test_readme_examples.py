"""The examples of pytorch-grad-cam's README, read from the installed package: by the original, and by ours.

What is changed beside the import stands in `ADAPTATIONS`: a small network with random weights in place of a large one
that would be downloaded, a photo in place of a comment that asks for one, and what would not run with the original.
"""

from __future__ import annotations

import re
from contextlib import nullcontext
from importlib.metadata import metadata
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import diffcam_fast.compat
from diffcam_fast.compat.originals import original
from tests.models.sample_photos import sample
from tests.tolerances import COMPAT_SHARE_OF_RANGE, PIXEL

torchvision_models = pytest.importorskip("tests.helpers.torchvision_cpu").models
pytest.importorskip("pytorch_grad_cam")
cv2 = pytest.importorskip("cv2")
Image = pytest.importorskip("PIL.Image")

OURS = "diffcam_fast.compat.pytorch_grad_cam"
SIZE = 96

NETWORK = ("resnet50(weights=ResNet50_Weights.DEFAULT)", "resnet18(weights=None)")
ADAPTATIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "a map": (
        NETWORK,
        ("from torchvision.models import resnet50, ResNet50_Weights\n", ""),
        ("input_tensor = # Create an input tensor image for your model..\n", ""),
    ),
    "a target": (),
    # Modules have no method `device`.
    "guided backpropagation": (("model.device()", "'cpu'"),),
    "metrics": (
        # Not Python: a line break in an import without parentheses.
        ("import ROADMostRelevantFirstAverage,\n", "import ROADMostRelevantFirstAverage, \\\n"),
        ("ROADLeastRelevantFirstAverage,\n", "ROADLeastRelevantFirstAverage, \\\n"),
        # The module's name is in small letters.
        ("metrics.ARCC import", "metrics.arcc import"),
        # NumPy does not take the mean of a tensor.
        ("batch_visualizations[0, :]", "batch_visualizations[0, :].numpy(force=True)"),
    ),
    "scaling and sliding": (),
    "scaling and sliding, less of it": (("step_size=224", "step_size=64"),),
}


def examples() -> dict[str, str]:
    """The README's blocks of Python, in its order, under the names above."""
    described = metadata("grad-cam")
    assert described["Version"] == "1.5.7"
    text = described["Description"] or str(described.get_payload())
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == len(ADAPTATIONS)
    return dict(zip(ADAPTATIONS, blocks, strict=True))


def adapted(name: str) -> str:
    code = examples()[name]
    for before, after in ADAPTATIONS[name]:
        assert code.count(before) == 1, before
        code = code.replace(before, after)
    return code


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return torchvision_models.resnet18(weights=None).eval()


@pytest.fixture
def scene(network: nn.Module) -> dict[str, Any]:
    """What the examples take for granted: a network, a photo, and the names that earlier ones have defined."""
    rgb_img = np.float32(Image.open(sample("chelsea.png")).convert("RGB").resize((SIZE, SIZE))) / 255
    preprocess = original("pytorch_grad_cam", "utils.image").preprocess_image
    return {
        "resnet18": lambda weights: network,
        "model": network,
        "target_layers": [network.layer4[-1]],
        "rgb_img": rgb_img,
        "input_tensor": preprocess(rgb_img, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
        "cv2": cv2,
    }


def run(code: str, names: dict[str, Any], package: str, *, installed: bool = False) -> dict[str, Any]:
    """The names that a piece of code leaves."""
    if package != "pytorch_grad_cam":
        assert "pytorch_grad_cam" in code
        code = code.replace("pytorch_grad_cam", package)
    found = dict(names)
    torch.manual_seed(0)
    np.random.seed(0)
    with diffcam_fast.compat.installed("pytorch_grad_cam") if installed else nullcontext():
        exec(code, found)
    return found


def all_three(code: str, names: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """By the original; and by ours, with another import and with the original's name standing for ours."""
    expected = run(code, names, "pytorch_grad_cam")
    return expected, [run(code, names, OURS), run(code, names, "pytorch_grad_cam", installed=True)]


def with_a_map(scene: dict[str, Any], package: str) -> dict[str, Any]:
    """The scene, and what the first example leaves: ours or theirs."""
    found = run(adapted("a map"), scene, package)
    # Anew: the example ends with the block that releases its hooks.
    cam = found["GradCAM"](model=scene["model"], target_layers=scene["target_layers"])
    kept = {name: found[name] for name in ("GradCAM", "grayscale_cam", "targets")}
    return {**scene, **kept, "cam": cam}


def is_ours(thing: Any) -> bool:
    return type(thing).__module__.startswith(OURS) or getattr(thing, "__module__", "").startswith(OURS)


def assert_same_maps(found: np.ndarray, expected: np.ndarray, bound: float = COMPAT_SHARE_OF_RANGE) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype and np.ptp(expected) > 0.5
    assert np.abs(found - expected).max() <= bound * np.ptp(expected)


def assert_same_picture(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape and found.dtype == np.uint8 and np.ptp(expected) > 100
    assert np.abs(found.astype(int) - expected).max() <= PIXEL


def test_a_map(scene: dict[str, Any]) -> None:
    expected, ours = all_three(adapted("a map"), scene)
    assert not is_ours(expected["cam"])
    for found in ours:
        assert is_ours(found["cam"])
        assert_same_maps(found["grayscale_cam"], expected["grayscale_cam"])
        assert_same_picture(found["visualization"], expected["visualization"])
        assert torch.equal(found["model_outputs"], expected["model_outputs"].detach())


def test_a_target(scene: dict[str, Any]) -> None:
    code = "from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget\n" + adapted("a target")
    expected, ours = all_three(code, scene)
    output = torch.arange(1000.0)
    for found in ours:
        assert is_ours(found["targets"][0])
        assert found["targets"][0](output) == expected["targets"][0](output) == 281


def test_guided_backpropagation(scene: dict[str, Any]) -> None:
    code = adapted("guided backpropagation")
    expected = run(code, with_a_map(scene, "pytorch_grad_cam"), "pytorch_grad_cam")
    found = run(code, with_a_map(scene, OURS), OURS)
    assert np.ptp(expected["gb"]) > 0 and np.array_equal(found["gb"], expected["gb"])
    assert_same_picture(found["cam_gb"], expected["cam_gb"])
    assert_same_picture(found["result"], expected["result"])


def test_metrics(scene: dict[str, Any]) -> None:
    code = adapted("metrics")
    left = []
    for package in ("pytorch_grad_cam", OURS):
        names = with_a_map(scene, package)
        maps = names["grayscale_cam"][None]
        names |= {"grayscale_cams": maps, "inverse_cams": 1 - maps}
        names["deprocess_image"] = original("pytorch_grad_cam", "utils.image").deprocess_image
        left.append(run(code, names, package))
    expected, found = left
    assert is_ours(found["cam"]) and is_ours(found["metric_target"])
    for name in ("scores", "arcc_score"):
        assert np.isfinite(expected[name]).all() and np.abs(found[name] - expected[name]).max() < 1e-4
    for name in ("batch_visualizations", "perturbation_visualizations"):
        assert torch.allclose(found[name], expected[name], atol=1e-4)
    assert_same_picture(found["visualization"], expected["visualization"])


def test_scaling_and_sliding(scene: dict[str, Any]) -> None:
    """The original's wrapper around our class."""
    first, second = adapted("scaling and sliding"), adapted("scaling and sliding, less of it")
    code = first + second + "again = cam(input_tensor=input_tensor, targets=targets)\n"
    small: Tensor = scene["input_tensor"][:, :, -64:, -64:]
    left = []
    for package in ("pytorch_grad_cam", OURS):
        left.append(run(code, with_a_map(scene, package) | {"input_tensor": small}, package))
    expected, found = left
    assert is_ours(found["cam"].base_cam) and not is_ours(expected["cam"].base_cam)
    for name in ("grayscale_cam", "again"):
        # Scores of patches weight their maps: both are in float32, and so are their sums.
        assert_same_maps(found[name], expected[name], 10 * COMPAT_SHARE_OF_RANGE)
