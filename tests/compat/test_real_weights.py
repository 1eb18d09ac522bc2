"""A trained network on real photos: maps of pytorch-grad-cam's names here against those of the installed original."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffcam_fast.compat import pytorch_grad_cam as ours
from diffcam_fast.compat.originals import original
from diffcam_fast.models import load_model, read_photo
from tests.compat.test_golden import METHODS, assert_same
from tests.models.sample_photos import imagenet_photos
from tests.tolerances import PIXEL

pytest.importorskip("tests.helpers.torchvision_cpu")
pytest.importorskip("pytorch_grad_cam")
theirs = original("pytorch_grad_cam")

Scene = tuple[nn.Module, Tensor, list[int], Tensor]


@pytest.fixture(scope="module")
def photos() -> Scene:
    """The network, three photos as it takes them, what they show, and their pixels (N, H, W, 3)."""
    loaded = load_model()
    chosen = imagenet_photos()[:3]
    pixels = torch.stack([loaded.preprocessing.pixels(read_photo(path)) for path, _ in chosen])
    return loaded.model, loaded.preprocessing.normalize(pixels), [label for _, label in chosen], pixels.movedim(1, -1)


def maps(library: Any, method: str, photos: Scene, count: int, layers: tuple[str, ...] = ("head_activation",)) -> Any:
    model, x, classes, _ = photos
    targets = [ours.utils.model_targets.ClassifierOutputTarget(c) for c in classes[:count]]
    with getattr(library, method)(model, [model.get_submodule(name) for name in layers]) as cam:
        return cam(x[:count]) if method == "FinerCAM" else cam(x[:count], targets)


@pytest.mark.parametrize("count", (1, 3))
@pytest.mark.parametrize("method", (*METHODS, "FinerCAM"))
def test_photos(method: str, count: int, photos: Scene) -> None:
    assert_same(maps(ours, method, photos, count), maps(theirs, method, photos, count))


@pytest.mark.parametrize("method", ("GradCAM", "GradCAMPlusPlus", "LayerCAM"))
def test_several_layers(method: str, photos: Scene) -> None:
    layers = ("_blocks.10", "head_activation")
    assert_same(maps(ours, method, photos, 1, layers), maps(theirs, method, photos, 1, layers))


def test_the_picture(photos: Scene) -> None:
    pixels = photos[3][0].numpy().astype(np.float32) / 255
    shown = [
        original("pytorch_grad_cam", "utils.image").show_cam_on_image(pixels, maps(theirs, "GradCAM", photos, 1)[0]),
        ours.utils.image.show_cam_on_image(pixels, maps(ours, "GradCAM", photos, 1)[0]),
    ]
    assert shown[1].shape == shown[0].shape == pixels.shape
    assert np.abs(np.subtract(*shown, dtype=int)).max() <= PIXEL
