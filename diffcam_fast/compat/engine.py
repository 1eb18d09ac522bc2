"""What the classes of every other library run on here: one forward pass, one pull-back, nothing left on the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from diffcam_fast.explain.capture import Capture, Captured, LayerHooks, ordinary
from diffcam_fast.explain.evaluation import autocast_off, evaluating
from diffcam_fast.explain.exact_format import Restoring, exact_format
from diffcam_fast.explain.explainer import DEFAULT_MEMORY_BUDGET
from diffcam_fast.explain.graph import Tail
from diffcam_fast.explain.habits import CAUTIOUS, HabitBook, Habits
from diffcam_fast.explain.layers import run_eagerly, unwrapped
from diffcam_fast.explain.memory_format import FasterFormat
from diffcam_fast.explain.pooling import FasterPooling, max_poolings
from diffcam_fast.explain.pull_back import check_differentiable, pull_back
from diffcam_fast.reference.cam import accumulation_dtype

Reshape = Callable[[Any], Tensor]
"""A layer's output as ``(N, C, *positions)``; applied to the gradient as well, so it may select and reorder only."""


@dataclass(frozen=True)
class Cotangent:
    """Scores of logits ``(N, K)``, given by their gradients.

    Attributes:
        values: ``(N, T, K)``, float32 (float64 for float64 logits).
    """

    values: Tensor


@dataclass(frozen=True)
class Chosen:
    """Scores of logits ``(N, K)`` that are logits themselves, or sums of a few of them.

    Attributes:
        classes: ``(N, T)``, or ``(N, T, J)`` for sums of J logits; int64, on the device of the logits.
        factors: ``(N, T, J)`` of each logit in its sum; None where there are no sums.
    """

    classes: Tensor
    factors: Tensor | None = None

    def written_down(self, logits: Tensor) -> Tensor:
        """The cotangents ``(N, T, K)``, in the dtype of the logits."""
        classes = self.classes.unsqueeze(2) if self.factors is None else self.classes
        cotangent = logits.new_zeros((*classes.shape[:2], logits.shape[1]))
        ones = torch.ones_like(classes, dtype=logits.dtype)
        return cotangent.scatter_add_(2, classes, ones if self.factors is None else self.factors.to(logits.dtype))

    def times(self, weight: Tensor) -> Tensor:
        """The cotangents times a weight ``(K, C)``: ``(T, N, C)``."""
        if self.factors is None:
            return torch.embedding(weight, self.classes.T)
        rows = torch.embedding(weight, self.classes)
        return (rows * self.factors.to(weight.dtype).unsqueeze(3)).sum(2).transpose(0, 1)


Score = Callable[[Any], "Chosen | Cotangent | list[Tensor]"]
"""From the model's output to what is pulled back; a list holds T scalars that autograd has recorded."""


@dataclass(frozen=True)
class Record:
    """What one pass found, with nothing recorded for autograd any more.

    Attributes:
        outputs: what the model put out.
        activations: ``(N, C, *positions)`` of each layer, after the reshaping.
        gradients: ``(N, T, C, *positions)`` of each layer, or ``(N, T, C)`` where they are the same at every
            position; None where none were asked for.
    """

    outputs: Any
    activations: list[Tensor]
    gradients: list[Tensor] | None


