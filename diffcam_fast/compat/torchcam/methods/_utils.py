"""The layer that is explained where none is named."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffcam_fast.compat.originals import attribute
from diffcam_fast.explain.capture import LayerHooks
from diffcam_fast.explain.evaluation import evaluating

__all__ = ["locate_candidate_layer"]


def locate_candidate_layer(mod: nn.Module, input_shape: tuple[int, ...] = (3, 224, 224)) -> str | None:
    """The module that is the last to put out something with the dimensions of the input and more than one position.

    The model is run once on zeros, in evaluation mode, and left as it was.

    Args:
        mod: the model.
        input_shape: of one input, ``(C, *positions)``.

    Returns:
        The module's name; None: there is none.
    """
    first: Tensor = next((tensor for tensor in mod.parameters() if tensor.is_floating_point()), torch.empty(0))
    devices = [first.device] if first.device.type == "cuda" else []
    with evaluating(mod), torch.random.fork_rng(devices), _Shapes(mod) as shapes:
        mod(torch.zeros((1, *input_shape), dtype=first.dtype, device=first.device))
    for name, shape in reversed(shapes.found):
        if len(shape) == len(input_shape) + 1 and any(length != 1 for length in shape[2:]):
            return name
    return None


class _Shapes(LayerHooks):
    """What every module puts out, in the order in which the modules finish."""

    def __init__(self, model: nn.Module) -> None:
        named = list(model.named_modules())
        super().__init__(module for _, module in named)
        self._names = [name for name, _ in named]
        self.found: list[tuple[str, torch.Size]] = []

    def on_output(self, index: int, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            self.found.append((self._names[index], output.shape))


def __getattr__(name: str) -> Any:
    return attribute("torchcam", "methods._utils", name)
