"""Which layer is explained: by name, by module, or chosen."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffcam_fast.explain import Explainer
from diffcam_fast.explain.layers import choose_layer
from tests.explain.networks import Branches, InPlaceAfter, PooledConvolutions, Residual, Signal, Tokens, Volume, make


def _chosen(model: nn.Module, images: Tensor) -> str:
    (name,) = Explainer(model, size=None)(images).layers
    return name


class TestChoice:
    @pytest.mark.parametrize(
        ("kind", "expected"),
        [
            (PooledConvolutions, "layer"),
            (InPlaceAfter, "layer"),
            (Residual, "late"),
            (Branches, "right"),
            (Signal, "layer"),
            (Volume, "head.0"),
        ],
    )
    def test_small_networks(self, kind: Callable[[], Any], expected: str) -> None:
        network = make(kind)
        assert _chosen(network, network.images()) == expected

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("resnet18", "layer4"),
            ("mobilenet_v2", "features"),
            ("densenet121", "features"),
            ("efficientnet_b0", "features"),
            ("vgg11", "features.19"),  # the last convolution's ReLU: what follows is pooling
            ("squeezenet1_1", "classifier.2"),
            ("shufflenet_v2_x0_5", "conv5"),
            ("convnext_tiny", "features"),
            ("swin_t", "permute"),  # channels last until there
        ],
    )
    def test_known_networks(self, name: str, expected: str) -> None:
        models = pytest.importorskip("tests.helpers.torchvision_cpu").models
        with torch.device("meta"):  # shapes are all it takes
            model, images = models.get_model(name).eval(), torch.empty(1, 3, 64, 64)
        with torch.no_grad():
            assert choose_layer(model, images) == expected

    def test_transformers_are_refused(self) -> None:
        network = make(Tokens)
        with pytest.raises(ValueError, match=r"cannot choose a layer.*'patches'.*tokens.*pass layers= and reshape="):
            Explainer(network)(network.images())

    def test_channels_last_is_refused(self) -> None:
        class ChannelsLast(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.patches = nn.Conv2d(3, 8, 4, stride=4)
                self.block = nn.Sequential(nn.Linear(8, 8), nn.GELU())
                self.head = nn.Linear(8, 4)

            def forward(self, x: Tensor) -> Tensor:
                x = self.patches(x).movedim(1, -1)
                return self.head((x + self.block(x)).mean((1, 2)))

        with pytest.raises(ValueError, match=re.escape("reshape=lambda x: x.movedim(-1, 1)")):
            Explainer(ChannelsLast())(torch.randn(1, 3, 16, 16))
        explainer = Explainer(ChannelsLast(), "block", reshape=lambda x: x.movedim(-1, 1))
        assert explainer(torch.randn(1, 3, 16, 16)).maps.shape == (1, 1, 16, 16)

    def test_tokens_of_a_signal_are_refused(self) -> None:
        class SignalTokens(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embed = nn.Conv1d(2, 4, 4, stride=4)
                self.encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
                self.head = nn.Linear(4, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.head(self.encoder(self.embed(x).transpose(1, 2)).mean(1))

        with pytest.raises(ValueError, match="cannot choose a layer"):
            Explainer(SignalTokens())(torch.randn(1, 2, 32))

    def test_nothing_to_choose(self) -> None:
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        with pytest.raises(ValueError, match=r"found no layer .* images of shape \(1, 3, 2, 2\)\); pass layers="):
            Explainer(model)(torch.randn(1, 3, 2, 2))

    def test_modules_called_twice_do_not_count(self) -> None:
        class Shared(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first, self.relu, self.second = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.relu(self.second(self.relu(self.first(x)))).mean((2, 3))

        assert _chosen(Shared(), torch.randn(1, 3, 8, 8)) == "second"

    def test_is_made_once(self) -> None:
        network = make(PooledConvolutions)
        forwards: list[int] = []
        network.register_forward_hook(lambda module, inputs, output: forwards.append(len(output)))
        explainer = Explainer(network)
        explainer(network.images(3))
        explainer(network.images(3))
        assert forwards == [1, 3, 3]

    def test_draws_no_random_numbers(self) -> None:
        class Noisy(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Conv2d(3, 4, 3)

            def forward(self, x: Tensor) -> Tensor:
                return nn.functional.dropout(self.layer(x), 0.5).mean((2, 3))

        model, images = Noisy(), torch.randn(2, 3, 8, 8)
        chosen, given = Explainer(model), Explainer(model, "layer")
        torch.manual_seed(3)
        first = chosen(images).logits
        torch.manual_seed(3)
        assert torch.equal(given(images).logits, first)
        assert not torch.equal(given(images).logits, first)  # the model's own randomness is the model's


class TestAll:
    def test_every_layer_with_positions(self) -> None:
        network = make(PooledConvolutions)
        images = network.images()
        explainer = Explainer(network, "all")
        for _ in range(2):
            explanation = explainer(images, [[0, 1]] * 2)
            # "early" and "layer" put out what their last modules put out
            assert explanation.layers == ("early.0", "early.1", "early.2", "layer.0", "layer.1", "layer.2")
            for name in explanation.layers:
                single = Explainer(network, name)(images, [[0, 1]] * 2)
                torch.testing.assert_close(explanation.layer_maps[name], single.layer_maps[name])

    def test_in_one_pass(self, monkeypatch: pytest.MonkeyPatch) -> None:
        network = make(Residual)
        explainer = Explainer(network, "all")
        images = network.images()
        explainer(images)
        forwards, pull_backs = [], []
        network.register_forward_hook(lambda *args: forwards.append(1))
        grad = torch.autograd.grad
        monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kw: pull_backs.append(1) or grad(*args, **kw))
        explanation = explainer(images, [[0, 1, 2]] * 2)
        assert explanation.layers == ("layer", "block.0", "block.1", "late")
        assert (len(forwards), len(pull_backs)) == (1, 1)

    def test_every_block_of_a_residual_network(self) -> None:
        models = pytest.importorskip("tests.helpers.torchvision_cpu").models
        torch.manual_seed(0)
        model, images = models.resnet18(num_classes=10).eval(), torch.randn(2, 3, 64, 64)
        layers = Explainer(model, "all")(images).layers
        blocks = [f"layer{stage}.{index}" for stage in (1, 2, 3, 4) for index in (0, 1)]
        assert set(blocks) <= set(layers)
        assert {"conv1", "bn1", "relu", "maxpool", "layer2.0.downsample.0", "layer2.0.downsample.1"} <= set(layers)
        # the stages end in blocks, and a block calls its ReLU twice
        assert not {"layer1", "layer1.0.relu", "layer2.0.downsample", "avgpool", "fc"} & set(layers)
        explainer = Explainer(model, blocks)
        for _ in range(2):
            explanation = explainer(images)
            for name in blocks:
                single = Explainer(model, name)(images).layer_maps[name]
                torch.testing.assert_close(explanation.layer_maps[name], single, rtol=0, atol=1e-4)

    def test_a_layer_and_what_ends_in_it(self) -> None:
        network = make(PooledConvolutions)
        images = network.images()
        explainer = Explainer(network, ["layer", "layer.2", "early"])
        for _ in range(3):
            found = explainer(images).layer_maps
            torch.testing.assert_close(found["layer"], found["layer.2"])
            torch.testing.assert_close(found["layer"], Explainer(network, "layer")(images).layer_maps["layer"])

    def test_a_module_of_that_name(self) -> None:
        model = nn.Sequential()
        model.add_module("all", nn.Conv2d(3, 4, 3))
        model.add_module("then", nn.Conv2d(4, 4, 3))
        model.add_module("pool", nn.AdaptiveAvgPool2d(1))
        model.add_module("flat", nn.Flatten())
        assert Explainer(model, "all")(torch.randn(1, 3, 8, 8)).layers == ("all",)

    def test_none(self) -> None:
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        with pytest.raises(
            ValueError, match=r"found no layer to explain .* images of shape \(1, 3, 2, 2\)\); pass the"
        ):
            Explainer(model, "all")(torch.randn(1, 3, 2, 2))


class TestGiven:
    def test_forms(self) -> None:
        network = make(PooledConvolutions)
        images = network.images()
        expected = Explainer(network, "layer")(images).maps
        for layers in (network.layer, ["layer"], (network.layer,), nn.ModuleList([network.layer])[0]):
            explanation = Explainer(network, layers)(images)
            assert explanation.layers == ("layer",)
            assert torch.equal(explanation.maps, expected)

    def test_nested(self) -> None:
        network = make(PooledConvolutions)
        assert Explainer(network, ["layer.1", network.early[0]])(network.images()).layers == ("layer.1", "early.0")

    @pytest.mark.parametrize(
        ("layers", "error", "message"),
        [
            ("layr", ValueError, "layers: the model has no layer 'layr'; close names: 'layer'"),
            ("zzz", ValueError, "no layer 'zzz'; it has: 'early', 'layer', 'drop', 'head'"),
            (nn.Conv2d(3, 4, 3), ValueError, "expected a module of the model; got a Conv2d that is not part of it"),
            (3, TypeError, "layers: expected a module, a dotted name, a list of either, or None; got int"),
            ([3], TypeError, "layers: expected a module or a dotted name; got int"),
            ([], ValueError, "layers: expected at least one layer"),
            (["layer", "layer"], ValueError, "layers: expected each layer once; got 'layer' twice"),
        ],
        ids=str,
    )
    def test_refused(self, layers: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            Explainer(make(PooledConvolutions), layers)

    def test_a_shared_module_is_one_layer(self) -> None:
        network = make(PooledConvolutions)
        network.alias = network.layer
        with pytest.raises(ValueError, match="got 'alias' twice"):
            Explainer(network, ["layer", "alias"])


class Model(nn.Module):
    def __init__(self, forward: Callable[[Model, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3, padding=1)
        self.lstm = nn.LSTM(4, 4, batch_first=True)
        self.shrink = nn.AdaptiveAvgPool2d(1)
        self.unused = nn.Conv2d(3, 4, 3)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


@pytest.mark.parametrize(
    ("layer", "forward", "error", "message"),
    [
        (
            "unused",
            lambda m, x: m.layer(x).mean((2, 3)),
            ValueError,
            "expected the model to call layer 'unused'; it was not called",
        ),
        (
            "layer",
            lambda m, x: m.layer(m.layer(x)[:, :3]).mean((2, 3)),
            ValueError,
            "expected the model to call layer 'layer' once; it was called 2 times",
        ),
        (
            "lstm",
            lambda m, x: m.lstm(m.layer(x).flatten(2).transpose(1, 2))[0].mean(1),
            TypeError,
            "expected layer 'lstm' to put out a tensor; got tuple",
        ),
        (
            "shrink",
            lambda m, x: m.shrink(m.layer(x)).flatten(1),
            ValueError,
            r"expected layer 'shrink' to have several positions for a map; got shape \(2, 4, 1, 1\)",
        ),
        (
            "",
            lambda m, x: m.layer(x).mean((2, 3)),
            ValueError,
            r"expected layer '' to put out \(N, C, \*positions\).*got shape \(2, 4\)",
        ),
        (
            "layer",
            lambda m, x: m.layer(torch.cat([x, x])).unflatten(0, (2, 2)).mean((1, 3, 4)),
            ValueError,
            r"expected layer 'layer' to put out one entry per image, 2 in all; got shape \(4, 4, 8, 8\)",
        ),
    ],
    ids=["not called", "called twice", "tuple", "one position", "no positions", "another batch"],
)
def test_layers_that_cannot_be_explained(
    layer: str, forward: Callable[[Model, Tensor], Tensor], error: type[Exception], message: str
) -> None:
    model = Model(forward).eval()
    with pytest.raises(error, match=message):
        Explainer(model, layer)(torch.randn(2, 3, 8, 8))


def test_integer_output() -> None:
    model = Model(lambda m, x: m.layer(x).mean((2, 3)))
    model.layer.register_forward_hook(lambda module, inputs, output: output.long())
    with pytest.raises(TypeError, match=r"expected layer 'layer' to put out a floating point tensor; got torch.int64"):
        Explainer(model, "layer")(torch.randn(2, 3, 8, 8))


def test_an_output_changed_behind_the_copy() -> None:
    def forward(model: Model, x: Tensor) -> Tensor:
        y = model.layer(x)
        kept[0].mul_(2)
        return y.mean((2, 3))

    kept: list[Tensor] = []
    model = Model(forward)
    model.layer.register_forward_hook(lambda module, inputs, output: kept.append(output))
    with pytest.raises(RuntimeError, match="changed the output of layer 'layer' in place"):
        Explainer(model, "layer")(torch.randn(2, 3, 8, 8))


class TestReshape:
    def test_result_is_checked(self) -> None:
        model = Model(lambda m, x: m.layer(x).mean((2, 3)))
        images = torch.randn(2, 3, 8, 8)
        with pytest.raises(TypeError, match="reshape: expected the function to return a tensor; got tuple"):
            Explainer(model, "layer", reshape=lambda y: (y,))(images)
        with pytest.raises(ValueError, match=r"layer 'layer' after reshape to put out .*got shape \(2, 4\)"):
            Explainer(model, "layer", reshape=lambda y: y[:, :, 0, 0])(images)

    def test_layers_of_different_dimensions_are_not_fused(self) -> None:
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.Flatten(2), nn.Conv1d(4, 4, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten()
        )
        with pytest.raises(ValueError, match="layers with the same number of dimensions"):
            Explainer(model, ["0", "2"], size=None)(torch.randn(2, 3, 8, 8))


class TestWrappedModels:
    @pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile], ids=["DataParallel", "compiled"])
    def test_the_network_inside_is_explained(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        network = make(PooledConvolutions)
        images = network.images()
        expected = Explainer(network, "layer")(images).maps
        wrapped = wrap(network)
        prefix = next(iter(wrapped._modules))
        for layers in ("layer", f"{prefix}.layer", network.layer, None):
            explanation = Explainer(wrapped, layers)(images)
            assert explanation.layers == ("layer",)
            assert torch.equal(explanation.maps, expected)

    def test_compiled_in_place(self) -> None:
        network = make(PooledConvolutions)
        images = network.images()
        expected = Explainer(network, "layer")(images).maps
        network.compile(backend="eager")
        assert torch.equal(Explainer(network)(images).maps, expected)

    def test_copies_and_pickles(self) -> None:
        model = make(PooledConvolutions)
        images = model.images()
        explainer = Explainer(model, "layer")
        expected = explainer(images).maps
        for other in (copy.deepcopy(explainer), pickle.loads(pickle.dumps(explainer))):
            assert other.model is not model
            assert torch.equal(other(images).maps, expected)
