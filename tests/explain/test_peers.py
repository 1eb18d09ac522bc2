"""Maps of whole networks against what users have today: pytorch-grad-cam, torchcam and captum."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import diffcam_fast as dcf
from diffcam_fast.models import load_efficientnet_lite0
from diffcam_fast.reference.cam import METHODS
from tests.tolerances import PEER_SHARE_OF_RANGE

models = pytest.importorskip("tests.helpers.torchvision_cpu").models
pytorch_grad_cam = pytest.importorskip("pytorch_grad_cam")
torchcam = pytest.importorskip("torchcam.methods")
captum = pytest.importorskip("captum.attr")

#: Network, layer, image size.
NETWORKS = {
    "resnet50": ("layer4", 128),
    "mobilenet_v2": ("features.18", 128),
    # The last batch norm, with the ReLU that works in place right behind it, is test_in_place_relu's.
    "densenet121": ("features.denseblock4", 128),
    "vgg16": ("features.29", 96),
    "vit_b_16": ("encoder.layers.encoder_layer_11.ln_1", 224),
    "efficientnet_lite0": ("head_activation", 128),
}
THEIRS = {
    "gradcam": pytorch_grad_cam.GradCAM,
    "gradcam++": pytorch_grad_cam.GradCAMPlusPlus,
    "xgradcam": pytorch_grad_cam.XGradCAM,
    "hirescam": pytorch_grad_cam.HiResCAM,
    "layercam": pytorch_grad_cam.LayerCAM,
    "elementwise": pytorch_grad_cam.GradCAMElementWise,
}
TORCHCAM = {"gradcam": torchcam.GradCAM, "xgradcam": torchcam.XGradCAM, "layercam": torchcam.LayerCAM}


def _build(name: str) -> nn.Module:
    """The network; with seeded random weights, scaled so that its maps are not lost beside anyone's epsilon."""
    if name == "efficientnet_lite0":
        return load_efficientnet_lite0()
    torch.manual_seed(0)
    model = models.get_model(name, weights=None)
    if name.startswith("vit"):
        nn.init.normal_(model.heads.head.weight, std=0.1)  # torchvision starts from a head of zeros
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in norms:
        module.momentum = 1.0
    if norms:
        with torch.no_grad():
            model.train()(torch.randn(4, 3, 160, 160))
    return model.eval()


@pytest.fixture(scope="module", params=sorted(NETWORKS))
def network(request: pytest.FixtureRequest) -> Iterator[tuple[str, nn.Module, str, Tensor, list[int]]]:
    layer, size = NETWORKS[request.param]
    model = _build(request.param)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    if request.param == "vit_b_16":
        # XGrad-CAM divides by sums of activations, which nearly cancel behind a layer norm: in float32 the order in
        # which attention adds up is seen in the map, whoever computes it.
        # One image: these are the slowest tests of the suite.
        model, images = model.double(), images[:1].double()
    with torch.no_grad():
        # A strong and a weak class: both kinds of evidence are there.
        classes = [
            int(index) for index in model(images).argsort(1, descending=True)[range(len(images)), range(len(images))]
        ]
    yield request.param, model, layer, images, classes


def _reshape(name: str) -> Callable[[Tensor], Tensor] | None:
    return dcf.tokens_to_positions() if name.startswith("vit") else None


