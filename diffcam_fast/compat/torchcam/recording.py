"""The user's own forward pass, recorded from the explained layers on, whatever mode it runs in."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from diffcam_fast.explain.capture import ordinary

# Of outputs that were given to the user without their history: those that have it. For all extractors of a model at
# once, because only the first of them that a pass comes to switches recording on.
_histories = WeakIdKeyDictionary()

# Modes that were left for a model's sake. Where a pass ends without a word (KeyboardInterrupt), they stay here: on its
# way out of memory, such a mode would be entered once more.
_open: set[torch.inference_mode] = set()


class Recorded(NamedTuple):
    """One layer's output.

    Attributes:
        output: what the rest of the model got.
        edge: where the gradient with respect to the layer's output arrives; nothing that is done to `output` in place
            moves it.
        shape: of the layer's output.
    """

    output: Tensor
    edge: GradientEdge
    shape: torch.Size


class Pass:
    """One call of the model.

    Where its caller has switched gradients off, they are on from the first explained layer to the end of the call,
    and the caller gets outputs without history; `with_history` finds it again.

    Args:
        keep_history: the caller is to get it all the same.
    """

    def __init__(self, *, keep_history: bool = False) -> None:
        self._keep_history = keep_history
        self._gradients = torch.is_grad_enabled()
        self._inference = torch.is_inference_mode_enabled()
        self._mode: torch.inference_mode | None = None
        self._recording = False
        self._made_leaves = False

    def enter_layer(self) -> None:
        """Record what follows, if the caller does not."""
        self._made_leaves = True
        if self._gradients or self._recording:
            return
        if self._inference:
            self._mode = torch.inference_mode(False)
            _open.add(self._mode)
            self._mode.__enter__()
        torch.set_grad_enabled(True)
        self._recording = True

    def end(self, model: nn.Module, inputs: Iterable[Any], output: Any) -> Any:
        """What the caller gets: None for what the model put out."""
        if self._recording:
            if self._mode is not None:
                _open.discard(self._mode)
                self._mode.__exit__(None, None, None)
            torch.set_grad_enabled(self._gradients)
            return None if self._keep_history else _without_history(output)
        if self._made_leaves and not _anything_requires_grad(model, inputs):
            return _without_history(output)
        return None


def record(
    output: Any, current: Pass | None, name: str, *, as_changed: bool = False
) -> tuple[Recorded | None, Tensor | None]:
    """Take note of a layer's output.

    Args:
        output: what the layer put out.
        current: the call of the model, where it was called as a whole.
        name: the layer's.
        as_changed: the gradient will be taken with respect to what the model leaves of the output in the end.

    Returns:
        The record, None where gradients are off for good; and what the model is to go on with instead, or None.

    Raises:
        TypeError: the output is not a floating point tensor.
    """
    if not isinstance(output, Tensor) or not output.is_floating_point():
        got = output.dtype if isinstance(output, Tensor) else type(output).__name__
        raise TypeError(f"target_layer: expected layer {name!r} to put out a floating point tensor; got {got}")
    if torch.is_grad_enabled() and output.requires_grad:
        edge = edge_of(output)
        if as_changed or not output._is_view():
            return Recorded(output, edge, output.shape), None
        # Something done in place to a view gives it another history, which would not pass the edge.
        handed_on = output.clone()
        return Recorded(handed_on, edge, output.shape), handed_on
    if current is not None:
        current.enter_layer()
    elif not torch.is_grad_enabled():
        return None, None
    if torch.is_inference_mode_enabled():
        return None, None
    with nullcontext() if torch.is_grad_enabled() else torch.enable_grad():
        # A leaf must not be changed in place.
        handed_on = ordinary(output).requires_grad_().clone()
    return Recorded(handed_on, edge_of(handed_on), output.shape), handed_on


def edge_of(tensor: Tensor) -> GradientEdge:
    """Where the gradient with respect to a tensor arrives."""
    node = tensor.grad_fn
    # What get_gradient_edge() does besides takes its time, and is for other nodes.
    if node is None or isinstance(node, torch._C._FunctionBase):
        return get_gradient_edge(tensor)
    return GradientEdge(node, tensor.output_nr)


def ordinary_mode() -> AbstractContextManager[Any]:
    """Within, autograd records, unless gradients are switched off; also where inference mode is on."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def with_history(outputs: Any) -> Any:
    """Outputs as they were recorded: in place of those that `Pass` gave to the user."""
    if not _histories:
        return outputs
    if isinstance(outputs, Tensor):
        return _histories.get(outputs, outputs)
    return tree_map_only(Tensor, lambda tensor: _histories.get(tensor, tensor), outputs)


def _without_history(outputs: Any) -> Any:
    def shown(tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        found = tensor.detach()
        _histories[found] = tensor
        return found

    if isinstance(outputs, Tensor):
        return shown(outputs)
    return tree_map_only(Tensor, shown, outputs)


def _anything_requires_grad(model: nn.Module, inputs: Iterable[Any]) -> bool:
    given = (leaf for leaf in tree_leaves(list(inputs)) if isinstance(leaf, Tensor))
    return any(tensor.requires_grad for tensor in given) or any(p.requires_grad for p in model.parameters())
