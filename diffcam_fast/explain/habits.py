"""What a first explanation learns about a model, so that the next ones need not guard against it.

The first pass over images of a shape takes every precaution: its trunk runs as under `torch.no_grad`, so that what
the model computes once and keeps is an ordinary tensor, and the model gets copies of the layers' outputs, which it
may change. The passes that follow leave out what turned out not to be needed, and notice when it is needed after
all: then the pass is done again with every precaution, from the same state of the random number generators, and
the explainer takes no more chances with this model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from diffcam_fast.explain.capture import Captured
from diffcam_fast.explain.evaluation import autocast_dtype

if TYPE_CHECKING:
    from collections.abc import Hashable

Result = TypeVar("Result")

# More shapes than a service sees; each takes some hundred bytes.
_SIGNATURES = 256


@dataclass(frozen=True)
class Habits:
    """How one pass is done.

    Attributes:
        inference: the trunk runs as under `torch.inference_mode`.
        untouched: layers whose outputs the model does not change in place; it gets no copies of them.
        linear_head: whether autograd agreed with the head's weight, where the graph shows a linear head; None: not
            known.
    """

    inference: bool = False
    untouched: frozenset[str] = frozenset()
    linear_head: bool | None = None

    def with_head(self, linear: bool) -> Habits:
        """The same, knowing about the head."""
        return replace(self, linear_head=linear)

    def after(self, captured: Mapping[str, Captured]) -> Habits:
        """What the next pass can do, as far as this one shows."""
        if self.inference:
            return self
        untouched = frozenset(name for name, layer in captured.items() if layer.untouched)
        return replace(self, inference=True, untouched=untouched)


CAUTIOUS = Habits()


class HabitBook:
    """The habits of one explainer, by what the images look like."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Habits] = {}
        self._cautious = False

    def follow(self, images: Tensor, attempt: Callable[[Habits], tuple[Result, Habits]]) -> Result:
        """Do a pass by the habits known for such images; again with every precaution where that fails.

        Args:
            images: what the pass is over.
            attempt: does the pass; returns its result, and the habits for the next one.
        """
        cast = autocast_dtype(images.device.type)
        signature = images.shape, images.stride(), images.dtype, images.device, cast
        habits = self._known.get(signature)
        if habits is None or self._cautious:
            result, learned = attempt(CAUTIOUS if habits is None else replace(CAUTIOUS, linear_head=habits.linear_head))
            self._learn(signature, learned)
            return result
        random = _random_state(images.device)
        try:
            result, learned = attempt(habits)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            pass
        else:
            if learned is not habits:
                self._learn(signature, learned)
            return result
        _restore_random_state(images.device, random)
        result, _ = attempt(replace(CAUTIOUS, linear_head=habits.linear_head))
        self._cautious = True
        return result

    def _learn(self, signature: Hashable, habits: Habits) -> None:
        if len(self._known) >= _SIGNATURES:
            self._known.clear()
        self._known[signature] = habits


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" and not capturing else None
    return torch.get_rng_state(), on_device


def _restore_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
