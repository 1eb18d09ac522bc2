"""Means with intervals, as every study reports them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Interval(NamedTuple):
    """A mean, its 95 % interval, and how many values it is of."""

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        if self.count < 2:
            return f"{self.mean:.3f} (one value)" if self.count else "no values"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def cells(self, name: str) -> dict[str, float]:
        """The three numbers as cells of a table's row."""
        return {name: self.mean, f"{name}, low": self.low, f"{name}, high": self.high}


def mean_interval(values: Tensor | list[float]) -> Interval:
    """The mean of independent values and its 95 % interval by Student's t distribution.

    Args:
        values: one-dimensional; those that are not numbers (NaN) are left out, and not counted.

    Raises:
        ValueError: there is more than one dimension.
        ImportError: SciPy is missing.
    """
    try:
        from scipy.stats import t as student
    except ImportError as error:
        raise ImportError("intervals need SciPy: pip install 'diffcam_fast[studies]'") from error
    values = torch.as_tensor(values, dtype=torch.float64)
    if values.ndim != 1:
        raise ValueError(f"values: got shape {tuple(values.shape)}; expected one dimension")
    values = values[~values.isnan()]
    count = values.numel()
    if count == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    mean = float(values.mean())
    if count == 1:
        return Interval(mean, math.nan, math.nan, 1)
    half = float(student.ppf(0.975, count - 1)) * float(values.std()) / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)
