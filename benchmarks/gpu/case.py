"""One row to measure, with a name that is known before it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.report import Row


@dataclass(frozen=True)
class Case:
    """What a benchmark is made of."""

    label: str
    """For lists of what failed or was left out."""

    measure: Callable[[], Row]
    """Raises what it raises; other cases are measured all the same."""

    seconds: float = 2.0
    """It is not begun with less time than this."""