class Engine:
    """Activations of layers, and gradients with respect to them.

    The model runs in evaluation mode, and is left as it was. Works under `torch.no_grad`, `torch.inference_mode` and
    autocast, and with frozen parameters.

    Args:
        model: any model; images to whatever `Score` understands.
        layers: modules that the model calls once.
        reshape: see `Reshape`.
        as_changed: activations are what the model left of them where it works in place, as libraries have it that do
            not guard against this. Gradients are those of the layer's own output all the same.
    """

    def __init__(
        self, model: nn.Module, layers: Iterable[nn.Module], reshape: Reshape | None = None, *, as_changed: bool = False
    ) -> None:
        self.model = unwrapped(model)
        layers = _as_list(layers)
        self._layers = _named(self.model, layers)
        # A layer that is given twice counts twice.
        names = {id(module): name for name, module in self._layers.items()}
        self._order = [names[id(layer)] for layer in layers]
        self._reshape = reshape
        self._as_changed = as_changed
        self._poolings = max_poolings(self.model)
        self._faster_format = FasterFormat(self.model)
        self._habits: HabitBook[Record] = HabitBook(settled=self._settled_habits)

    def activations(self, images: Tensor) -> Record:
        """One forward pass, of which nothing is recorded."""
        with evaluating(self.model):
            images = ordinary(images)
            if self._as_changed:
                return self._without_gradients(images, CAUTIOUS)[0]
            return self._habits.follow(images, self._without_gradients)

    def gradients(self, images: Tensor, score: Score) -> Record:
        """One forward pass and the pull-back of scores.

        Raises:
            TypeError: a layer does not put out a floating point tensor.
            ValueError: a layer is not called, is called more than once, or the scores do not depend on it.
        """
        with evaluating(self.model):
            images = ordinary(images)
            if self._as_changed:
                return self._attempt(images, score, CAUTIOUS)[0]
            return self._habits.follow(images, lambda given, habits: self._attempt(given, score, habits))

    def _settled_habits(self, images: Tensor) -> Habits | None:
        # Another order in memory must not round otherwise than the original does.
        faster = self._faster_format(images)
        restored = None if faster is None else exact_format(self.model, self._layers.values(), images)
        return None if restored is None else replace(CAUTIOUS, memory_format=faster, restored=restored)

    def _without_gradients(self, images: Tensor, habits: Habits) -> tuple[Record, Habits]:
        hooks = _Outputs(self._layers, self._reshape, self._as_changed)
        with FasterPooling(self._poolings), Restoring(habits.restored), hooks:
            outputs = run_eagerly(self.model, images)
        found = hooks.found()
        return Record(outputs, [found[name] for name in self._order], None), habits

    def _attempt(self, images: Tensor, score: Score, habits: Habits) -> tuple[Record, Habits]:
        capture = Capture(self._layers, habits.untouched, inference=habits.inference)
        with FasterPooling(self._poolings), Restoring(habits.restored), capture:
            outputs = run_eagerly(self.model, images)
        captured = capture.outputs()
        torch._C._set_grad_enabled(False)  # `evaluating` puts it back
        with autocast_off(images.device.type):
            with torch.enable_grad():
                wanted = score(outputs)
            if isinstance(wanted, list):
                found = self._from_scalars(wanted, captured)
            else:
                found, habits = self._from_logits(outputs, wanted, captured, habits)
            gradients = {name: self._reshaped_gradient(gradient) for name, gradient in found.items()}
            activations = {name: self._activations(layer) for name, layer in captured.items()}
        record = Record(
            detached(outputs),
            [activations[name] for name in self._order],
            [gradients[name] for name in self._order],
        )
        return record, habits.after(captured)

    def _activations(self, layer: Captured) -> Tensor:
        left = layer.handed_on.detach()
        own = layer.output.detach()
        if self._reshape is None:
            return left if self._as_changed and left.device.type == "cpu" else own
        reshaped = self._reshape(left)
        # What a reshaping copied was safe from what followed.
        if self._as_changed and left.device.type == "cpu" and _share_memory(reshaped, left):
            return reshaped
        return self._reshape(own)

    def _from_logits(
        self, logits: Tensor, wanted: Chosen | Cotangent, captured: Mapping[str, Captured], habits: Habits
    ) -> tuple[dict[str, Tensor], Habits]:
        check_differentiable(logits, list(captured))
        wide = logits
        if logits.dtype != accumulation_dtype(logits.dtype):
            with torch.enable_grad():
                wide = logits.to(accumulation_dtype(logits.dtype))
        tail = Tail(wide, captured)
        found, habits = self._from_head(tail, wanted, habits)
        if found is not None:
            return found, habits
        cotangents = wanted.written_down(wide) if isinstance(wanted, Chosen) else wanted.values.to(wide.dtype)
        # Target by target: not every operator's backward can be batched, and there are few.
        parts = list(
            pull_back(
                tail,
                cotangents,
                chunk_size=1,
                memory_budget=DEFAULT_MEMORY_BUDGET,
                pooled=self._reshape is None,
                last=True,
            )
        )
        if len(parts) == 1:
            return parts[0], habits
        return {name: torch.cat([part[name] for part in parts]) for name in captured}, habits

    def _from_head(
        self, tail: Tail, wanted: Chosen | Cotangent, habits: Habits
    ) -> tuple[dict[str, Tensor] | None, Habits]:
        """By the head's weight, where the logits are one linear layer of means over positions; None elsewhere."""
        if self._reshape is not None or self._as_changed or habits.linear_head is False or len(tail.captured) != 1:
            return None, habits
        ((name, layer),) = tail.captured.items()
        weight = tail.head_weight(name, without_hooks=True)
        if weight is None or len(tail.logits) == 0:
            return None, habits
        if habits.linear_head is None:
            habits = habits.with_head(tail.is_head(name, weight))
            if not habits.linear_head:
                return None, habits
        weight = weight.to(tail.logits.dtype)
        if isinstance(wanted, Chosen):
            pooled = wanted.times(weight)
        else:
            pooled = torch.matmul(wanted.values.to(weight.dtype).transpose(0, 1), weight)
        return {name: pooled.div_(tail.pools[name].positions).to(layer.output.dtype)}, habits

    def _from_scalars(self, scores: Sequence[Tensor], captured: Mapping[str, Captured]) -> dict[str, Tensor]:
        edges = [layer.edge for layer in captured.values()]
        found: dict[str, list[Tensor]] = {name: [] for name in captured}
        for number, one in enumerate(scores):
            last = number + 1 == len(scores)
            for name, gradient in zip(
                captured, torch.autograd.grad(one, edges, retain_graph=not last, allow_unused=True), strict=True
            ):
                if gradient is None:
                    raise ValueError(f"target_layers: the targets do not depend on layer {name!r}")
                found[name].append(gradient)
        return {name: torch.stack(gradients) for name, gradients in found.items()}

    def _reshaped_gradient(self, gradient: Tensor) -> Tensor:
        """(T, N, ...) as (N, T, ...)."""
        if self._reshape is not None:
            flat = self._reshape(gradient.flatten(0, 1))
            gradient = flat.reshape(*gradient.shape[:2], *flat.shape[1:])
        return gradient.transpose(0, 1)


