"""What the last call found, under the names that pytorch-grad-cam has for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from diffcam_fast.compat.engine import Record, Reshape, full_gradient


class Recorded:
    """The `activations_and_grads` of a class: tensors on the CPU, moved there when they are asked for.

    Attributes:
        model: as given.
        reshape_transform: as given.
        detach: as given.
        handles: hooks that stand between calls; none, unless this object itself was called.
    """

    def __init__(
        self, model: nn.Module, target_layers: Sequence[nn.Module], reshape_transform: Reshape | None, detach: bool
    ) -> None:
        self.model = model
        self.reshape_transform = reshape_transform
        self.detach = detach
        self.handles: list[RemovableHandle] = []
        self._layers = target_layers
        self._activations: list[Tensor] = []
        self._gradients: list[Tensor] = []
        self._taken: tuple[Record, int | None] | None = None

    @property
    def activations(self) -> list[Tensor]:
        """``(N, C, *positions)`` of each layer, after the reshaping."""
        if self.detach:
            self._activations = [activations.cpu() for activations in self._activations]
        return self._activations

    @property
    def gradients(self) -> list[Tensor]:
        """The same shapes; ``(N, T, C, *positions)`` for several targets an image."""
        if self._taken is not None:
            self._gradients = _gradients_of(*self._taken)
            self._taken = None
        if self.detach:
            self._gradients = [gradients.cpu() for gradients in self._gradients]
        return self._gradients

    def take(self, record: Record, target: int | None = None) -> None:
        """Show a record; of several targets one, or None for all."""
        self._activations = record.activations
        # Most callers look at the maps alone.
        self._taken = record, target

    def __call__(self, x: Any) -> Any:
        """Run the model, recorded by autograd as a whole; gradients come with the caller's own backward pass.

        For classes that replace `forward`. The hooks stay until the next call or `release`.
        """
        self.release()
        for layer in self._layers:
            self.handles.append(layer.register_forward_hook(self._on_output))
        return self.model(x)

    def clear(self) -> None:
        """Let go of the tensors."""
        self._activations, self._gradients, self._taken = [], [], None

    def release(self) -> None:
        """Let go of the tensors, and remove the hooks."""
        self.clear()
        self.release_hooks()

    def release_hooks(self) -> None:
        """Remove the hooks, and keep the tensors."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def _on_output(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        self._activations.append(self._shown(output))
        if not isinstance(output, Tensor) or not output.requires_grad:
            return None
        output.register_hook(self._on_gradient)
        # A copy: the rest of the model may work in place.
        return output.clone()

    def _on_gradient(self, gradient: Tensor) -> None:
        # A backward pass comes to the last layer first.
        self._gradients.insert(0, self._shown(gradient))

    def _shown(self, value: Any) -> Tensor:
        if not self.detach:
            shown: Tensor = value
            return shown
        with torch.no_grad():
            return (value if self.reshape_transform is None else self.reshape_transform(value)).detach()


def _gradients_of(record: Record, target: int | None) -> list[Tensor]:
    found = []
    for activations, gradients in zip(record.activations, record.gradients or [], strict=False):
        full = full_gradient(gradients, activations)
        found.append(full[:, target or 0] if target is not None or full.shape[1] == 1 else full)
    return found
