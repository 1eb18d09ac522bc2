"""pytorch-grad-cam's targets as scores: all at once where they are known, one by one where they are not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import index
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from diffcam_fast.compat.engine import Chosen, Cotangent
from diffcam_fast.compat.formulas import weighted_difference
from diffcam_fast.compat.pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget, FinerWeightedTarget
from diffcam_fast.explain.classes import classes_for, parse_classes
from diffcam_fast.explain.targets import LogProbability, Probability
from diffcam_fast.ops.logit_difference import logit_difference
from diffcam_fast.reference.cam import accumulation_dtype

# Subclasses may do anything, and are called.
_MODULES = (ClassifierOutputTarget.__module__, "pytorch_grad_cam.utils.model_targets")

_Function = Callable[[Any], Tensor]


class Wanted(Protocol):
    """What is explained."""

    @property
    def several(self) -> bool:
        """Whether the maps have a dimension of targets."""

    @property
    def known(self) -> bool:
        """Whether the functions were given by the caller."""

    def score(self, outputs: Any) -> Chosen | Cotangent | list[Tensor]:
        """What is pulled back for the model's outputs; see `diffcam_fast.compat.engine.Score`."""

    def functions(self, outputs: Any) -> list[list[_Function]]:
        """For each of T targets, functions of the images' outputs."""


class Targets:
    """What the caller wants explained: T targets for each image.

    Args:
        given: None (the predicted class of each image), integers ``(N,)`` or ``(N, T)`` as a tensor or an array, or
            a list with a function of one image's output for each image, or with a list of T such functions. One
            entry serves any number of images; entries beyond the last image are left out.
        images: N.
        zeros: fewer functions than images leave the other images without a score, and so with a map of zeros.

    Raises:
        TypeError: something else is given.
        ValueError: fewer functions than images, but for one; or as many functions for one image as for another there
            are not.
    """

    def __init__(self, given: Any, images: int, *, zeros: bool = False) -> None:
        self._rows: list[list[_Function]] | None = None
        self.known = False
        if given is None or isinstance(given, Tensor | np.ndarray):
            self._parsed = parse_classes(given, images)
            self.several = given is not None and given.ndim == 2
            return
        self.known = True
        if not isinstance(given, Iterable):
            raise TypeError(f"targets: expected None or a list with a target for each image; got {given!r}")
        given = list(given)
        self.several = any(isinstance(entry, list | tuple) for entry in given)
        rows = [list(entry) if isinstance(entry, list | tuple) else [entry] for entry in given][:images]
        for row in rows:
            for target in row:
                if not callable(target):
                    raise TypeError(f"targets: expected functions of the model's output; got {type(target).__name__}")
        if images and not rows:
            raise ValueError("targets: expected at least one; got none")
        if len({len(row) for row in rows}) > 1 or (rows and not rows[0]):
            raise ValueError("targets: expected as many targets for each image, at least one")
        if len(rows) < images and not zeros:
            if len(rows) != 1:
                raise ValueError(f"targets: expected one for each of {images} images, or one for all; got {len(rows)}")
            rows = rows * images
        self._rows = rows

    def score(self, outputs: Any) -> Chosen | Cotangent | list[Tensor]:
        """See `Wanted.score`."""
        if self._rows is None:
            logits = _logits(outputs)
            return Chosen(classes_for(self._parsed, logits))
        if isinstance(outputs, Tensor) and outputs.dim() == 2 and outputs.is_floating_point():
            known = _all_at_once(self._rows, _logits(outputs))
            if known is not None:
                return known
        return [
            sum(row[number](output) for row, output in zip(self._rows, outputs, strict=False))  # type: ignore[misc]
            for number in range(len(self._rows[0]))
        ]

    def functions(self, outputs: Any) -> list[list[_Function]]:
        """See `Wanted.functions`; waits for the device where classes were predicted."""
        if self._rows is None:
            logits = _logits(outputs)
            classes = classes_for(self._parsed, logits).T.tolist()
            return [[ClassifierOutputTarget(category) for category in column] for column in classes]
        return [list(column) for column in zip(*self._rows, strict=True)]