class _Outputs(LayerHooks):
    """Outputs of layers, which may be anything before the reshaping."""

    def __init__(self, layers: Mapping[str, nn.Module], reshape: Reshape | None, as_changed: bool) -> None:
        super().__init__(layers.values())
        self._names = list(layers)
        self._reshape = reshape
        self._as_changed = as_changed
        self._found: dict[str, Tensor] = {}
        self._calls = dict.fromkeys(self._names, 0)

    def on_output(self, index: int, inputs: tuple[Any, ...], output: Any) -> None:
        name = self._names[index]
        self._calls[name] += 1
        activations = output if self._reshape is None else self._reshape(output)
        if not isinstance(activations, Tensor):
            raise TypeError(f"target_layers: expected layer {name!r} to put out a tensor; got {type(output).__name__}")
        # A copy, because the rest of the model may work in place. Libraries that do not guard against this are safe
        # on another device, from which they copy everything.
        keep = self._as_changed and activations.device.type == "cpu"
        self._found[name] = activations.detach() if keep else activations.detach().clone()

    def found(self) -> dict[str, Tensor]:
        for name, calls in self._calls.items():
            if calls != 1:
                raise ValueError(f"target_layers: expected the model to call layer {name!r} once; it did {calls} times")
        return self._found


def detached(outputs: Any) -> Any:
    """The same, without autograd's record: in a tensor, and in lists, tuples and dictionaries of tensors."""
    if isinstance(outputs, Tensor):
        return outputs.detach()
    if type(outputs) in (list, tuple):
        return type(outputs)(detached(output) for output in outputs)
    if type(outputs) is dict:
        return {key: detached(output) for key, output in outputs.items()}
    return outputs


def full_gradient(gradient: Tensor, activations: Tensor) -> Tensor:
    """Gradients ``(N, T, C)`` or ``(N, T, C, *positions)`` as the latter; nothing is copied."""
    if gradient.dim() == activations.dim() + 1:
        return gradient
    shape = gradient.shape
    positions = activations.shape[2:]
    return gradient.reshape(*shape, *(1 for _ in positions)).expand(*shape, *positions)


def _as_list(layers: Any) -> list[Any]:
    # nn.Sequential and nn.ModuleList stand for the modules in them.
    if not isinstance(layers, Iterable):
        raise TypeError(f"target_layers: expected a list of modules; got {type(layers).__name__}")
    found = list(layers)
    if not found:
        raise ValueError("target_layers: expected at least one module; got none")
    return found


def _named(model: nn.Module, layers: Sequence[Any]) -> dict[str, nn.Module]:
    known = {id(module): name for name, module in model.named_modules()}
    found: dict[str, nn.Module] = {}
    for number, layer in enumerate(layers):
        if not isinstance(layer, nn.Module):
            raise TypeError(f"target_layers: expected modules; got {type(layer).__name__}")
        if all(layer is not other for other in found.values()):
            found[known.get(id(layer)) or f"number {number}"] = layer
    return found


def _share_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
