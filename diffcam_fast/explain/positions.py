"""Transformer tokens as positions of a map."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Integral

from torch import Tensor

from diffcam_fast.ops.arguments import check_integer


def tokens_to_positions(prefix_tokens: int = 1, size: Sequence[int] | None = None) -> Callable[[Tensor], Tensor]:
    """A `reshape` for `Explainer`: tokens ``(N, tokens, C)`` to channels at positions ``(N, C, *size)``.

    The result is a view: nothing is copied.

    Args:
        prefix_tokens: how many tokens come before those of the positions (a class token, registers); they are
            left out.
        size: positions along each dimension, such as ``(height, width)``; None: a square grid.

    Returns:
        A function of one tensor. It raises ValueError for a tensor that is not ``(N, tokens, C)`` or whose
        tokens do not fill the grid.

    Raises:
        TypeError: ``prefix_tokens`` or a size is not an integer.
        ValueError: ``prefix_tokens`` is negative or a size not positive.
    """
    check_integer("prefix_tokens", prefix_tokens, least=0)
    if size is not None:
        size = check_size(size)
    return partial(_positions, prefix_tokens=int(prefix_tokens), size=size)


def check_size(size: Sequence[int]) -> tuple[int, ...]:
    """A size along one to three dimensions, as a tuple of positive integers.

    Raises:
        TypeError: not a sequence of integers.
        ValueError: no or too many dimensions, or a size that is not positive.
    """
    if isinstance(size, str) or not isinstance(size, Sequence):
        raise TypeError(f"size: expected a tuple of integers; got {size!r}")
    if any(isinstance(length, bool) or not isinstance(length, Integral) for length in size):
        raise TypeError(f"size: expected a tuple of integers; got {tuple(size)}")
    if not 1 <= len(size) <= 3 or min(size) < 1:
        raise ValueError(f"size: expected one to three positive integers; got {tuple(size)}")
    return tuple(int(length) for length in size)


def _positions(tokens: Tensor, *, prefix_tokens: int, size: tuple[int, ...] | None) -> Tensor:
    if tokens.dim() != 3:
        raise ValueError(f"tokens_to_positions: expected tokens (N, tokens, C); got shape {tuple(tokens.shape)}")
    count = tokens.shape[1] - prefix_tokens
    if size is None:
        side = math.isqrt(max(count, 0))
        grid: tuple[int, ...] = (side, side)
    else:
        grid = size
    if count < 1 or math.prod(grid) != count:
        wanted = "a square number of tokens" if size is None else f"{math.prod(grid)} tokens for size {grid}"
        raise ValueError(
            f"tokens_to_positions: expected {wanted} after prefix_tokens={prefix_tokens}; got {count} "
            f"from shape {tuple(tokens.shape)}" + ("; give size=" if size is None else "")
        )
    return tokens[:, prefix_tokens:].transpose(1, 2).reshape(len(tokens), tokens.shape[2], *grid)
