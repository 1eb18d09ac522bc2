"""`logit_difference` in Triton's interpreter against the float64 reference."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from diffcam_fast.backends.triton.logit_difference import logit_difference
from diffcam_fast.reference.logit_difference import BASELINES
from diffcam_fast.reference.logit_difference import logit_difference as reference
from tests.ops.test_logit_difference import (
    LAYOUTS,
    _canonical,
    _classes,
    _name,
    _options,
    _random,
    _tolerance,
    problems,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

FIELDS = ("delta", "cotangent", "rivals", "differences")


def _assert_agree(logits: Tensor, classes: Tensor, option: dict[str, Any], units: float = 1.0) -> None:
    found = logit_difference(logits, classes, *_canonical(**option))
    expected = reference(logits.double(), classes, *_canonical(**option))
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    for name, got, want in zip(FIELDS, found, expected, strict=True):
        assert got.shape == want.shape and got.is_contiguous(), name
        if name == "rivals":
            assert torch.equal(got, want)
            continue
        assert got.dtype == dtype
        allowed = units * _tolerance(logits, **option)
        torch.testing.assert_close(
            got.double(), want, atol=allowed, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


@settings(max_examples=40)
@given(problem=problems())
def test_agrees_with_float64_reference(problem: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(problem["seed"])
    images, count = problem["shape"]
    # Exact in every dtype, and rich in ties.
    step = 4 if problem["shift"] == 0 else 2
    exact = torch.randint(-60, 61, (images, count), generator=generator) / 4.0
    exact = (exact * step).round() / step + problem["shift"]
    logits = LAYOUTS[problem["layout"]](exact.to(problem["dtype"]))
    classes = torch.randint(0, count, (images, problem["targets"]), generator=generator)
    _assert_agree(logits, classes, problem["option"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_thousand_classes(dtype: torch.dtype) -> None:
    logits = _random(1, 1000, dtype=dtype)
    classes = torch.stack([logits.argmax(-1), logits.argmin(-1)], 1)
    for name in BASELINES[:-1]:
        for top_k in (None, 5, 500):
            _assert_agree(logits, classes, {"baseline": name, "top_k": top_k}, units=2)
    for ranks in ((1, 2, 3), (15, 2), (400,)):
        _assert_agree(logits, classes, {"baseline": "finer", "ranks": ranks, "alpha": 0.6}, units=2)


@pytest.mark.parametrize(("count", "dtype"), [(9001, torch.float32), (5000, torch.float64)])
@pytest.mark.parametrize(
    "option",
    [
        {"baseline": "expected"},
        {"baseline": "mean", "top_k": 4000},
        {"baseline": "logsumexp", "top_k": 3},
        {"baseline": "finer", "ranks": (3, 1)},
    ],
    ids=_name,
)
def test_rows_of_several_blocks(count: int, dtype: torch.dtype, option: dict[str, Any]) -> None:
    logits = _random(1, count, dtype=dtype)
    _assert_agree(logits, _classes(1, 1, count=count), option, units=2)


def test_ties_go_to_the_lower_index_and_a_class_is_never_its_own_rival() -> None:
    logits = torch.tensor([[2.0, 5.0, 2.0, 5.0, 5.0, 2.0, *[-9.0] * 20]])
    classes = torch.tensor([[3, 0, 5]])
    for top_k in (5, 20):
        rivals = logit_difference(logits, classes, "max", top_k, 1.0, 1.0, [])[2]
        assert rivals[..., :5].tolist() == [[[1, 4, 0, 2, 5], [1, 3, 4, 2, 5], [1, 3, 4, 0, 2]]]
    zeros = torch.tensor([[0.0, -0.0, 0.0, -1.0]])
    assert logit_difference(zeros, torch.tensor([[3]]), "max", 3, 1.0, 1.0, [])[2].tolist() == [[[0, 1, 2]]]
    ranks = [2, 1, 3]
    nearest = logit_difference(logits, torch.tensor([[3]]), "finer", 0, 1.0, 1.0, ranks)[2]
    assert nearest.tolist() == [[[4, 1, 0]]]


@pytest.mark.parametrize("option", _options(19), ids=_name)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_non_finite_logits_stay_in_their_image(option: dict[str, Any], poison: float) -> None:
    logits, classes = _random(4, 19, dtype=torch.float32), torch.tensor([[0, 5]] * 4)
    clean = logit_difference(logits, classes, *_canonical(**option))
    logits[1, 7], logits[2, 5] = poison, poison
    found = logit_difference(logits, classes, *_canonical(**option))
    expected = reference(logits, classes, *_canonical(**option))
    for name, got, before, want in zip(FIELDS, found, clean, expected, strict=True):
        assert torch.equal(got[[0, 3]], before[[0, 3]]), name
        if name == "rivals":
            assert torch.equal(got, want)
        else:
            torch.testing.assert_close(got, want, atol=1e-5, rtol=0, equal_nan=True)


@pytest.mark.parametrize("option", [*_options(25), {"baseline": "finer", "ranks": (17, 2)}], ids=_name)
def test_a_class_out_of_range_gets_nan_and_no_rivals(option: dict[str, Any]) -> None:
    # Logits behind and before these: what a read out of range would find.
    wide = _random(4, 75, dtype=torch.float32)
    logits = wide[1:3, 25:50]
    classes = torch.tensor([[25, 3], [-1, 2**40]])
    found = logit_difference(logits, classes, *_canonical(**option))
    expected = reference(logits, torch.tensor([[0, 3], [0, 0]]), *_canonical(**option))
    outside = torch.tensor([[True, False], [True, True]])
    for name, got, want in zip(FIELDS, found, expected, strict=True):
        assert got.shape == want.shape
        if name == "rivals":
            assert (got[outside] == -1).all() and torch.equal(got[~outside], want[~outside])
        else:
            assert got[outside].isnan().all(), name
            torch.testing.assert_close(got[~outside], want[~outside], atol=1e-5, rtol=0)


@pytest.mark.parametrize("option", _options(5), ids=_name)
def test_nothing_is_lost_where_all_logits_are_large(option: dict[str, Any]) -> None:
    logits = (_random(6, 5) + 5000).to(torch.float32)
    if option.get("alpha", 1.0) == 1.0:
        _assert_agree(logits, torch.arange(5).expand(6, 5), option, units=10)


def test_offsets_of_more_than_32_bits(tmp_path: Path) -> None:
    # A file with a hole: nothing of what lies between the elements exists.
    apart = 2**30 + 3
    storage = torch.from_file(str(tmp_path / "hole"), shared=True, size=3 * apart, dtype=torch.float16)
    near = _random(1, 3, dtype=torch.float16)
    far = storage.as_strided((1, 3), (0, apart)).copy_(near)
    for option in (
        {"baseline": "expected"},
        {"baseline": "logsumexp", "top_k": 2},
        {"baseline": "finer", "ranks": (1,)},
    ):
        arguments = (_classes(1, 2, count=3), *_canonical(**option))
        for got, want in zip(logit_difference(far, *arguments), logit_difference(near, *arguments), strict=True):
            assert torch.equal(got, want)
