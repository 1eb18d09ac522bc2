"""What layers put out in one forward pass, recorded for autograd from the first of them onwards."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks
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
    """As the layer put it out; where the model changes it afterwards, it changes a copy."""

    handed_on: Tensor
    """What the rest of the model got: `output` itself or a copy."""

    edges: tuple[GradientEdge | None, GradientEdge | None]
    """Of both, before anything was done to them in place; None for a leaf of the graph, whose edge stays the same."""

    versions: tuple[int, int]

    aliased: bool
    """The layer put out memory of its input, which the model may change by that name; `output` is a copy of it."""

    @property
    def edge(self) -> GradientEdge:
        """Where the gradient with respect to `output` arrives."""
        # A leaf has to be asked in a way that costs as much as an operator: only where somebody wants to know.
        return self.edges[0] or get_gradient_edge(self.output)

    @property
    def used(self) -> GradientEdge:
        """Where the rest of the model meets the layer: the edge of `handed_on`."""
        return self.edges[1] or get_gradient_edge(self.handed_on)

    @property
    def is_leaf(self) -> bool:
        """Whether the rest of the model got a leaf of the graph."""
        return self.edges[1] is None

    @property
    def untouched(self) -> bool:
        """Whether the model left alone what it was handed, so that it need not get a copy."""
        return (self.output._version, self.handed_on._version) == self.versions


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
        if not self._modules:
            return self
        try:
            with _hooks_lock:
                for index, module in enumerate(self._modules):
                    self._register(index, module)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._remove()

    def _register(self, index: int, module: nn.Module) -> None:
        self._handles.append(module.register_forward_hook(self._output_hook(index), with_kwargs=True))

    def _remove(self) -> None:
        if not self._handles:
            return
        with _hooks_lock:
            for handle in self._handles:
                handle.remove()
        self._handles.clear()

    def _output_hook(self, index: int) -> Any:
        # PyTorch looks up whether a hook takes keyword arguments when it calls it: in another thread it may find that
        # this hook is gone, and leave them out.
        def hook(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
            if self._passes_by():
                return None
            kwargs, output = rest
            return self.on_output(index, (*args, *kwargs.values()), output)

        return hook

    def _input_hook(self, index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
            return None if self._passes_by() else self.on_input(index, args)

        return hook

    def _passes_by(self) -> bool:
        # What a model compiles while it is explained is there when the hooks are gone.
        return torch.compiler.is_compiling() or threading.get_ident() != self._thread

    def on_input(self, index: int, inputs: tuple[Any, ...]) -> Any:
        """What module number `index` is called with instead, unless None; for those that register such hooks."""
        return None

    @abstractmethod
    def on_output(self, index: int, inputs: tuple[Any, ...], output: Any) -> Any:
        """Take note of an output of module number `index`; what is returned, unless None, replaces it."""


class Capture(LayerHooks):
    """Captures the outputs of layers during one forward pass whose trunk is not recorded.

    The trunk is what runs before the first layer is reached. That layer switches recording on: its output becomes
    a leaf, so that nothing before it is recorded. Recording stays on until the end of the `with` block. An output
    that depends on a layer captured before keeps its history, so that one pull-back reaches all layers.

    Args:
        layers: names to modules.
        untouched: names of layers whose outputs the model does not change in place, as far as is known: they are
            handed on as they are, and checked afterwards. The model gets copies of all others.
        inference: whether the trunk runs as under `torch.inference_mode`, at less cost for each operator. A model
            that differentiates within its trunk then fails, instead of finding no gradients there.
    """

    def __init__(
        self, layers: Mapping[str, nn.Module], untouched: Collection[str] = (), *, inference: bool = False
    ) -> None:
        super().__init__(layers.values())
        self._names = list(layers)
        self._untouched = untouched
        self._inference = inference
        self._trunk: tuple[torch.inference_mode, saved_tensors_hooks] | None = None
        self._refusing = False
        self._recording: torch.inference_mode | None = None
        self._calls = [0] * len(self._names)
        self._captured: list[Captured | None] = [None] * len(self._names)

    def __enter__(self) -> Self:
        super().__enter__()
        if self._inference:
            # PyTorch refuses to differentiate functionally while such hooks are there, and calls them for the rest;
            # without them functional gradients would be zeros, and nobody would know.
            self._trunk = torch.inference_mode(), saved_tensors_hooks(_refuse, _refuse)
            for mode in self._trunk:
                mode.__enter__()
            self._refusing = True
        return self

    def __exit__(self, *exception: object) -> None:
        if self._trunk is not None:
            self._stop_refusing()
            if self._recording is not None:
                self._recording.__exit__(None, None, None)
                self._recording = None
            self._trunk[0].__exit__(None, None, None)
            self._trunk = None
        super().__exit__(*exception)

    def _stop_refusing(self) -> None:
        if self._trunk is not None and self._refusing:
            self._trunk[1].__exit__()
            self._refusing = False

    def _record(self) -> None:
        if torch.is_inference_mode_enabled() and self._recording is None and self._trunk is not None:
            self._recording = torch.inference_mode(False)
            self._recording.__enter__()
        self._stop_refusing()
        torch._C._set_grad_enabled(True)

    def on_output(self, index: int, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
        """Keep the output, hand on a copy or the output itself."""
        self._calls[index] += 1
        if self._calls[index] > 1:
            return None
        name = self._names[index]
        if not isinstance(output, Tensor):
            raise TypeError(f"layers: expected layer {name!r} to put out a tensor; got {type(output).__name__}")
        if not output.is_floating_point():
            raise TypeError(f"layers: expected layer {name!r} to put out a floating point tensor; got {output.dtype}")
        self._record()
        kept = output if output.requires_grad else ordinary(output)
        untouched = name in self._untouched
        # The model may change memory of the layer's input by that name, too. Where it is of inference mode PyTorch
        # refuses to, from here on.
        guarded = untouched and output.is_inference()
        aliased = not guarded and any(isinstance(t, Tensor) and _share_memory(t, output) for t in inputs)
        if aliased:
            kept = kept.clone()
        edge = None
        if kept.requires_grad:
            edge = get_gradient_edge(kept)
        else:
            kept.requires_grad_()
        handed_on, used = kept, edge
        if not untouched:
            # A copy, because the rest of the model may work in place (a ReLU, a residual sum).
            handed_on = kept.clone()
            used = get_gradient_edge(handed_on)
        versions = kept._version, handed_on._version
        self._captured[index] = Captured(kept, handed_on, (edge, used), versions, aliased)
        return None if handed_on is output else handed_on

    def outputs(self) -> dict[str, Captured]:
        """What was captured, by layer.

        Raises:
            ValueError: a layer was not called, or called more than once.
            RuntimeError: the model changed a layer's output through memory that it kept elsewhere, or one that it
                was not known to change.
        """
        found = {}
        for name, calls, captured in zip(self._names, self._calls, self._captured, strict=True):
            if captured is None:
                raise ValueError(
                    f"layers: expected the model to call layer {name!r}; it was not called (its forward skips the "
                    "layer, or runs it compiled, scripted or in another thread, where hooks do not reach)"
                )
            if calls > 1:
                raise ValueError(
                    f"layers: expected the model to call layer {name!r} once; it was called {calls} times, and a map "
                    "can explain one call alone: choose a layer around it, or give each use a module of its own"
                )
            if captured.output._version != captured.versions[0]:
                raise RuntimeError(
                    f"layers: the model changed the output of layer {name!r} in place through another reference to it"
                )
            found[name] = captured
        return found


def ordinary(tensor: Tensor) -> Tensor:
    """A tensor over the same memory that autograd can work with, whether or not it was made in inference mode."""
    if not tensor.is_inference():
        return tensor.detach()
    if type(tensor) is not Tensor or tensor.layout != torch.strided:
        return tensor.clone()
    alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def _refuse(tensor: Tensor) -> Tensor:
    raise RuntimeError("layers: the model differentiates before the first explained layer is reached")


def _share_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