class NearestRivals:
    """A class against those whose logits are nearest to it, as FinerCAM picks them.

    Args:
        alpha: see `weighted_difference`.
        ranks: of the classes compared with, 0 being the nearest to the target's logit, which is the class itself;
            those beyond the last class are left out. None: 1, 2 and 3.
        target_idx: the class; None: that with the largest logit.
    """

    several = False
    known = False

    def __init__(self, alpha: float, ranks: Sequence[int] | None, target_idx: int | None) -> None:
        self._alpha = alpha
        self._ranks = ranks
        self._target = target_idx

    def score(self, outputs: Any) -> Chosen | Cotangent:
        """See `Wanted.score`.

        Raises:
            ValueError: no class is left to compare with.
        """
        logits = _logits(outputs)
        ranks = self._known_ranks(logits.shape[1])
        # The kernel compares a class with others alone, and with each once.
        if min(ranks) > 0 and len(set(ranks)) == len(ranks):
            return self._by_kernel(logits, ranks)
        classes, others = self._compared(logits)
        alpha = torch.full_like(logits[:, :1], self._alpha)
        return Cotangent(weighted_difference(logits, classes, others.unsqueeze(1), alpha))

    def functions(self, outputs: Any) -> list[list[_Function]]:
        """See `Wanted.functions`."""
        classes, others = self._compared(_logits(outputs))
        pairs = zip(classes[:, 0].tolist(), others.tolist(), strict=True)
        return [[FinerWeightedTarget(main, compared, self._alpha) for main, compared in pairs]]

    def _by_kernel(self, logits: Tensor, ranks: tuple[int, ...]) -> Chosen | Cotangent:
        classes = self._classes(logits)
        found = logit_difference(logits, classes, baseline="finer", alpha=float(self._alpha), ranks=ranks)
        assert found.rivals is not None
        # On a GPU, asking takes longer than what it saves.
        if logits.device.type == "cpu" and logits.numel() > 0:
            compared = torch.cat([classes.unsqueeze(2), found.rivals], 2)
            factors = found.cotangent.gather(2, compared)
            # Where the class's own factor is rounded to 1, all that other classes have between them is less than what
            # rounding takes from the rivals' factors: both are that small a part of the score.
            if factors[:, :, 0].amin().item() == 1:
                return Chosen(compared, factors)
        return Cotangent(found.cotangent)

    def _classes(self, logits: Tensor) -> Tensor:
        """(N, 1)."""
        if self._target is None:
            return logits.argmax(1, keepdim=True)
        chosen = _indices([[self._target]], logits)
        if chosen is None:
            raise TypeError(f"target_idx: expected an integer or None; got {type(self._target).__name__}")
        return chosen.expand(len(logits), 1)

    def _known_ranks(self, count: int) -> tuple[int, ...]:
        given = (1, 2, 3) if self._ranks is None else self._ranks
        ranks = tuple(index(rank) for rank in given if rank < count)
        if not ranks:
            raise ValueError(f"comparison_categories: expected ranks below {count}; got {self._ranks}")
        return ranks

    def _compared(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        ranks = self._known_ranks(logits.shape[1])
        target = logits.gather(1, self._classes(logits))
        farthest = logits.shape[1] if min(ranks) < 0 else max(ranks) + 1
        nearest = (logits - target).abs().topk(farthest, largest=False).indices
        return nearest[:, :1], nearest[:, list(ranks)]


def _logits(outputs: Any) -> Tensor:
    if not isinstance(outputs, Tensor) or outputs.dim() != 2:
        got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(f"targets: expected a model that returns logits (N, K), to choose classes; got {got}")
    return outputs.detach().to(accumulation_dtype(outputs.dtype))


def _all_at_once(rows: list[list[_Function]], logits: Tensor) -> Chosen | Cotangent | None:
    """Scores of all images, where all targets are of one known kind; None otherwise."""
    kinds = {type(target) for row in rows for target in row}
    if len(kinds) != 1:
        return None
    (kind,) = kinds
    name = kind.__qualname__ if kind.__module__ in _MODULES else ""
    known = logits[: len(rows)]
    if name == _CHOOSING and len(known) == len(logits):
        classes = _categories(rows, logits)
        return None if classes is None else Chosen(classes)
    formula = _FORMULAS.get(name)
    cotangent = None if formula is None else formula(rows, known)
    if cotangent is None or len(known) == len(logits):
        return None if cotangent is None else Cotangent(cotangent)
    return Cotangent(torch.cat([cotangent, cotangent.new_zeros((len(logits) - len(known), *cotangent.shape[1:]))]))


def _logit(rows: list[list[Any]], logits: Tensor) -> Tensor | None:
    classes = _categories(rows, logits)
    return None if classes is None else Chosen(classes).written_down(logits)


def _probability(rows: list[list[Any]], logits: Tensor) -> Tensor | None:
    classes = _categories(rows, logits)
    return None if classes is None else Probability().scores(logits, classes).cotangent


def _logit_and_log_probability(rows: list[list[Any]], logits: Tensor) -> Tensor | None:
    classes = _categories(rows, logits)
    if classes is None:
        return None
    return Chosen(classes).written_down(logits) + LogProbability().scores(logits, classes).cotangent


def _weighted_difference(rows: list[list[Any]], logits: Tensor) -> Tensor | None:
    classes = _indices([[target.main_category for target in row] for row in rows], logits)
    compared = [[list(target.comparison_categories) for target in row] for row in rows]
    if classes is None or len({len(others) for row in compared for others in row}) != 1 or not compared[0][0]:
        return None
    others = _indices([[other for others in row for other in others] for row in compared], logits)
    if others is None:
        return None
    alpha = torch.tensor([[float(target.alpha) for target in row] for row in rows], dtype=torch.float64)
    alpha = alpha.to(logits.device, logits.dtype, non_blocking=True)
    return weighted_difference(logits, classes, others.reshape(*classes.shape, -1), alpha)


_CHOOSING = "ClassifierOutputTarget"
_FORMULAS = {
    _CHOOSING: _logit,
    "ClassifierOutputSoftmaxTarget": _probability,
    "ClassifierOutputReST": _logit_and_log_probability,
    "FinerWeightedTarget": _weighted_difference,
}


def _categories(rows: list[list[Any]], logits: Tensor) -> Tensor | None:
    return _indices([[target.category for target in row] for row in rows], logits)


def _indices(rows: list[list[Any]], logits: Tensor) -> Tensor | None:
    """Indices (N, T) as Python counts them, from the end where negative; None for what is not an integer."""
    count = logits.shape[1]
    found: list[list[int]] = []
    for row in rows:
        found.append([])
        for given in row:
            if isinstance(given, bool) or not hasattr(given, "__index__"):
                return None
            number = index(given)
            if not -count <= number < count:
                raise IndexError(f"targets: class {number} is out of bounds for a model with {count} classes")
            found[-1].append(number % count)
    classes = torch.tensor(found)
    # Right after a network has run every operator is felt, also one that does nothing.
    return classes if logits.device.type == "cpu" else classes.to(logits.device, non_blocking=True)