def _share_of_range(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    span = expected.amax() - expected.amin()
    assert span > 0
    return float((found - expected).abs().amax() / span)


def _target(classes: list[int]) -> list:
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    return [ClassifierOutputTarget(index) for index in classes]


@pytest.mark.parametrize("method", METHODS)
def test_pytorch_grad_cam(network: tuple, method: str) -> None:
    name, model, layer, images, classes = network
    reshape = _reshape(name)
    with THEIRS[method](model=model, target_layers=[model.get_submodule(layer)], reshape_transform=reshape) as theirs:
        expected = torch.from_numpy(theirs(input_tensor=images, targets=_target(classes)))
    explainer = dcf.Explainer(model, layer, method, dcf.Logit(), reshape=reshape)
    found = explainer(images, classes).maps[:, 0]
    assert _share_of_range(found, expected) <= PEER_SHARE_OF_RANGE


def test_pytorch_grad_cam_finer(network: tuple) -> None:
    from pytorch_grad_cam.utils.model_targets import FinerWeightedTarget

    name, model, layer, images, classes = network
    reshape = _reshape(name)
    with torch.no_grad():
        distances = (model(images) - model(images).gather(1, torch.tensor(classes)[:, None])).abs().argsort(1)
    targets = [FinerWeightedTarget(c, row[1:4].tolist(), 1.0) for c, row in zip(classes, distances, strict=True)]
    layers = [model.get_submodule(layer)]
    with pytorch_grad_cam.GradCAM(model=model, target_layers=layers, reshape_transform=reshape) as theirs:
        expected = torch.from_numpy(theirs(input_tensor=images, targets=targets))
    found = dcf.Explainer(model, layer, "gradcam", dcf.Finer(), reshape=reshape)(images, classes).maps[:, 0]
    assert _share_of_range(found, expected) <= PEER_SHARE_OF_RANGE


@pytest.mark.parametrize("method", sorted(TORCHCAM))
def test_torchcam(network: tuple, method: str) -> None:
    name, model, layer, images, classes = network
    if name.startswith("vit"):
        pytest.skip("torchcam reshapes tokens after weighting, which is another map")
    with TORCHCAM[method](model, target_layer=layer) as theirs:
        logits = model(images)
        (expected,) = theirs(classes, logits)
    found = dcf.Explainer(model, layer, method, dcf.Logit(), size=None)(images, classes).maps[:, 0]
    assert _share_of_range(found, expected) <= PEER_SHARE_OF_RANGE


def test_captum(network: tuple) -> None:
    name, model, layer, images, classes = network
    if name.startswith("vit"):
        pytest.skip("captum takes the second dimension for channels, which for tokens it is not")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = captum.LayerGradCam(model, model.get_submodule(layer))
        expected = theirs.attribute(images, torch.tensor(classes)).detach()[:, 0]
    explainer = dcf.Explainer(model, layer, "gradcam", dcf.Logit(), normalize=None, size=None, relu=False)
    found = explainer(images, classes).maps[:, 0]
    assert _share_of_range(found, expected) <= PEER_SHARE_OF_RANGE


def test_in_place_relu() -> None:
    """Behind DenseNet's last batch norm a ReLU works in place: two peers explain what it left, not the layer."""
    model, layer = _build("densenet121"), "features.norm5"
    images = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    classes = model(images).argmax(1).tolist()
    found = dcf.Explainer(model, layer, "gradcam", dcf.Logit())(images, classes).maps[:, 0]

    # The same network with the ReLU out of place.
    class OutOfPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.classifier = model.features, model.classifier

        def forward(self, images: Tensor) -> Tensor:
            return self.classifier(self.features(images).relu().mean((2, 3)))

    with pytorch_grad_cam.GradCAM(model=OutOfPlace(), target_layers=[model.features.norm5]) as theirs:
        right = torch.from_numpy(theirs(input_tensor=images, targets=_target(classes)))
    with pytorch_grad_cam.GradCAM(model=model, target_layers=[model.features.norm5]) as theirs:
        wrong = torch.from_numpy(theirs(input_tensor=images, targets=_target(classes)))
    assert _share_of_range(found, right) <= PEER_SHARE_OF_RANGE
    assert _share_of_range(wrong, right) > 0.01

    with torchcam.GradCAM(model, target_layer=layer) as theirs:
        (wrong,) = theirs(classes, model(images))
    own = dcf.Explainer(model, layer, "gradcam", dcf.Logit(), size=None)(images, classes).maps[:, 0]
    assert _share_of_range(wrong, own) > 0.01
