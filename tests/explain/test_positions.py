"""Tokens as positions."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

from diffcam_fast.explain import tokens_to_positions


@pytest.mark.parametrize(
    ("prefix", "size", "grid"),
    [(1, None, (3, 3)), (0, None, (3, 3)), (2, (2, 5), (2, 5)), (1, (7,), (7,)), (0, [2, 3, 4], (2, 3, 4))],
)
def test_positions(prefix: int, size: Any, grid: tuple[int, ...]) -> None:
    count = torch.Size(grid).numel()
    tokens = torch.randn(4, prefix + count, 6)
    positions = tokens_to_positions(prefix, size)(tokens)
    assert positions.shape == (4, 6, *grid)
    assert torch.equal(positions, tokens[:, prefix:].permute(0, 2, 1).reshape(4, 6, *grid))
    assert positions.untyped_storage().data_ptr() == tokens.untyped_storage().data_ptr()


def test_no_images() -> None:
    assert tokens_to_positions()(torch.randn(0, 10, 6)).shape == (0, 6, 3, 3)


def test_pickles() -> None:
    tokens = torch.randn(1, 10, 2)
    copy = pickle.loads(pickle.dumps(tokens_to_positions()))
    assert torch.equal(copy(tokens), tokens_to_positions()(tokens))


@pytest.mark.parametrize(
    ("arguments", "shape", "message"),
    [
        ((), (2, 9, 4), r"a square number of tokens after prefix_tokens=1; got 8 from shape \(2, 9, 4\); give size="),
        ((0, (2, 3)), (2, 9, 4), r"6 tokens for size \(2, 3\) after prefix_tokens=0; got 9"),
        ((), (2, 1, 4), "got 0"),
        ((), (2, 9), r"expected tokens \(N, tokens, C\); got shape \(2, 9\)"),
        ((), (2, 4, 3, 3), r"got shape \(2, 4, 3, 3\)"),
    ],
)
def test_tokens_that_do_not_fit(arguments: Any, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokens_to_positions(*arguments)(torch.randn(shape))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1,), ValueError, "prefix_tokens: expected at least 0; got -1"),
        ((1.0,), TypeError, "prefix_tokens: expected an integer; got float"),
        ((1, 7), TypeError, "size: expected a tuple of integers; got 7"),
        ((1, "77"), TypeError, "size: expected a tuple of integers; got '77'"),
        ((1, (7, 0)), ValueError, "size: expected one to three positive integers"),
        ((1, (1, 2, 3, 4)), ValueError, "size: expected one to three positive integers"),
        ((1, (True, 2)), TypeError, "size: expected a tuple of integers"),
    ],
)
def test_arguments(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tokens_to_positions(*arguments)
