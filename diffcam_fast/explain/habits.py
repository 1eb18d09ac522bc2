"""What a first explanation learns about a model, so that the next ones need not guard against it.

The first pass over images of a shape takes every precaution: its trunk runs as under `torch.no_grad`, so that what
the model computes once and keeps is an ordinary tensor, and the model gets copies of the layers' outputs, which it
may change. The passes that follow leave out what turned out not to be needed, and notice when it is needed after
all: then the pass is done again with every precaution, from the same state of the random number generators, and
the explainer takes no more chances with this model.

Where another order in memory promises to be faster, the very first pass is done in both, and the other order is kept to
if nothing but rounding tells the results apart: a model may depend on an order without saying so. Where not even
rounding may differ, finding out takes longer, and waits until there were some passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor

from diffcam_fast.explain.capture import Captured
from diffcam_fast.explain.evaluation import autocast_dtype
from diffcam_fast.explain.exact_format import NOWHERE, Restored

if TYPE_CHECKING:
    from collections.abc import Hashable

Result = TypeVar("Result")

SETTLING = 8
"""Passes over images of a kind after which it pays to look for better habits: what takes several passes itself must not
be done for images that do not come again."""

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
        memory_format: the order in memory that the images are handed to the model in; None: as they come.
        restored: where images in that order become contiguous again.
    """

    inference: bool = False
    untouched: frozenset[str] = frozenset()
    linear_head: bool | None = None
    memory_format: torch.memory_format | None = None
    restored: Restored = NOWHERE

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


class HabitBook(Generic[Result]):
    """The habits of one explainer, by what the images look like.

    Args:
        faster_format: the order in memory that a model is faster on; None where that is the images' own. None: images
            stay as they are.
        agree: whether two results of the same images could be one, rounded in two ways; needed with `faster_format`.
        settled: the habits of passes over images of a kind of which there were some; asked once, after `SETTLING` of
            them. None: they stay as they are.
    """

    def __init__(
        self,
        faster_format: Callable[[Tensor], torch.memory_format | None] | None = None,
        agree: Callable[[Result, Result], bool] | None = None,
        settled: Callable[[Tensor], Habits | None] | None = None,
    ) -> None:
        self._known: dict[Hashable, Habits] = {}
        self._cautious = False
        self._faster_format = faster_format
        self._agree = agree
        self._settled = settled
        # Passes so far, of images whose habits may change yet.
        self._passes: dict[Hashable, int] = {}
        # Whether the model gives the same in another order; None: not tried.
        self._any_format: bool | None = None

    def follow(self, images: Tensor, attempt: Callable[[Tensor, Habits], tuple[Result, Habits]]) -> Result:
        """Do a pass by the habits known for such images; again with every precaution where that fails.

        Args:
            images: what the pass is over.
            attempt: does the pass over them, in whatever order in memory it is handed them; returns its result, and
                the habits for the next one.
        """
        cast = autocast_dtype(images.device.type)
        signature = images.shape, images.stride(), images.dtype, images.device, cast, torch.get_num_threads()
        habits = known = self._known.get(signature)
        if self._cautious:
            result, learned = attempt(images, CAUTIOUS if habits is None else _cautious(habits))
            self._learn(signature, learned)
            return result
        if habits is None:
            faster = None if self._faster_format is None else self._faster_format(images)
            if faster is None or self._any_format is False:
                result, learned = attempt(images, CAUTIOUS)
                self._learn(signature, learned)
                return result
            if self._any_format is None:
                return self._try_format(images, attempt, signature, faster)
            habits = replace(CAUTIOUS, memory_format=faster)
        if self._passes:
            habits = self._settle(signature, images) or habits
        random = _random_state(images.device)
        try:
            result, learned = attempt(_ordered(images, habits), habits)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            pass
        else:
            if learned is not known:
                self._learn(signature, learned)
            return result
        _restore_random_state(images.device, random)
        result, _ = attempt(images, _cautious(habits))
        self._cautious = True
        return result

    def _settle(self, signature: Hashable, images: Tensor) -> Habits | None:
        passes = self._passes.get(signature)
        if passes is None or self._settled is None:
            return None
        self._passes[signature] = passes + 1
        if passes + 1 < SETTLING:
            return None
        self._passes.pop(signature, None)
        return self._settled(images)

    def _try_format(
        self,
        images: Tensor,
        attempt: Callable[[Tensor, Habits], tuple[Result, Habits]],
        signature: Hashable,
        faster: torch.memory_format,
    ) -> Result:
        """The first pass, and the same once more in another order, which is kept to if the results agree."""
        assert self._agree is not None
        random = _random_state(images.device)
        result, learned = attempt(images, CAUTIOUS)
        after = _random_state(images.device)
        # A model that drew nothing will not now; other threads may draw meanwhile, and must not be set back.
        drawn = not _same_random_state(random, after)
        if drawn:
            _restore_random_state(images.device, random)
        tried = replace(CAUTIOUS, linear_head=learned.linear_head, memory_format=faster)
        try:
            again, learned_again = attempt(_ordered(images, tried), tried)
            self._any_format = self._agree(again, result)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever it is, the images' own order does without it
            self._any_format = False
        finally:
            if drawn:
                _restore_random_state(images.device, after)
        if self._any_format:
            result, learned = again, learned_again
        self._learn(signature, learned)
        return result

    def _learn(self, signature: Hashable, habits: Habits) -> None:
        if len(self._known) >= _SIGNATURES:
            self._known.clear()
            self._passes.clear()
        if self._settled is not None and signature not in self._known:
            self._passes[signature] = 0
        self._known[signature] = habits


def _cautious(habits: Habits) -> Habits:
    return replace(CAUTIOUS, linear_head=habits.linear_head)


def _ordered(images: Tensor, habits: Habits) -> Tensor:
    return images if habits.memory_format is None else images.contiguous(memory_format=habits.memory_format)


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" and not capturing else None
    return torch.get_rng_state(), on_device


def _same_random_state(one: tuple[Tensor, Tensor | None], other: tuple[Tensor, Tensor | None]) -> bool:
    return all(
        a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in zip(one, other, strict=True)
    )


def _restore_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
