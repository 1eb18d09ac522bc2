"""Checks of single numbers: errors name the argument, what was expected and what came."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any


def check_number(name: str, value: Any, *, least: float | None = None) -> None:
    """Raise unless a value is a finite number, and not below a limit.

    Args:
        name: the argument's.
        value: what came for it.
        least: the limit, if there is one.

    Raises:
        TypeError: it is no number; truth values are none.
        ValueError: it is not finite, or below the limit.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number; got {type(value).__name__}")
    # Not by `math.isfinite`, which torch.compile does not trace.
    if not -math.inf < float(value) < math.inf:
        raise ValueError(f"{name}: expected a finite number; got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name}: expected at least {least}; got {value!r}")


def check_positive(name: str, value: Any) -> None:
    """Raise unless a value is a finite number above zero; as `check_number`."""
    check_number(name, value)
    if not value > 0:
        raise ValueError(f"{name}: expected a positive number; got {value!r}")


def check_integer(name: str, value: Any, *, least: int | None = None) -> None:
    """Raise unless a value is an integer, and not below a limit.

    Args:
        name: the argument's.
        value: what came for it.
        least: the limit, if there is one.

    Raises:
        TypeError: it is no integer; truth values are none.
        ValueError: it is below the limit.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an integer; got {type(value).__name__}")
    if least is not None and value < least:
        raise ValueError(f"{name}: expected at least {least}; got {value}")
