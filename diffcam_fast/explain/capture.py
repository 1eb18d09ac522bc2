"""What layers put out in one forward pass, recorded for autograd from the first of them onwards."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from typing_extensions import Self

# PyTorch numbers hooks without a lock of its own: two threads that hook one module at once could get the same
# number, and one hook would replace the other.
_hooks_lock = threading.Lock()


@dataclass
class Captured:
    """One layer's output."""

    output: Tensor
    """As the layer put it out; whatever the model does to it afterwards is done to a copy."""

    handed_on: Node
    """The node of the autograd graph by which the rest of the model got it."""

    version: int


class LayerHooks(ABC):
    """Forward hooks that belong to one thread and are gone at the end of the `with` block, however it ends.

    Calls of the modules in other threads pass by untouched. Adding and removing hooks does not disturb a
    forward pass that is under way elsewhere: PyTorch takes a copy of a module's hooks before it runs them.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._modules = list(modules)
        self._handles: list[RemovableHandle] = []
        self._thread = 0

    def __enter__(self) -> Self:
        self._thread = threading.get_ident()
        try:
            with _hooks_lock:
                for index, module in enumerate(self._modules):
                    self._handles.append(module.register_forward_hook(self._hook(index), with_kwargs=True))
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._remove()

    def _remove(self) -> None:
        with _hooks_lock:
            for handle in self._handles:
                handle.remove()
        self._handles.clear()

    def _hook(self, index: int) -> Any:
        # PyTorch looks up whether a hook takes keyword arguments when it calls it: in another thread it may find that
        # this hook is gone, and leave them out.
        def hook(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
            if threading.get_ident() != self._thread:
                return None
            kwargs, output = rest
            return self.on_output(index, (*args, *kwargs.values()), output)

        return hook

    @abstractmethod
    def on_output(self, index: int, inputs: tuple[Any, ...], output: Any) -> Any:
        """Take note of an output of module number `index`; what is returned, unless None, replaces it."""


class Capture(LayerHooks):
    """Captures the outputs of layers during one forward pass that runs without recording.

    The first layer reached switches recording on: its output becomes a leaf, so that nothing before it is
    recorded. Grad mode stays on until the caller's context ends. An output that depends on a layer captured
    before keeps its history, so that one pull-back reaches all layers.

    Args:
        layers: names to modules.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__(layers.values())
        self._names = list(layers)
        self._calls = [0] * len(self._names)
        self._captured: list[Captured | None] = [None] * len(self._names)

    def on_output(self, index: int, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
        """Keep the output, hand on a copy."""
        self._calls[index] += 1
        if self._calls[index] > 1:
            return None
        name = self._names[index]
        if not isinstance(output, Tensor):
            raise TypeError(f"layers: expected layer {name!r} to put out a tensor; got {type(output).__name__}")
        if not output.is_floating_point():
            raise TypeError(f"layers: expected layer {name!r} to put out a floating point tensor; got {output.dtype}")
        torch.set_grad_enabled(True)
        kept = output if output.grad_fn is not None else output.detach()
        # An output that shares memory with an input can be changed through that input later on.
        if any(isinstance(tensor, Tensor) and _share_memory(tensor, output) for tensor in inputs):
            kept = kept.clone()
        if kept.grad_fn is None:
            kept.requires_grad_()
        # A copy, because the rest of the model may work in place (a ReLU, a residual sum).
        handed_on = kept.clone()
        assert handed_on.grad_fn is not None
        self._captured[index] = Captured(kept, handed_on.grad_fn, kept._version)
        return handed_on

    def outputs(self) -> dict[str, Captured]:
        """What was captured, by layer.

        Raises:
            ValueError: a layer was not called, or called more than once.
            RuntimeError: the model changed a layer's output through memory that it kept elsewhere.
        """
        found = {}
        for name, calls, captured in zip(self._names, self._calls, self._captured, strict=True):
            if captured is None:
                raise ValueError(
                    f"layers: expected the model to call layer {name!r}; it was not called (its forward "
                    "skips the "
                    "layer, or runs it compiled, scripted or in another thread, where hooks do not reach)"
                )
            if calls > 1:
                raise ValueError(
                    f"layers: expected the model to call layer {name!r} once; it was called {calls} times, "
                    "and a map "
                    "can explain one call alone: choose a layer around it, or give each use a module of its "
                    "own"
                )
            if captured.output._version != captured.version:
                raise RuntimeError(
                    f"layers: the model changed the output of layer {name!r} in place through another reference to it"
                )
            found[name] = captured
        return found


def _share_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
