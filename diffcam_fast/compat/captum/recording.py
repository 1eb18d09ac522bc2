"""What goes into or comes out of a layer in one forward pass, and where its gradient arrives."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from diffcam_fast.compat.captum.refusals import InvalidType, InvalidValue
from diffcam_fast.explain.capture import LayerHooks, ordinary


@dataclass(frozen=True)
class Recorded:
    """One tensor.

    Attributes:
        values: what the layer put out or was given.
        where: where its gradient arrives.
    """

    values: Tensor
    where: GradientEdge | Tensor


class Recording(LayerHooks):
    """Takes note of a layer's last call in one thread's forward pass; the model goes on with copies.

    Args:
        layer: a module.
        of_input: note what the layer is given, not what it puts out.
        history: whether the pass is recorded for autograd from its start. Otherwise it is from the layer's output on,
            which becomes a leaf.
        as_captum: values are what the model makes of them by another name, as in captum.
    """

    def __init__(self, layer: nn.Module, *, of_input: bool, history: bool, as_captum: bool) -> None:
        super().__init__([layer])
        self._of_input = of_input
        self._history = history
        self._as_captum = as_captum
        self._flagged: list[Tensor] = []
        self._found: list[Recorded] = []
        self._versions: list[tuple[Tensor, int]] = []

    def _register(self, index: int, module: nn.Module) -> None:
        if self._of_input:
            self._handles.append(module.register_forward_pre_hook(self._input_hook(index)))
        else:
            super()._register(index, module)

    def on_input(self, index: int, inputs: tuple[Any, ...]) -> Any:
        """Take note of what the layer is given, hand on a copy."""
        return self._note(inputs, inputs)

    def on_output(self, index: int, inputs: tuple[Any, ...], output: Any) -> Any:
        """Take note of what the layer puts out, hand on a copy."""
        return self._note(output, inputs)

    def _note(self, given: Any, inputs: tuple[Any, ...]) -> Any:
        tensors = _checked(given, "inputs" if self._of_input else "output")
        torch.set_grad_enabled(True)
        note = self._note_in_history if self._history else self._note_leaf
        memory = {tensor.untyped_storage().data_ptr() for tensor in inputs if isinstance(tensor, Tensor)}
        noted = [note(tensor, tensor.untyped_storage().data_ptr() in memory) for tensor in tensors]
        self._found = [recorded for recorded, _ in noted]
        copies = [handed_on for _, handed_on in noted]
        if not isinstance(given, tuple | list):
            return copies[0]
        return given._make(copies) if hasattr(given, "_make") else type(given)(copies)

    def _note_leaf(self, tensor: Tensor, aliased: bool) -> tuple[Recorded, Tensor]:
        if aliased:
            raise RuntimeError("layer: it hands on memory of its inputs, which the model may use by another name")
        kept = tensor if tensor.requires_grad else ordinary(tensor).requires_grad_()
        self._versions.append((tensor, tensor._version))
        return Recorded(kept, kept), kept.clone()

    def _note_in_history(self, tensor: Tensor, aliased: bool) -> tuple[Recorded, Tensor]:
        if not tensor.requires_grad:
            tensor.requires_grad_()
            self._flagged.append(tensor)
        if self._as_captum:
            return Recorded(tensor, tensor), tensor.clone()
        return Recorded(tensor.clone(), get_gradient_edge(tensor)), tensor.clone()

    def outcome(self) -> list[Recorded]:
        """What was noted, once the model is through.

        Raises:
            InvalidValue: the model did not call the layer.
            RuntimeError: it changed in place, by another name, what was noted without history.
        """
        if not self._found:
            raise InvalidValue(
                "layer: expected forward_func to call it; it did not, or where hooks do not reach (in compiled or "
                "scripted code, in another thread)"
            )
        if any(tensor._version != version for tensor, version in self._versions):
            raise RuntimeError("layer: the model changed its output in place through another reference to it")
        return self._found

    def put_back_flags(self) -> None:
        """Undo what made tensors of the user's leaves."""
        for tensor in self._flagged:
            if tensor.is_leaf:
                tensor.requires_grad_(False)


def _checked(given: Any, what: str) -> Iterable[Tensor]:
    tensors = list(given) if isinstance(given, tuple | list) else [given]
    if not tensors:
        raise InvalidValue(f"layer: expected {what} with at least one tensor; got none")
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise InvalidType(f"layer: expected tensors as its {what}; got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise InvalidType(f"layer: expected floating point tensors as its {what}; got {tensor.dtype}")
    return tensors
