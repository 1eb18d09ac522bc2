"""Which of the model's outputs is explained, in every form that captum takes, and a few more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffcam_fast.compat.captum.refusals import InvalidType, InvalidValue

_Index = int | slice


@dataclass(frozen=True)
class Targets:
    """Targets that are understood, before the model has run.

    Attributes:
        column: what is selected for every example: indices into the output's dimensions after the first.
        rows: the same for each example.
        classes: ``(N,)`` or ``(N, T)``, int64: columns of an output ``(N, K)``.
    """

    column: tuple[_Index, ...] | None = None
    rows: tuple[tuple[_Index, ...], ...] | None = None
    classes: Tensor | None = None

    @property
    def several(self) -> bool:
        """Whether there are T targets for each example."""
        return self.classes is not None and self.classes.dim() == 2

    def scores(self, output: Tensor) -> Tensor:
        """What is explained, one number for each example: ``(N, ...)``, ``(N, T)`` or a single one for all.

        Raises:
            InvalidValue: targets that do not fit the output, or that leave more than one number for an example.
            IndexError: an index that the output does not have.
        """
        if self.classes is not None:
            return self._gathered(output, self.classes)
        if self.column is not None:
            _check(self.column, output)
            scores = output[(slice(None), *self.column)]
        elif self.rows is not None:
            _check_count(len(self.rows), output)
            for row in self.rows:
                _check(row, output)
            scores = torch.stack([output[(number, *row)] for number, row in enumerate(self.rows)])
        else:
            scores = output
        if scores.dim() > 0 and scores.shape[1:].numel() != 1:
            raise InvalidValue(
                f"target: expected one that leaves a single number for each example; got scores of shape "
                f"{tuple(scores.shape)} from an output of shape {tuple(output.shape)}"
            )
        return scores

    @staticmethod
    def _gathered(output: Tensor, classes: Tensor) -> Tensor:
        if output.dim() != 2:
            raise InvalidValue(
                f"target: an integer for each example needs an output of shape (N, K); got {tuple(output.shape)}"
            )
        _check_count(len(classes), output)
        count = output.shape[1]
        if classes.device.type == "cpu":
            known = classes.flatten().tolist()
            if known and not (min(known) >= -count and max(known) < count):
                raise IndexError(f"target: expected indices below {count}; got {min(known)} to {max(known)}")
        index = classes.to(output.device, non_blocking=True)
        if classes.device.type != "cpu" or (known and min(known) < 0):
            # From the end; without reading what is on a GPU.
            index = torch.where(index < 0, index + count, index)
        return output.gather(1, index) if index.dim() == 2 else output.gather(1, index.unsqueeze(1)).squeeze(1)


def parse_targets(target: Any) -> Targets:
    """Understand targets.

    Args:
        target: None, an integer or a tuple of them for all examples; for each example a list of integers or of tuples,
            or integers ``(N,)`` as a tensor or an array; for T targets an example ``(N, T)`` integers, T lists count.

    Raises:
        InvalidType: something else.
        InvalidValue: a tensor or an array of another shape.
    """
    if target is None:
        return Targets()
    if type(target) is not int and isinstance(target, Tensor | np.ndarray):
        return _from_tensor(torch.as_tensor(target))
    if _is_index(target):
        return Targets(column=(_integer(target),))
    if isinstance(target, tuple):
        return Targets(column=_indices(target))
    if not isinstance(target, list):
        raise InvalidType(
            f"target: expected None, an integer, a tuple, a list, a tensor or an array; got {type(target).__name__}"
        )
    if all(isinstance(row, tuple) for row in target) and target:
        return Targets(rows=tuple(_indices(row) for row in target))
    if all(isinstance(row, list) for row in target) and target:
        if len({len(row) for row in target}) > 1:
            raise InvalidValue("target: expected as many integers for each example; got lists of different lengths")
        return _from_tensor(torch.tensor([[_integer(value) for value in row] for row in target]), always=True)
    return Targets(classes=torch.tensor([_integer(value) for value in target], dtype=torch.int64))


def _from_tensor(target: Tensor, *, always: bool = False) -> Targets:
    if target.dtype == torch.bool or target.is_floating_point() or target.is_complex():
        raise InvalidType(f"target: expected integers; got {target.dtype}")
    if target.numel() == 1 and not always:
        # As captum has it: the same for all examples.
        return Targets(column=(int(target),))
    if target.dim() not in (1, 2) or (target.dim() == 2 and target.shape[1] == 0):
        raise InvalidValue(f"target: expected integers of shape (N,) or (N, T); got shape {tuple(target.shape)}")
    return Targets(classes=target.detach().to(torch.int64))


def _is_index(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool | np.bool_)


def _integer(value: Any) -> int:
    if not _is_index(value):
        raise InvalidType(f"target: expected integers; got {type(value).__name__}")
    return value.__index__()


def _indices(values: tuple[Any, ...]) -> tuple[_Index, ...]:
    return tuple(value if isinstance(value, slice) else _integer(value) for value in values)


def _check_count(count: int, output: Tensor) -> None:
    if output.dim() == 0 or count != output.shape[0]:
        raise InvalidValue(f"target: expected one for each example of an output {tuple(output.shape)}; got {count}")


def _check(indices: tuple[_Index, ...], output: Tensor) -> None:
    if len(indices) > output.dim() - 1:
        raise InvalidValue(
            f"target: expected at most {max(output.dim() - 1, 0)} indices for an output of shape "
            f"{tuple(output.shape)}; got {len(indices)}"
        )
    for size, index in zip(output.shape[1:], indices, strict=False):
        if not isinstance(index, slice) and not -size <= index < size:
            raise IndexError(f"target: expected an index below {size} for an output {tuple(output.shape)}; got {index}")
