"""What `logit_difference` refuses, and what it says: the argument, what came, what was expected."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import diffcam_fast as dcf

LOGITS, CLASSES = torch.rand(3, 5), torch.tensor([0, 4, 2])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((LOGITS.numpy(), CLASSES), {}, TypeError, "logits: expected a torch.Tensor; got ndarray"),
        ((LOGITS, 3), {}, TypeError, "classes: expected a torch.Tensor; got int"),
        ((LOGITS.long(), CLASSES), {}, TypeError, "logits: expected dtype float32, .*got int64"),
        ((LOGITS, CLASSES.float()), {}, TypeError, "classes: expected dtype int64, .*got float32"),
        ((LOGITS, CLASSES > 1), {}, TypeError, "classes: expected dtype int64, .*got bool"),
        ((LOGITS[0], CLASSES), {}, ValueError, r"logits: expected shape \(N, K\); got \(5,\)"),
        ((LOGITS[:, :1], CLASSES * 0), {}, ValueError, r"logits: .*at least 2 classes; got \(3, 1\)"),
        ((LOGITS, CLASSES[:2]), {}, ValueError, r"classes: expected shape \(3,\) or \(3, T\) .*got \(2,\)"),
        ((LOGITS, CLASSES[None, :, None]), {}, ValueError, r"classes: expected shape .*got \(1, 3, 1\)"),
        ((LOGITS, CLASSES.to("meta")), {}, ValueError, "classes: expected the device .*cpu; got meta"),
        ((LOGITS, CLASSES + 1), {}, ValueError, "classes: expected indices from 0 to 4 .*got indices from 1 to 5"),
        ((LOGITS, CLASSES - 1), {}, ValueError, "classes: expected indices from 0 to 4 .*got indices from -1 to 3"),
        ((LOGITS, CLASSES), {"baseline": "median"}, ValueError, "baseline: expected one of max, .*got 'median'"),
        ((LOGITS, CLASSES), {"top_k": 5}, ValueError, "top_k: expected 1 to 4, .*got 5"),
        ((LOGITS, CLASSES), {"top_k": 0}, ValueError, "top_k: expected 1 to 4, .*got 0"),
        ((LOGITS, CLASSES), {"top_k": 2.0}, TypeError, "top_k: expected an integer; got float"),
        ((LOGITS, CLASSES), {"top_k": True}, TypeError, "top_k: expected an integer; got bool"),
        ((LOGITS, CLASSES), {"temperature": 0.0}, ValueError, r"temperature: expected a positive .*got 0\.0"),
        ((LOGITS, CLASSES), {"temperature": math.nan}, ValueError, "temperature: expected a finite .*got nan"),
        ((LOGITS, CLASSES), {"temperature": "hot"}, TypeError, "temperature: expected a number; got str"),
        ((LOGITS, CLASSES), {"alpha": 0.5}, ValueError, "alpha: only for baseline finer; got 0.5 with 'logsumexp'"),
        ((LOGITS, CLASSES), {"ranks": (1,)}, ValueError, r"ranks: only for baseline finer; got \(1,\)"),
    ],
)
def test_errors_name_the_argument(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        dcf.logit_difference(*arguments, **options)


@pytest.mark.parametrize("baseline", ["max", "mean", "finer"])
def test_temperature_is_refused_where_there_is_none(baseline: str) -> None:
    with pytest.raises(
        ValueError, match=f"temperature: only for baseline logsumexp and expected; got 2.0 with '{baseline}'"
    ):
        dcf.logit_difference(LOGITS, CLASSES, baseline=baseline, temperature=2.0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"top_k": 2}, ValueError, "top_k: expected None with baseline 'finer'.*got 2"),
        ({"alpha": math.inf}, ValueError, "alpha: expected a finite number; got inf"),
        ({"ranks": 2}, TypeError, "ranks: expected a sequence of integers; got int"),
        ({"ranks": "12"}, TypeError, "ranks: expected a sequence of integers; got str"),
        ({"ranks": (1.0,)}, TypeError, "ranks: expected an integer; got float"),
        ({"ranks": ()}, ValueError, r"ranks: expected at least one rank, each once; got \(\)"),
        ({"ranks": (2, 2)}, ValueError, r"ranks: expected at least one rank, each once; got \(2, 2\)"),
        ({"ranks": (0, 1)}, ValueError, r"ranks: expected ranks from 1 to 4, .*got \(0, 1\)"),
        ({"ranks": (1, 5)}, ValueError, r"ranks: expected ranks from 1 to 4, .*got \(1, 5\)"),
    ],
)
def test_errors_of_finer_name_the_argument(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dcf.logit_difference(LOGITS, CLASSES, baseline="finer", **options)
