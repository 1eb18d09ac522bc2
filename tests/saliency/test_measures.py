"""Filter similarity and average difference on examples worked by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from diffcam_fast.saliency.measures import average_difference, filter_similarity

A = torch.tensor([[[1.0, 0.0], [-2.0, 3.0]], [[0.0, 0.0], [0.0, 0.0]]])
B = torch.tensor([[[5.0, 1.0], [-1.0, -4.0]], [[0.0, 0.0], [0.0, 2.0]]])


def test_filter_similarity_by_hand() -> None:
    # + 0 - + with + + - -: two of four agree; none with one: three of four.
    assert filter_similarity(A, B).tolist() == [0.5, 0.75]
    assert filter_similarity(A, A).tolist() == [1.0, 1.0]
    assert filter_similarity(A, -A).tolist() == [0.25, 1.0]
    # Above half of 3 and half of 5: the last, the first.
    assert filter_similarity(A, B, threshold=0.5).tolist() == [0.5, 0.75]
    # Above a fifth of them, .6 and 1: the first and the last, the first.
    assert filter_similarity(A, B, threshold=0.2).tolist() == [0.75, 0.75]
    assert filter_similarity(2 * A, 0.1 * B, threshold=0.2).tolist() == [0.75, 0.75]


def test_average_difference_by_hand() -> None:
    ones, threes = torch.ones(2, 3, 4), 3 * torch.ones(2, 3, 4)
    assert average_difference(ones, threes).tolist() == pytest.approx([2 / 3, 2 / 3])
    assert average_difference(threes, ones).tolist() == pytest.approx([2 / 3, 2 / 3])
    assert average_difference(ones, ones).tolist() == [0, 0]
    # Means .5 and .25 apart by .25; 0 and .5.
    assert average_difference(A, B).tolist() == pytest.approx([0.5, 1.0])
    assert average_difference(0 * ones, 0 * ones).tolist() == [0, 0]
    assert average_difference(0 * ones, ones).tolist() == [1, 1]


@pytest.mark.parametrize("measure", [filter_similarity, average_difference])
def test_dtypes_and_symmetry(measure: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 3, 8, 8, generator=generator), torch.rand(4, 3, 8, 8, generator=generator)
    assert torch.equal(measure(a, b), measure(b, a))
    assert measure(a, b).dtype == torch.float32 and measure(a.double(), b.double()).dtype == torch.float64
    rounded = measure(a.bfloat16(), b.bfloat16())
    assert rounded.dtype == torch.float32 and torch.allclose(rounded, measure(a, b), atol=2e-2)
    assert measure(torch.zeros(0, 3, 8), torch.zeros(0, 3, 8)).shape == (0,)


@pytest.mark.parametrize("measure", [filter_similarity, average_difference])
def test_nan_stays_with_its_image(measure: Any) -> None:
    a = torch.rand(3, 5)
    clean = measure(a, a + 1)
    broken = a.clone()
    broken[1, 2] = math.nan
    found = measure(broken, a + 1)
    assert found.isnan().tolist() == [False, True, False]
    assert torch.equal(found[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0], A), {}, TypeError, "a: expected a torch.Tensor; got list"),
        ((A, A.long()), {}, TypeError, "b: expected a floating point tensor; got torch.int64"),
        ((A, A[:1]), {}, ValueError, r"b: expected the shape of a, \(2, 2, 2\); got \(1, 2, 2\)"),
        (
            (A[:, 0, 0], A[:, 0, 0]),
            {},
            ValueError,
            r"a: expected maps \(N, ...\) with values in them; got shape \(2,\)",
        ),
        ((A[..., :0], A[..., :0]), {}, ValueError, "a: expected maps .* with values in them"),
        ((A, A.to("meta")), {}, ValueError, "b: expected the device of a, cpu; got meta"),
        ((A, A), {"threshold": 1.0}, ValueError, "threshold: expected 0 to less than 1; got 1.0"),
        ((A, A), {"threshold": "0"}, TypeError, "threshold: expected a number; got str"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        filter_similarity(*arguments, **options)
