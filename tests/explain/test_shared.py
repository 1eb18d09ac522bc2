"""Cotangents by what they share, against the same cotangents written down."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffcam_fast.explain import LogitDifference
from diffcam_fast.explain.targets import Logit, Target
from tests.tolerances import LOGIT_DIFFERENCE

CLASSES = 12
TARGETS: list[Target] = [
    Logit(),
    LogitDifference(),
    LogitDifference(temperature=3.0),
    LogitDifference("expected"),
    LogitDifference("expected", temperature=0.5),
    LogitDifference("mean"),
    LogitDifference("max"),
    *(LogitDifference(baseline, top_k=k) for baseline in ("logsumexp", "expected", "mean", "max") for k in (1, 3, 11)),
    *(LogitDifference(top_k=k, pairwise=True) for k in (1, 3, 11)),
]


def _logits(kind: str) -> Tensor:
    logits = 3 * torch.randn(4, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if kind == "ties":
        return logits.round()
    if kind == "saturated":
        return logits + 40 * torch.nn.functional.one_hot(torch.tensor([0, 3, 3, 11]), CLASSES)
    return logits + (5000 if kind == "shifted" else 0)


@pytest.mark.parametrize("kind", ["usual", "ties", "saturated", "shifted"])
@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_agree_with_the_ones_written_down(target: Target, kind: str, dtype: torch.dtype) -> None:
    logits = _logits(kind)
    classes = torch.cat([torch.arange(CLASSES).expand(4, -1), torch.randint(CLASSES, (4, 5))], 1)
    expected = target.scores(logits.to(dtype).double(), classes)
    found = target.shared_scores(logits.to(dtype), classes)
    assert found is not None
    tolerance = LOGIT_DIFFERENCE[dtype] * (10 if kind == "usual" or dtype == torch.float64 else 1000)
    torch.testing.assert_close(found.delta.double(), expected.delta, rtol=tolerance, atol=tolerance)
    product = found.cotangent.times(torch.eye(CLASSES, dtype=dtype))
    torch.testing.assert_close(product.double(), expected.cotangent, rtol=tolerance, atol=tolerance)
    part = found.cotangent.targets(slice(2, 7)).times(torch.eye(CLASSES, dtype=dtype))
    if target.targets_per_class == 1:
        torch.testing.assert_close(part, product[:, 2:7])
    assert (found.rivals is None) == (expected.rivals is None)
    if expected.rivals is not None:
        assert torch.equal(found.rivals, expected.rivals)


def test_more_rivals_than_there_are() -> None:
    assert LogitDifference(top_k=CLASSES).shared_scores(_logits("usual"), torch.zeros(4, 1, dtype=torch.int64)) is None
