"""What is timed beside plain inference: the same maps by everybody, and yardsticks that are what they say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from diffcam_fast.benchmark import end_to_end, explanations, peers
from diffcam_fast.benchmark.explanations import Work, error_of_maps, images, twin
from diffcam_fast.benchmark.measure import QUICK, Candidate, Effort, Timing, WrongResult, check
from diffcam_fast.explain import Explainer, tokens_to_positions

# Some of the peers import torchvision, which beside a CPU build of PyTorch takes a helper.
pytest.importorskip("tests.helpers.torchvision_cpu")


# One round: what is a median over rounds can be told from the times.
ONE_ROUND = Effort(minimum_rounds=1, maximum_rounds=1)


class Tokens(nn.Module):
    """Patches as tokens with one before them, as vision transformers have."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 6, 4, stride=4)
        self.first = nn.Parameter(torch.randn(1, 1, 6))
        self.norm = nn.LayerNorm(6)
        self.mix = nn.MultiheadAttention(6, 1, batch_first=True)
        self.head = nn.Linear(6, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = self.norm(torch.cat([self.first.expand(len(x), -1, -1), x], 1))
        return self.head((x + self.mix(x, x, x, need_weights=False)[0])[:, 0])


@pytest.fixture
def network() -> nn.Module:
    """Two convolutions with a ReLU that works in place behind each, and a pooled head."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, 3, stride=2),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 7),
    )
    model[6].weight.data.mul_(100)  # the libraries' epsilons are lost beside such gradients
    return model.eval()


def _work(network: nn.Module, layer: str = "3", count: int = 1) -> Work:
    batch = images(2, (24, 20))
    return Work(network, batch, explanations.classes_with_evidence(network, batch, layer, count=count), (layer,))


@pytest.mark.parametrize("name", peers.PEERS)
@pytest.mark.parametrize("at_input_size", [True, False])
@pytest.mark.parametrize(("layers", "count"), [(("3",), 1), (("3",), 3), (("1", "3"), 1)])
def test_everybody_makes_the_same_maps(
    network: nn.Module, name: str, layers: tuple[str, ...], count: int, at_input_size: bool
) -> None:
    if peers.absent_because(name) is not None:
        pytest.skip(f"{name}: {peers.absent_because(name)}")
    work = replace(_work(network, count=count), layers=layers, at_input_size=at_input_size)
    if not peers.PEERS[name].can(work):
        pytest.skip(f"{name} does not make these maps")

    errors = check({"ours": explanations.ours(work), name: peers.candidate(name, work)}, "maps")

    assert max(errors.values()) < 1e-5
    assert not network._modules["3"]._forward_hooks
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("name", ["plain", "torchcam", "pytorch_grad_cam"])
def test_everybody_makes_the_same_maps_of_tokens(name: str) -> None:
    if peers.absent_because(name) is not None:
        pytest.skip(f"{name}: {peers.absent_because(name)}")
    torch.manual_seed(0)
    network, batch, reshape = Tokens().eval(), images(2, (16, 16)), tokens_to_positions()
    classes = explanations.classes_with_evidence(network, batch, "norm", reshape)
    work = Work(network, batch, classes, ("norm",), reshape)
    assert peers.PEERS["captum"].can(work) is False
    check({"ours": explanations.ours(work), name: peers.candidate(name, work)}, "maps of tokens")


def test_wrong_maps_of_ours_are_refused(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    work = _work(network)

    class Other(Explainer):
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **{**options, "method": "layercam"})

    monkeypatch.setattr(explanations, "Explainer", Other)
    floor = end_to_end.Floor(explanations.bare_pull_back(work))
    with pytest.raises(WrongResult, match=r"example: ours: error .* not timed"):
        end_to_end.row(work, floor, {}, what="example", effort=QUICK)


def test_wrong_maps_of_a_peer_are_refused(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    work = _work(network)

    def wrong(work: Work, library: object) -> peers.Run:
        return lambda copy: [0.999 * maps for maps in explanations.Plain(work).run(copy)]

    monkeypatch.setitem(peers.PEERS, "plain", replace(peers.PEERS["plain"], set_up=wrong))
    floor = end_to_end.Floor(explanations.bare_pull_back(work))
    others = {"plain": peers.candidate("plain", work)}
    with pytest.raises(WrongResult, match=r"example: plain: error 0\.00"):
        end_to_end.row(work, floor, others, what="example", effort=QUICK)


@pytest.mark.parametrize(("channels_last", "vs_faster"), [(1.5, 1.2), (0.5, 2.4)])
def test_ours_beside_inference_in_the_faster_order(
    channels_last: float, vs_faster: float, network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {"inference": 1.0, "channels_last": channels_last, "ours": 1.2, "floor": 0.1}

    def compare(candidates: dict[str, Candidate], **options: object) -> tuple[dict[str, Timing], dict[str, float]]:
        return {name: Timing.of([seconds[name]] * 3) for name in candidates}, dict.fromkeys(candidates, 0.0)

    monkeypatch.setattr(end_to_end, "compare", compare)
    work = _work(network)
    floor = end_to_end.Floor(explanations.bare_pull_back(work))
    found = end_to_end.row(work, floor, {}, what="example", effort=QUICK)
    assert found["channels_last"] == pytest.approx(channels_last)
    assert found["multiple"] == pytest.approx(1.2)
    assert found["vs_faster"] == pytest.approx(vs_faster)


@pytest.mark.parametrize("channels_last", [False, True])
def test_inference_in_either_order(channels_last: bool, network: nn.Module) -> None:
    seen: list[bool] = []
    network.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    candidate = explanations.inference(_work(network), channels_last=channels_last)
    seen.clear()
    check({"inference": candidate}, "example")
    assert seen == [channels_last]


def test_wrong_logits_are_refused(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = explanations.inference(_work(network))
    network[6].bias.data.add_(0.1)
    with pytest.raises(WrongResult, match="inference"):
        check({"inference": alone}, "example")


def test_other_shapes_and_empty_maps_do_not_pass_for_right() -> None:
    maps = torch.rand(2, 1, 4, 4)
    maps[:, :, 0, 0] = 1
    assert error_of_maps([maps], [maps]) == 0
    assert error_of_maps([maps[:1]], [maps]) == float("inf")
    assert not error_of_maps([maps * float("nan")], [maps]) <= 1
    maps[1] = 0
    with pytest.raises(ValueError, match="no map that is not empty"):
        error_of_maps([maps], [maps])


def test_classes_without_evidence_are_not_chosen(network: nn.Module) -> None:
    head = network[6]
    with torch.no_grad():
        head.weight[:3] = -head.weight[:3].abs()  # activations are positive: the map is negative everywhere
        head.bias[:3] = 100  # and yet these are the likeliest
    classes = _work(network, count=2).classes
    assert (classes >= 3).all()
    with torch.no_grad():
        head.weight.copy_(-head.weight.abs())
    with pytest.raises(ValueError, match="no evidence"):
        _work(network)


def test_a_twin_has_the_memory_and_nothing_else(network: nn.Module) -> None:
    frozen = twin(network, frozen=True)
    for mine, theirs in zip(network.parameters(), frozen.parameters(), strict=True):
        assert mine.data_ptr() == theirs.data_ptr()
        assert mine.requires_grad and not theirs.requires_grad
    frozen.register_forward_hook(lambda module, inputs, output: 0 * output)
    assert network(images(1, (24, 20))).abs().sum() > 0


class TestYardsticks:
    def test_pull_back(self, network: nn.Module) -> None:
        work = _work(network, "1", count=2)
        activations = network[:2](work.images).detach().requires_grad_()
        logits = network[2:](activations.clone())
        found = explanations.bare_pull_back(work).run(0)
        for (gradient,), classes in zip(found, work.classes.unbind(1), strict=True):
            score = logits.gather(1, classes[:, None]).sum()
            torch.testing.assert_close(gradient, torch.autograd.grad(score, activations, retain_graph=True)[0])

    def test_input_gradient(self, network: nn.Module) -> None:
        work = _work(network)
        batch = work.images.clone().requires_grad_()
        network(batch).gather(1, work.classes).sum().backward()
        (found,) = explanations.bare_input_gradient(work).run(0)
        torch.testing.assert_close(found, batch.grad)

    def test_product(self, network: nn.Module) -> None:
        found = explanations.bare_product(_work(network), network[6]).run(0)
        expected = network(images(2, (24, 20))) - network[6].bias
        torch.testing.assert_close(found.mean(2), expected)


class TestReport:
    def test_rows_and_columns(self, network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(end_to_end, "QUICK", ONE_ROUND)
        found = end_to_end.run(network, [images(2, (24, 20))], "3", device=torch.device("cpu"), quick=True)
        (row,) = found.rows
        assert row["multiple"] == pytest.approx(row["ours_ms"] / row["inference_ms"])
        assert row["floor"] == pytest.approx(1 + row["bare_ms"] / row["inference_ms"])
        assert row["vs_floor"] == pytest.approx(row["multiple"] / row["floor"])
        assert row["vs_plain"] == pytest.approx(row["multiple"] / row["plain"])
        beyond = row["ours_ms"] - row["inference_ms"] - row["bare_ms"]
        assert row["beyond_floor_us"] == pytest.approx(1e3 * beyond, abs=1e-6)
        assert row["multiple_p20"] <= row["multiple_p80"]

    def test_who_is_absent_is_left_out_and_named(self, network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(peers.PEERS, "captum", replace(peers.PEERS["captum"], package="no_such_package"))
        with pytest.raises(ImportError, match="captum cannot be compared with: ModuleNotFoundError"):
            peers.candidate("captum", _work(network))
        found = end_to_end.run(network, [images(1, (24, 20))], "3", device=torch.device("cpu"), quick=True)
        assert "captum" not in found.rows[0]
        assert "captum" not in [column.heading for column in found.tables[0].columns]
        assert "captum (ModuleNotFoundError: No module named 'no_such_package')" in found.introduction


def test_a_floor_may_contain_the_inference(network: nn.Module) -> None:
    work = _work(network)
    floor = end_to_end.Floor(explanations.bare_input_gradient(work), contains_inference=True)
    row = end_to_end.row(work, floor, {}, what="example", effort=ONE_ROUND)
    assert row["floor"] == pytest.approx(row["bare_ms"] / row["inference_ms"])


def test_candidates_of_a_row_are_checked_by_their_own_tolerance() -> None:
    assert check({"one": Candidate(lambda copy: 0.5, lambda found: found, 1.0)}, "example") == {"one": 0.5}
