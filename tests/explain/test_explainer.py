"""`Explainer` against maps worked out the long way, and everything it accepts and refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffcam_fast.explain import (
    DiffGradCAM,
    DiffGradCAMPlusPlus,
    Explainer,
    Finer,
    Logit,
    LogitDifference,
    LogProbability,
    Probability,
    Target,
    tokens_to_positions,
)
from diffcam_fast.reference.cam import METHODS
from tests.explain import oracle
from tests.explain.networks import (
    NETWORKS,
    Branches,
    InPlaceAfter,
    PooledConvolutions,
    Residual,
    Signal,
    Tapped,
    Tokens,
    Volume,
    make,
)
from tests.tolerances import PEER_SHARE_OF_RANGE

# float64, where only the networks round, in another order than batches do; some of their maps are cancelled sums
EXACT = 1e-9
# float32 networks against the same network in float64: the network itself rounds, as it does between libraries
SINGLE = PEER_SHARE_OF_RANGE


def _explainer(network: Tapped, layers: Any = None, **options: Any) -> Explainer:
    reshape = tokens_to_positions() if isinstance(network, Tokens) else None
    return Explainer(network, network.layers[-1] if layers is None else layers, reshape=reshape, **options)


def _largest_difference(maps: Tensor, expected: Tensor) -> float:
    assert maps.shape == expected.shape
    return (maps.double() - expected).abs().max().item()


@pytest.mark.parametrize("kind", NETWORKS)
class TestAgainstTheLongWay:
    @pytest.mark.parametrize("method", METHODS)
    def test_every_method(self, kind: type[Tapped], method: str) -> None:
        network = make(kind)
        images = network.images()
        for layer in network.layers:
            explanation = _explainer(network, layer, method=method)(images)
            expected = oracle.maps(network, images, explanation.classes, (layer,), method)
            assert expected.amax() > 0.5
            assert _largest_difference(explanation.maps, expected) <= EXACT

    def test_several_classes(self, kind: type[Tapped]) -> None:
        network = make(kind)
        images, classes = network.images(3), torch.tensor([[0, 1, 2], [4, 4, 3], [2, 0, 1]])
        explanation = _explainer(network, method="layercam")(images, classes)
        expected = oracle.maps(network, images, classes, network.layers[-1:], "layercam")
        assert _largest_difference(explanation.maps, expected) <= EXACT

    def test_all_layers_in_one_pass(self, kind: type[Tapped]) -> None:
        network = make(kind)
        images, classes = network.images(), torch.tensor([[0, 3], [1, 2]])
        explanation = _explainer(network, network.layers)(images, classes)
        expected = oracle.maps(network, images, classes, network.layers)
        assert explanation.layers == network.layers
        assert _largest_difference(explanation.maps, expected) <= EXACT

    def test_float32(self, kind: type[Tapped]) -> None:
        network = make(kind, torch.float32)
        images = network.images(dtype=torch.float32)
        explanation = _explainer(network)(images)
        expected = oracle.maps(network, images, explanation.classes, network.layers[-1:])
        assert explanation.maps.dtype == torch.float32
        assert _largest_difference(explanation.maps, expected) <= SINGLE

    def test_targets_one_at_a_time(self, kind: type[Tapped]) -> None:
        network = make(kind)
        images, classes = network.images(), torch.tensor([[0, 3, 1], [1, 2, 2]])
        together = _explainer(network)(images, classes).maps
        for chunk_size in (1, 2, 7):
            chunked = _explainer(network, chunk_size=chunk_size)(images, classes).maps
            assert _largest_difference(chunked, together) <= EXACT

    def test_no_images(self, kind: type[Tapped]) -> None:
        network = make(kind)
        for classes, targets in ((None, 1), (torch.zeros(0, 3, dtype=torch.int64), 3)):
            explanation = _explainer(network)(network.images(0), classes)
            assert explanation.maps.shape == (0, targets, *network.image_shape[1:])
            assert explanation.delta.shape == (0, targets)


@pytest.mark.parametrize("name", oracle.SCORES)
@pytest.mark.parametrize("kind", [PooledConvolutions, InPlaceAfter])
def test_targets_against_the_long_way(kind: type[Tapped], name: str) -> None:
    targets = {
        "logit": Logit(),
        "probability": Probability(),
        "log probability": LogProbability(),
        "logsumexp": LogitDifference(),
        "mean": LogitDifference("mean"),
        "max": LogitDifference("max"),
    }
    network, score = make(kind), oracle.SCORES[name]
    images, classes = network.images(), torch.tensor([[0, 3], [1, 2]])
    explanation = _explainer(network, target=targets[name])(images, classes)
    expected = oracle.maps(network, images, classes, network.layers[-1:], score=score)
    assert _largest_difference(explanation.maps, expected) <= EXACT
    values = [[score(z, c) for c in row] for z, row in zip(explanation.logits, classes.tolist(), strict=True)]
    torch.testing.assert_close(explanation.delta, torch.tensor(values, dtype=torch.float64))


class TestGaugeInvariance:
    class Shifted(nn.Module):
        """The network with a function of the input added to all its logits."""

        def __init__(self, network: Tapped) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor) -> Tensor:
            logits = self.network(x)
            kept: Tensor = self.network.kept
            return logits + 50 * kept[:, :2].sin().sum((1, 2, 3), keepdim=True)[:, :, 0, 0]

    @pytest.fixture
    def networks(self) -> tuple[Tapped, nn.Module]:
        network = make(InPlaceAfter)

        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            network.kept = inputs[0]  # what the layer handed on: the shift depends on the explained layer

        network.head.register_forward_hook(keep)
        return network, self.Shifted(network)

    @pytest.mark.parametrize(
        "target",
        [
            LogitDifference(),
            LogitDifference("expected"),
            LogitDifference("mean"),
            LogitDifference("max"),
            LogitDifference("expected", top_k=2, temperature=0.5),
            LogitDifference(top_k=3, pairwise=True),
            Finer(),
            Probability(),
            LogProbability(),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("method", METHODS)
    def test_differences_do_not_move(self, networks: tuple[Tapped, nn.Module], target: Target, method: str) -> None:
        plain, shifted = networks
        images = plain.images()
        options = {"method": method, "target": target, "size": None}
        before = Explainer(plain, "layer", **options)(images, [[0, 1]] * 2)
        after = Explainer(shifted, "network.layer", **options)(images, [[0, 1]] * 2)
        assert (before.logits - after.logits).abs().max() > 1
        assert _largest_difference(after.maps, before.maps) <= EXACT

    def test_a_single_logit_moves(self, networks: tuple[Tapped, nn.Module]) -> None:
        plain, shifted = networks
        images = plain.images()
        before = Explainer(plain, "layer", target=Logit())(images, 0)
        after = Explainer(shifted, "network.layer", target=Logit())(images, 0)
        assert _largest_difference(after.maps, before.maps) > 0.1


def test_probability_and_difference_give_the_same_normalised_maps() -> None:
    network = make(Residual)
    images = network.images()

    def share_of_maximum(target: Target) -> Tensor:
        # without the constant 1e-7 of the normalisation, which weighs differently on maps of different scales
        maps = Explainer(network, "layer", target=target, normalize=None)(images, [[0, 1], [2, 3]]).maps
        return maps / maps.amax((2, 3), keepdim=True)

    expected = share_of_maximum(LogitDifference())
    for target in (Probability(), LogProbability()):
        assert _largest_difference(share_of_maximum(target), expected) <= EXACT
    assert _largest_difference(share_of_maximum(Logit()), expected) > 0.01


def test_the_difference_survives_a_saturated_softmax() -> None:
    network = make(PooledConvolutions, torch.float32)
    images = network.images(dtype=torch.float32)
    expected = Explainer(network, "layer")(images)
    with torch.no_grad():
        network.head.weight.mul_(2000)
        network.head.bias.mul_(2000)
    saturated = Explainer(network, "layer")(images)
    assert saturated.logits.softmax(1).amax(1).eq(1).all()
    assert saturated.maps.amax((2, 3)).gt(0.99).all()
    assert torch.equal(saturated.classes, expected.classes)
    vanished = Explainer(network, "layer", target=LogProbability())(images)
    assert vanished.maps.amax() < 1e-3


class TestResult:
    def test_fields(self) -> None:
        network = make(Branches, torch.float32)
        images = network.images(3, torch.float32)
        explanation = Explainer(network, ["right", network.left], target=LogitDifference(top_k=2))(images, [[0, 1]] * 3)
        assert explanation.layers == ("right", "left")
        assert {name: maps.shape for name, maps in explanation.layer_maps.items()} == {
            "right": (3, 2, 4, 3),
            "left": (3, 2, 8, 6),
        }
        assert explanation.maps.shape == (3, 2, 12, 10)
        assert explanation.maps.dtype == explanation.delta.dtype == torch.float32
        assert torch.equal(explanation.logits, network(images))
        assert explanation.classes.tolist() == [[0, 1]] * 3
        assert explanation.rivals.shape == (3, 2, 2)
        for tensor in (explanation.maps, explanation.logits, explanation.delta):
            assert not tensor.requires_grad

    def test_pairwise(self) -> None:
        network = make(InPlaceAfter)
        images, classes = network.images(), torch.tensor([[0, 3], [1, 2]])
        target = LogitDifference(top_k=3, pairwise=True)
        explanation = Explainer(network, "layer", target=target)(images, classes)
        assert explanation.maps.shape == (2, 6, 12, 10)
        assert explanation.classes.shape == (2, 2)
        assert explanation.rivals.shape == (2, 2, 3)
        for image in range(2):
            for index in range(6):
                chosen = classes[image, index // 3]
                rival = explanation.rivals[image, index // 3, index % 3]
                z = explanation.logits[image]
                torch.testing.assert_close(explanation.delta[image, index], z[chosen] - z[rival])
                expected = oracle.maps(
                    network,
                    images[image : image + 1],
                    chosen.reshape(1, 1),
                    ("layer",),
                    score=lambda z, c, rival=rival: z[c] - z[rival],
                )
                assert _largest_difference(explanation.maps[image, index], expected[0, 0]) <= EXACT

    def test_finer_shows_its_rivals(self) -> None:
        network = make(InPlaceAfter)
        explanation = Explainer(network, "layer", target=Finer(ranks=(1, 3)))(network.images(), 0)
        assert explanation.rivals.shape == (2, 1, 2)

    def test_other_targets_have_no_rivals(self) -> None:
        network = make(InPlaceAfter)
        assert Explainer(network, "layer", target=Logit())(network.images()).rivals is None
        assert Explainer(network, "layer")(network.images()).rivals is None

    def test_options_reach_the_map(self) -> None:
        network = make(InPlaceAfter)
        images = network.images()
        raw = Explainer(network, "layer", normalize=None, relu=False, size=None)(images).maps
        assert raw.amin() < 0
        positive = Explainer(network, "layer", normalize=None, size=None)(images).maps
        assert torch.equal(positive, raw.relu())
        scaled = Explainer(network, "layer", normalize="max", size=None)(images).maps
        torch.testing.assert_close(scaled, positive / (positive.amax((2, 3), keepdim=True) + 1e-7))

    @pytest.mark.parametrize(
        ("size", "expected"), [("input", (12, 10)), (None, (8, 6)), ((5, 7), (5, 7)), ([20, 1], (20, 1))]
    )
    def test_size(self, size: Any, expected: tuple[int, ...]) -> None:
        network = make(Branches)
        explanation = Explainer(network, ["right", "left"], size=size)(network.images())
        assert explanation.maps.shape == (2, 1, *expected)

    @pytest.mark.parametrize("kind", [Signal, Volume])
    def test_other_dimensions(self, kind: type[Tapped]) -> None:
        network = make(kind)
        assert _explainer(network)(network.images()).maps.shape == (2, 1, *network.image_shape[1:])


class TestPresets:
    @pytest.mark.parametrize(("preset", "method"), [(DiffGradCAM, "gradcam"), (DiffGradCAMPlusPlus, "gradcam++")])
    def test_are_explainers(self, preset: Callable[..., Explainer], method: str) -> None:
        network = make(InPlaceAfter)
        images = network.images()
        options = {"baseline": "expected", "top_k": 3, "temperature": 2.0, "pairwise": False}
        expected = Explainer(network, "layer", method, LogitDifference(**options), size=None)(images)
        explanation = preset(network, "layer", size=None, **options)(images)
        assert torch.equal(explanation.maps, expected.maps)

    def test_keep_their_method_and_target(self) -> None:
        for fixed in ({"method": "layercam"}, {"target": Logit()}):
            with pytest.raises(TypeError, match="DiffGradCAM fixes it; use Explainer"):
                DiffGradCAM(make(InPlaceAfter), "layer", **fixed)


class TestTargetFunctions:
    def test_closed_forms_agree_with_functions(self) -> None:
        network = make(Residual)
        images, classes = network.images(), torch.tensor([[0, 3], [1, 2]])
        pairs: list[tuple[Any, Target]] = [
            (lambda z, c: z.gather(1, c), Logit()),
            (lambda z, c: z.softmax(1).gather(1, c), Probability()),
            (lambda z, c: z.log_softmax(1).gather(1, c), LogProbability()),
            (
                lambda z, c: torch.stack(
                    [
                        torch.stack([oracle.SCORES["logsumexp"](row, i) for i in chosen])
                        for row, chosen in zip(z, c.tolist(), strict=True)
                    ]
                ),
                LogitDifference(),
            ),
        ]
        for function, target in pairs:
            by_function = Explainer(network, "layer", target=function)(images, classes)
            closed = Explainer(network, "layer", target=target)(images, classes)
            assert _largest_difference(by_function.maps, closed.maps) <= EXACT
            torch.testing.assert_close(by_function.delta, closed.delta)
            assert by_function.rivals is None

    def test_are_called_without_autocast_on_float32(self) -> None:
        network = make(PooledConvolutions, torch.bfloat16)
        seen = []

        def target(logits: Tensor, classes: Tensor) -> Tensor:
            seen.append((logits.dtype, (logits @ logits.T).dtype))
            return logits.gather(1, classes)

        with torch.autocast("cpu", torch.bfloat16):
            Explainer(network, "layer", target=target)(network.images(dtype=torch.bfloat16))
        assert seen == [(torch.float32, torch.float32)]

    @pytest.mark.parametrize(
        ("function", "error", "message"),
        [
            (lambda z, c: 1.0, TypeError, "target: expected the function to return a tensor; got float"),
            (lambda z, c: z[:, 0], ValueError, r"scores of shape \(N, T\) = \(2, 1\).*got \(2,\)"),
            (lambda z, c: z.detach().gather(1, c), ValueError, "target: expected scores that depend on the logits"),
            (lambda z, c: torch.ones(2, 1, requires_grad=True) * 2, ValueError, "depend on the logits"),
        ],
    )
    def test_errors(self, function: Any, error: type[Exception], message: str) -> None:
        network = make(InPlaceAfter)
        with pytest.raises(error, match=message):
            Explainer(network, "layer", target=function)(network.images())
