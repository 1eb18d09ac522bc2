"""What torchcam is asked to explain: classes, or functions of an image's output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from diffcam_fast.compat.engine import Chosen

OutputTarget: TypeAlias = Callable[[Any], Tensor]
"""From the output of one image to a scalar."""


@dataclass
class Scores:
    """What is pulled back.

    Attributes:
        compute: makes `values`.
        several: whether results have a dimension of targets.
        alike: all are made of the same outputs, in the same way.
        outputs: ``(N, K)``; None for others.
        chosen: which of them the scores are, or are sums of; None where they are something else.
    """

    compute: Callable[[], list[Tensor]]
    several: bool
    alike: bool
    outputs: Tensor | None = None
    chosen: Chosen | None = None

    @cached_property
    def values(self) -> list[Tensor]:
        """A scalar for each of T targets, or ``(N, 1)``; recorded by autograd."""
        with torch.enable_grad():
            return self.compute()


class Classes:
    """Classes as the caller gives them.

    Args:
        given: one for all images; a list with one for each; or T for each, as a list of lists. Integers in a tensor
            or an array, too.

    Raises:
        ValueError: something else, or a negative number.
    """

    def __init__(self, given: Any) -> None:
        self.values: int | list[Any] | Tensor
        if type(given) is int and given >= 0:
            self.values, self.several = given, False
            return
        if isinstance(given, np.ndarray):
            given = torch.from_numpy(given)
        if isinstance(given, Tensor):
            if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool or given.dim() > 2:
                raise ValueError(
                    f"class_idx: expected integers (), (N,) or (N, T); got {given.dtype} {tuple(given.shape)}"
                )
            # Those on another device are not waited for.
            given = given if given.device.type != "cpu" else given.tolist()
        if not isinstance(given, int | list | Tensor) and hasattr(given, "__index__"):
            given = given.__index__()
        self.several = given.dim() == 2 if isinstance(given, Tensor) else _is_nested(given)
        self.values = given
        if isinstance(given, Tensor):
            return
        rows = given if self.several else [given if isinstance(given, list) else [given]]
        if not all(hasattr(index, "__index__") and index >= 0 for row in rows for index in row):
            raise ValueError(f"class_idx: expected an integer from 0, or a list of them; got {given!r}")
        if self.several and (len({len(row) for row in rows}) != 1 or not rows[0]):
            raise ValueError("class_idx: expected as many classes for each image, at least one")

    @property
    def images(self) -> int | None:
        """How many images they are for; None: for any number."""
        if isinstance(self.values, Tensor):
            return len(self.values) if self.values.dim() else None
        return len(self.values) if isinstance(self.values, list) else None

    def indices(self, images: int, count: int, device: torch.device) -> Tensor:
        """``(N, T)``, int64, on a device.

        Raises:
            IndexError: a class is not below `count`.
        """
        if isinstance(self.values, Tensor):
            found = self.values.to(device, torch.int64)
        else:
            self._check(count)
            found = torch.tensor(self.values, dtype=torch.int64)
            found = found.to(device, non_blocking=True) if device.type != "cpu" else found
        if found.dim() == 0:
            return found.expand(images, 1)
        return found if found.dim() == 2 else found.unsqueeze(1)

    def scores(self, scores: Tensor) -> Scores:
        """The scores of each of T classes, summed over images.

        Args:
            scores: ``(N, K)``, or for one class in all images ``(N, K, ...)``.

        Raises:
            IndexError: a class that the scores do not have.
            ValueError: other shapes.
        """
        if scores.dim() < 2 or (scores.dim() > 2 and self.images is not None):
            raise ValueError(f"scores: expected (N, K), a score for each class; got {tuple(scores.shape)}")
        if scores.dim() > 2:
            self._check(scores.shape[1])
            return Scores(lambda: [self._of_all_images(scores)], False, True)
        indices = self.indices(len(scores), scores.shape[1], scores.device)
        if len(indices) != len(scores):
            raise ValueError(f"class_idx: expected classes for {len(scores)} images; got them for {len(indices)}")

        def values() -> list[Tensor]:
            if isinstance(self.values, int):
                return [self._of_all_images(scores)]
            return [scores.gather(1, column.unsqueeze(1)).sum() for column in indices.unbind(1)]

        return Scores(values, self.several, True, scores, Chosen(indices))

    def _of_all_images(self, scores: Tensor) -> Tensor:
        assert isinstance(self.values, int)
        selected = scores.select(1, self.values)
        return selected if selected.numel() == 1 else selected.sum()

    def _check(self, count: int) -> None:
        if type(self.values) is int and self.values < count:
            return
        values: Any = self.values if isinstance(self.values, list) else [self.values]
        for index in (number for row in values for number in row) if self.several else values:
            if index >= count:
                raise IndexError(f"class_idx: expected classes below {count}; got {index}")


class Targets:
    """Functions of an image's output as the caller gives them.

    Args:
        given: one for all images; a list with one for each; or with a list of T for each.
        images: N.

    Raises:
        TypeError: something else.
        ValueError: not as many as images.
    """

    def __init__(self, given: Any, images: int) -> None:
        if callable(given):
            given = [given] * images
        if not isinstance(given, list):
            raise TypeError(f"targets: expected a function or a list of functions; got {type(given).__name__}")
        self.several = _is_nested(given)
        self._rows: list[list[OutputTarget]] = given if self.several else [[target] for target in given]
        if any(not callable(target) for row in self._rows for target in row):
            raise TypeError("targets: expected a function or a list of functions")
        if len(given) != images:
            raise ValueError(f"targets: expected one for each of {images} images, or one for all; got {len(given)}")
        if len({len(row) for row in self._rows}) > 1 or not all(self._rows):
            raise ValueError("targets: expected as many for each image, at least one")

    def scores(self, outputs: Any) -> Scores:
        """The values of each of T targets, summed over images.

        Raises:
            TypeError: outputs that are neither a tensor nor a list, or values that are no tensors.
            ValueError: values that are no scalars; more or fewer outputs than images.
        """
        if not isinstance(outputs, Tensor | list):
            raise TypeError(f"scores: expected a tensor or a list with an entry for each image; got {type(outputs)}")
        if isinstance(outputs, Tensor) and outputs.dim() == 0:
            raise ValueError("scores: expected a tensor with an entry for each image; got a scalar")
        if len(outputs) != len(self._rows):
            raise ValueError(f"scores: expected an entry for each of {len(self._rows)} images; got {len(outputs)}")

        def values() -> list[Tensor]:
            each = list(outputs.unbind(0) if isinstance(outputs, Tensor) else outputs)
            return [
                torch.stack([_scalar(target(output)) for target, output in zip(column, each, strict=True)]).sum()
                for column in zip(*self._rows, strict=True)
            ]

        return Scores(values, self.several, False)


def _is_nested(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and all(isinstance(row, list | tuple) for row in given)


def _scalar(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"targets: expected functions that return a tensor; got {type(value).__name__}")
    if value.numel() != 1:
        raise ValueError(f"targets: expected functions that return a scalar; got shape {tuple(value.shape)}")
    return value.reshape(())


def contrast(scores: Tensor, classes: Tensor, references: Tensor, gamma: float, *, several: bool) -> Scores:
    """Scores of classes less ``gamma`` times the mean score of classes of reference (Zhang et al. 2025).

    Args:
        scores: ``(N, K)``.
        classes: ``(N, T)``.
        references: ``(N, T, R)``.
        gamma: see above.
        several: see `Scores`.

    Returns:
        Values ``(N, 1)`` for each of T classes.
    """
    count = references.shape[2]
    shares = scores.new_full((1 + count,), -gamma / max(count, 1), requires_grad=False)
    shares[0] = 1
    indices = torch.cat([classes.unsqueeze(2), references], 2)

    def values() -> list[Tensor]:
        return [(scores.gather(1, each) * shares).sum(1, keepdim=True) for each in indices.unbind(1)]

    return Scores(values, several, True, scores, Chosen(indices, shares.expand(indices.shape)))


def nearest(scores: Tensor, classes: Tensor, count: int) -> Tensor:
    """The classes whose scores are nearest to a class's, without itself: ``(N, T, count)``.

    Args:
        scores: ``(N, K)``.
        classes: ``(N, T)``.
        count: how many; at most all others.
    """
    distances = (scores.unsqueeze(1) - scores.gather(1, classes).unsqueeze(2)).abs()
    distances.scatter_(2, classes.unsqueeze(2), float("inf"))
    return distances.topk(min(count, scores.shape[1] - 1), dim=2, largest=False).indices


def explicit(references: Any, classes: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """Classes of reference as the caller gives them, a row for each image.

    Args:
        references: one class, a list of them for all images, or a list of lists of equal length.
        classes: the classes explained, of each image.
        count: of classes there are.

    Raises:
        TypeError: something else.
        ValueError: rows of other lengths; a class twice, out of range, or the one that is explained.
    """
    if _is_integer(references):
        rows = [[references]] * len(classes)
    elif not isinstance(references, list):
        raise TypeError(f"comparison_idx: expected an integer or a list; got {type(references).__name__}")
    elif not references:
        raise ValueError("comparison_idx: expected at least one class; got none")
    elif all(isinstance(row, list) for row in references):
        rows = references
        if len(rows) != len(classes):
            raise ValueError(f"comparison_idx: expected rows for {len(classes)} images; got {len(rows)}")
    else:
        rows = [references] * len(classes)
    if len({len(row) for row in rows}) != 1 or not rows[0]:
        raise ValueError("comparison_idx: expected as many classes for each image, at least one")
    for image, (row, own) in enumerate(zip(rows, classes, strict=True)):
        if not all(_is_integer(index) for index in row):
            raise TypeError("comparison_idx: expected integers")
        if any(not 0 <= index < count for index in row):
            raise ValueError(f"comparison_idx: expected classes from 0 to {count - 1}; got {row} for image {image}")
        if len(set(row)) != len(row):
            raise ValueError(f"comparison_idx: expected each class once; got {row} for image {image}")
        if set(row) & set(own):
            raise ValueError(f"comparison_idx: expected other classes than {own}; got {row} for image {image}")
    return rows


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
