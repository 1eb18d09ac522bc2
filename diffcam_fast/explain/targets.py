"""What is explained: functions of the logits, one score per image and target, with closed-form gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffcam_fast.backends import direct
from diffcam_fast.explain.shared import SharedScores, difference_scores, one_hot_scores, pairwise_scores
from diffcam_fast.ops.arguments import check_integer, check_number
from diffcam_fast.ops.logit_difference import logit_difference
from diffcam_fast.reference.logit_difference import BASELINES, TEMPERED


class Scores(NamedTuple):
    """Scores of T targets an image, with what is pulled back for each."""

    delta: Tensor
    """(N, T): the scores."""

    cotangent: Tensor
    """(N, T, K): gradient of each score with respect to the logits."""

    rivals: Tensor | None = None
    """int64, (N, classes an image, k): the classes compared with, where there are certain ones."""


class Target(ABC):
    """A function of the logits to be explained. Subclasses give its value and its gradient."""

    @property
    def targets_per_class(self) -> int:
        """How many targets `scores` makes of each class."""
        return 1

    @abstractmethod
    def scores(self, logits: Tensor, classes: Tensor) -> Scores:
        """Scores and their gradients.

        Args:
            logits: ``(N, K)``, float32 or float64, without autograd history.
            classes: ``(N, T)``, int64.

        Returns:
            Scores of ``T`` targets an image, or of a multiple of ``T``, in the order of the classes.
        """

    def shared_scores(self, logits: Tensor, classes: Tensor) -> SharedScores | None:
        """The same scores, with cotangents that are not written down class by class.

        Called in place of `scores` where there are many classes. None, which is what this method returns unless a
        subclass overrides it: there is no such form.

        Args:
            logits: as in `scores`.
            classes: as in `scores`.
        """
        return None


@dataclass(frozen=True)
class LogitDifference(Target):
    """What tells a class from its rivals: its logit less a baseline of theirs.

    Adding the same number to all logits of an image changes neither the probabilities nor this target nor its
    maps. See `diffcam_fast.logit_difference` for the formulas.

    Args:
        baseline: "logsumexp", "expected", "mean" or "max" of the rivals' logits.
        top_k: how many of the strongest rivals are folded into the baseline; None: all other classes.
        temperature: of "logsumexp" and "expected"; positive.
        pairwise: each of the ``top_k`` rivals is a target of its own, ``z_c - z_rival``: with ``T`` classes
            an image there are ``T * top_k`` targets, those of the first class first, strongest rival first.
            (A baseline of a single rival is that rival's logit, whatever the baseline.)

    Raises:
        TypeError: an argument is not of the type above.
        ValueError: an unknown baseline, a value out of range, a temperature other than 1 with "mean" or
            "max", or ``pairwise`` without ``top_k``.
    """

    baseline: str = "logsumexp"
    top_k: int | None = None
    temperature: float = 1.0
    pairwise: bool = False

    def __post_init__(self) -> None:
        known = [name for name in BASELINES if name != "finer"]
        if self.baseline == "finer":
            raise ValueError("baseline: 'finer' has parameters of its own; use the target Finer(alpha=..., ranks=...)")
        if self.baseline not in known:
            raise ValueError(f"baseline: expected one of {', '.join(known)}; got {self.baseline!r}")
        check_number("temperature", self.temperature)
        if not self.temperature > 0:
            raise ValueError(f"temperature: expected a positive number; got {self.temperature!r}")
        if self.temperature != 1 and self.baseline not in TEMPERED:
            raise ValueError(
                f"temperature: only for baseline {' and '.join(TEMPERED)}; got {self.temperature!r} with "
                f"{self.baseline!r}"
            )
        if self.top_k is not None:
            check_integer("top_k", self.top_k)
            if self.top_k < 1:
                raise ValueError(f"top_k: expected at least 1; got {self.top_k}")
        if not isinstance(self.pairwise, bool):
            raise TypeError(f"pairwise: expected a bool; got {type(self.pairwise).__name__}")
        if self.pairwise and self.top_k is None:
            raise ValueError("pairwise: expected top_k with it, the number of rivals that get maps; got top_k None")

    @property
    def targets_per_class(self) -> int:
        """See `Target.targets_per_class`."""
        return self.top_k if self.pairwise and self.top_k is not None else 1

    def scores(self, logits: Tensor, classes: Tensor) -> Scores:
        """See `Target.scores`."""
        if self.top_k is None and not torch.compiler.is_compiling():
            # The arguments were checked when they were given: a small network would wait for doing so again.
            served = direct.logit_difference(
                logits, classes, self.baseline, None, float(self.temperature), 1.0, (1, 2, 3)
            )
            if served is not None:
                return Scores(served[0], served[1])
            with torch._C._AutoDispatchBelowAutograd():
                delta, cotangent, *_ = torch.ops.diffcam_fast.logit_difference.default(
                    logits, classes, self.baseline, 0, float(self.temperature), 1.0, []
                )
            return Scores(delta, cotangent)
        result = logit_difference(
            logits, classes, baseline=self.baseline, top_k=self.top_k, temperature=self.temperature
        )
        if not self.pairwise:
            return Scores(result.delta, result.cotangent, result.rivals)
        assert result.rivals is not None and result.differences is not None
        cotangent = logits.new_zeros((*result.rivals.shape, logits.shape[1]))
        cotangent.scatter_(3, result.rivals.unsqueeze(3), -1.0)
        cotangent.scatter_(3, classes[:, :, None, None].expand(*result.rivals.shape, 1), 1.0)
        return Scores(result.differences.flatten(1), cotangent.flatten(1, 2), result.rivals)

    def shared_scores(self, logits: Tensor, classes: Tensor) -> SharedScores | None:
        """See `Target.shared_scores`."""
        if self.top_k is not None and self.top_k >= logits.shape[1]:
            return None
        if self.pairwise:
            assert self.top_k is not None
            return pairwise_scores(logits, classes, self.top_k)
        return difference_scores(logits, classes, self.baseline, self.top_k, self.temperature)


@dataclass(frozen=True)
class Finer(Target):
    """The target of FinerCAM (Zhang et al. 2025), as pytorch-grad-cam defines it.

    A class's logit is compared with those of the classes nearest to it in logit, weighted by their
    probabilities. See `diffcam_fast.logit_difference`, baseline "finer". Unaffected by a number added to all
    logits only at ``alpha = 1``.

    Args:
        alpha: factor of the other classes' logits.
        ranks: which classes, by distance in logit; 1 is the nearest.

    Raises:
        TypeError: ``alpha`` is not a number or ``ranks`` not a sequence of integers.
        ValueError: ``alpha`` is not finite, or ``ranks`` is empty, repeats a rank or holds one below 1.
    """

    alpha: float = 1.0
    ranks: tuple[int, ...] = (1, 2, 3)

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha)
        if isinstance(self.ranks, str) or not isinstance(self.ranks, list | tuple):
            raise TypeError(f"ranks: expected a tuple of integers; got {type(self.ranks).__name__}")
        for rank in self.ranks:
            check_integer("ranks", rank)
        if not self.ranks or len(set(self.ranks)) != len(self.ranks) or min(self.ranks) < 1:
            raise ValueError(f"ranks: expected at least one rank, each once and from 1; got {tuple(self.ranks)}")
        object.__setattr__(self, "ranks", tuple(int(rank) for rank in self.ranks))

    def scores(self, logits: Tensor, classes: Tensor) -> Scores:
        """See `Target.scores`."""
        result = logit_difference(logits, classes, baseline="finer", alpha=self.alpha, ranks=self.ranks)
        return Scores(result.delta, result.cotangent, result.rivals)


@dataclass(frozen=True)
class Logit(Target):
    """The class's logit alone: the classical choice, and not gauge invariant.

    Its maps change with anything that the network adds to all logits, although no probability does.
    """

    def scores(self, logits: Tensor, classes: Tensor) -> Scores:
        """See `Target.scores`."""
        cotangent = logits.new_zeros((*classes.shape, logits.shape[1]))
        return Scores(logits.gather(1, classes), cotangent.scatter_(2, classes.unsqueeze(2), 1.0))

    def shared_scores(self, logits: Tensor, classes: Tensor) -> SharedScores | None:
        """See `Target.shared_scores`."""
        return one_hot_scores(logits, classes)


@dataclass(frozen=True)
class Probability(Target):
    """The class's softmax probability. Its gradient vanishes where the softmax saturates; so does the map."""

    def scores(self, logits: Tensor, classes: Tensor) -> Scores:
        """See `Target.scores`."""
        probabilities = logits.softmax(1)
        chosen = probabilities.gather(1, classes)
        return Scores(chosen, chosen.unsqueeze(2) * _log_probability_gradient(probabilities, classes))


@dataclass(frozen=True)
class LogProbability(Target):
    """The logarithm of the class's softmax probability. Its gradient vanishes where the class is certain."""

    def scores(self, logits: Tensor, classes: Tensor) -> Scores:
        """See `Target.scores`."""
        cotangent = _log_probability_gradient(logits.softmax(1), classes)
        return Scores(logits.log_softmax(1).gather(1, classes), cotangent)


def _log_probability_gradient(probabilities: Tensor, classes: Tensor) -> Tensor:
    # One-hot less probabilities. At the class itself 1 - p is taken as the sum of the others, which keeps its
    # digits where p rounds to 1; so the gradient sums to zero, too.
    index = classes.unsqueeze(2)
    others = probabilities.unsqueeze(1).expand(-1, classes.shape[1], -1).scatter(2, index, 0.0)
    return (-others).scatter(2, index, others.sum(2, keepdim=True))


TargetFunction = Callable[[Tensor, Tensor], Tensor]
"""A target as a plain function: (logits (N, K), classes (N, T)) -> scores (N, T)."""


def check_target(target: Any) -> Target | TargetFunction:
    """The target itself.

    Raises:
        TypeError: it is neither a `Target` nor a callable, or it is a class instead of an instance.
    """
    if isinstance(target, type):
        raise TypeError(f"target: expected an instance; got the class {target.__name__}; write {target.__name__}()")
    if isinstance(target, Target) or callable(target):
        checked: Target | TargetFunction = target
        return checked
    raise TypeError(
        "target: expected LogitDifference, Finer, Logit, Probability, LogProbability or a function "
        f"(logits, classes) -> scores; got {type(target).__name__}"
    )


def score(target: Target | TargetFunction, logits: Tensor, classes: Tensor) -> Scores:
    """Scores of a target and their gradients; those of a plain function come from autograd.

    Args:
        target: a `Target` or a function ``(logits, classes) -> scores (N, T)``. A function's score of one
            image must depend on the logits of that image alone.
        logits: ``(N, K)``, float32 or float64.
        classes: ``(N, T)``, int64.

    Returns:
        Detached scores.

    Raises:
        TypeError: the function returned no tensor.
        ValueError: its scores have another shape than the classes, or do not depend on the logits.
    """
    logits = logits.detach()
    if isinstance(target, Target):
        found = target.scores(logits, classes)
        if found.delta.dim() != 2 or found.cotangent.shape != (*found.delta.shape, logits.shape[1]):
            raise ValueError(
                f"target: expected delta (N, T) and cotangent (N, T, {logits.shape[1]}); got "
                f"{tuple(found.delta.shape)} and {tuple(found.cotangent.shape)}"
            )
        return found

    with torch.enable_grad():
        leaf = logits.requires_grad_()
        scores = target(leaf, classes)
    if not isinstance(scores, Tensor):
        raise TypeError(f"target: expected the function to return a tensor; got {type(scores).__name__}")
    if scores.shape != classes.shape:
        raise ValueError(
            f"target: expected scores of shape (N, T) = {tuple(classes.shape)}, one per class asked for; "
            f"got {tuple(scores.shape)}"
        )
    # One target at a time: a function's own gradient need not be batchable, and it ends at the logits.
    with torch.enable_grad():
        totals = [column.sum() for column in scores.unbind(1)]
    columns = [
        torch.autograd.grad(total, leaf, retain_graph=True, allow_unused=True)[0] if total.requires_grad else None
        for total in totals
    ]
    rows = [column for column in columns if column is not None]
    if len(rows) < len(columns):
        raise ValueError("target: expected scores that depend on the logits differentiably; these do not")
    return Scores(scores.detach().to(logits.dtype), torch.stack(rows, 1))
