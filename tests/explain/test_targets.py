"""Targets by themselves: closed forms against autograd, and parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diffcam_fast.explain import Finer, Logit, LogitDifference, LogProbability, Probability, Scores, Target
from diffcam_fast.explain.targets import score

LOGITS = torch.tensor([[1.0, -2.0, 0.5, 3.0, 2.5, 2.9], [0.0, 0.1, -4.0, 0.2, 0.3, 0.25]], dtype=torch.float64)
CLASSES = torch.tensor([[3, 0, 3], [2, 5, 1]])


def _gradients(function: Any) -> tuple[Tensor, Tensor]:
    z = LOGITS.clone().requires_grad_()
    scores = function(z)
    rows = [torch.autograd.grad(scores[:, t].sum(), z, retain_graph=True)[0] for t in range(scores.shape[1])]
    return scores.detach(), torch.stack(rows, 1)


@pytest.mark.parametrize(
    ("target", "function"),
    [
        (Logit(), lambda z: z.gather(1, CLASSES)),
        (Probability(), lambda z: z.softmax(1).gather(1, CLASSES)),
        (LogProbability(), lambda z: z.log_softmax(1).gather(1, CLASSES)),
        (LogitDifference(), lambda z: (p := z.log_softmax(1).gather(1, CLASSES)) - torch.log(-torch.expm1(p))),
    ],
    ids=["logit", "probability", "log probability", "difference"],
)
def test_closed_forms(target: Target, function: Any) -> None:
    delta, cotangent = _gradients(function)
    found = score(target, LOGITS, CLASSES)
    torch.testing.assert_close(found.delta, delta)
    torch.testing.assert_close(found.cotangent, cotangent)
    by_function = score(lambda z, c: function(z), LOGITS, CLASSES)
    torch.testing.assert_close(by_function, Scores(delta, cotangent))


def test_pairwise_is_one_target_per_rival() -> None:
    found = score(LogitDifference(top_k=2, pairwise=True), LOGITS, CLASSES)
    assert found.rivals.tolist() == [[[5, 4], [3, 5], [5, 4]], [[4, 5], [4, 3], [4, 5]]]
    assert found.delta.shape == (2, 6)
    for image in range(2):
        for index in range(6):
            chosen, rival = CLASSES[image, index // 2], found.rivals[image, index // 2, index % 2]
            expected = torch.zeros(6, dtype=torch.float64)
            expected[chosen], expected[rival] = 1, -1
            assert torch.equal(found.cotangent[image, index], expected)
            assert torch.equal(found.delta[image, index], LOGITS[image, chosen] - LOGITS[image, rival])


@pytest.mark.parametrize("baseline", ["logsumexp", "expected", "mean", "max"])
def test_pairwise_agrees_with_folding_one_rival(baseline: str) -> None:
    pair = score(LogitDifference(baseline, top_k=1, pairwise=True), LOGITS, CLASSES)
    folded = score(LogitDifference(baseline, top_k=1), LOGITS, CLASSES)
    torch.testing.assert_close(pair, folded)


@pytest.mark.parametrize("target", [Probability(), LogProbability(), LogitDifference(), Finer()], ids=str)
def test_cotangents_sum_to_zero_at_large_logits(target: Target) -> None:
    logits = LOGITS.float() + 5000
    found = score(target, logits, CLASSES)
    assert found.cotangent.sum(2).abs().max() <= 1e-6 * found.cotangent.abs().max()


def test_certainty_keeps_its_digits() -> None:
    logits = torch.tensor([[40.0, 0.0, 1.0]])
    found = score(LogProbability(), logits, torch.tensor([[0]]))
    expected = score(LogProbability(), logits.double(), torch.tensor([[0]]))
    assert found.cotangent[0, 0, 0] > 0
    torch.testing.assert_close(found.cotangent.double(), expected.cotangent, rtol=1e-5, atol=0)


def test_a_target_of_ones_own() -> None:
    class Squared(Target):
        def scores(self, logits: Tensor, classes: Tensor) -> Scores:
            chosen = logits.gather(1, classes)
            one_hot = torch.zeros(*classes.shape, logits.shape[1], dtype=logits.dtype)
            return Scores(chosen**2, one_hot.scatter(2, classes[..., None], 2 * chosen[..., None]))

    delta, cotangent = _gradients(lambda z: z.gather(1, CLASSES) ** 2)
    torch.testing.assert_close(score(Squared(), LOGITS, CLASSES), Scores(delta, cotangent))


def test_a_target_of_the_wrong_shape() -> None:
    class Flat(Target):
        def scores(self, logits: Tensor, classes: Tensor) -> Scores:
            return Scores(logits.gather(1, classes), logits)

    with pytest.raises(ValueError, match=r"target: expected delta \(N, T\) and cotangent \(N, T, 6\)"):
        score(Flat(), LOGITS, CLASSES)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LogitDifference("median"), ValueError, "baseline: expected one of .*; got 'median'"),
        (lambda: LogitDifference("finer"), ValueError, r"baseline: 'finer' .*use the target Finer"),
        (lambda: LogitDifference(temperature=0), ValueError, "temperature: expected a positive number; got 0"),
        (lambda: LogitDifference(temperature="hot"), TypeError, "temperature: expected a number; got str"),
        (lambda: LogitDifference(temperature=float("inf")), ValueError, "temperature: expected a finite number"),
        (lambda: LogitDifference("mean", temperature=2), ValueError, "temperature: only for baseline logsumexp and"),
        (lambda: LogitDifference(top_k=0), ValueError, "top_k: expected at least 1; got 0"),
        (lambda: LogitDifference(top_k=1.5), TypeError, "top_k: expected an integer; got float"),
        (lambda: LogitDifference(top_k=True), TypeError, "top_k: expected an integer; got bool"),
        (lambda: LogitDifference(pairwise=True), ValueError, "pairwise: expected top_k with it"),
        (lambda: LogitDifference(top_k=2, pairwise=1), TypeError, "pairwise: expected a bool; got int"),
        (lambda: Finer(alpha=float("nan")), ValueError, "alpha: expected a finite number"),
        (lambda: Finer(alpha=None), TypeError, "alpha: expected a number; got NoneType"),
        (lambda: Finer(ranks=()), ValueError, "ranks: expected at least one rank"),
        (lambda: Finer(ranks=(1, 1)), ValueError, "each once"),
        (lambda: Finer(ranks=(0, 1)), ValueError, "from 1"),
        (lambda: Finer(ranks=3), TypeError, "ranks: expected a tuple of integers; got int"),
        (lambda: Finer(ranks=(1.0,)), TypeError, "ranks: expected an integer; got float"),
    ],
)
def test_parameters_are_checked_at_construction(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_parameters_that_do_not_fit_the_model() -> None:
    with pytest.raises(ValueError, match="top_k: expected 1 to 5"):
        score(LogitDifference(top_k=6), LOGITS, CLASSES)
    with pytest.raises(ValueError, match="ranks: expected ranks from 1 to 5"):
        score(Finer(ranks=(6,)), LOGITS, CLASSES)


def test_targets_compare_and_hash() -> None:
    assert LogitDifference("max") == LogitDifference("max") != LogitDifference()
    assert len({Finer(), Finer(ranks=[1, 2, 3]), Finer(alpha=0.5)}) == 2
