"""Max pooling on a CPU, on channels that lie next to each other.

PyTorch pools contiguous images value by value, and channels-last ones several channels at a time: pooling copies in
that order and putting the results back takes a fraction of the time. A maximum does not depend on the order in memory:
a network puts out the same values, bit for bit but for the payload of NaNs. What it gains by that is in
`benchmarks/results/same_bits.md`.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from diffcam_fast.explain.capture import LayerHooks

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Below, several channels at a time are too few, or reordering takes as long as pooling.
_CHANNELS = 16
_VALUES = 2**15
# Of one copy, which thereby stays in a processor's cache, and adds little to the memory that a network takes.
_VALUES_AT_A_TIME = 2**17

_OURS = __name__.partition(".")[0]


def max_poolings(model: nn.Module) -> list[nn.MaxPool2d]:
    """The model's max pooling layers of two dimensions; subclasses may do anything, and are not among them."""
    return [module for module in model.modules() if type(module) is nn.MaxPool2d]


class FasterPooling(LayerHooks):
    """Within, layers that get contiguous images on a CPU pool channels-last copies of them.

    Only in the thread that entered. Layers that the caller has hooked are left alone: such hooks would see what is
    meant for ours.

    Args:
        layers: from `max_poolings`.
        recorded: also where autograd records, with the same gradients.
    """

    def __init__(self, layers: Iterable[nn.MaxPool2d], *, recorded: bool = False) -> None:
        super().__init__(layers)
        self._recorded = recorded
        self._pooled: Tensor | None = None

    def _register(self, index: int, module: nn.Module) -> None:
        if _is_watched(module):
            return
        self._handles.append(module.register_forward_pre_hook(self._input_hook(index)))
        # Before hooks that take note of what the layer puts out.
        self._handles.append(module.register_forward_hook(self._output_hook(index), prepend=True, with_kwargs=True))

    def on_input(self, index: int, inputs: tuple[Any, ...]) -> tuple[Tensor] | None:
        """Pool the images, and leave none of them to the layer itself."""
        self._pooled = None
        if len(inputs) != 1 or not _gains(inputs[0]):
            return None
        (images,), layer = inputs, self._modules[index]
        if not (torch.is_grad_enabled() and images.requires_grad):
            self._pooled = _pooled(layer, images)[0]
        elif self._recorded:
            self._pooled = _Recorded.apply(images, layer)
        else:
            return None
        return (images.detach()[:0],)

    def on_output(self, index: int, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
        """Hand on what was pooled."""
        pooled, self._pooled = self._pooled, None
        return pooled


class _Recorded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, layer: Any) -> Tensor:
        pooled, indices = _pooled(layer, images, with_indices=True)
        ctx.save_for_backward(images, indices)
        ctx.arguments = _arguments(layer)
        return pooled

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        images, indices = ctx.saved_tensors
        backward = torch.ops.aten.max_pool2d_with_indices_backward
        return backward(gradient, images, *ctx.arguments, indices), None


def _pooled(layer: Any, images: Tensor, *, with_indices: bool = False) -> tuple[Tensor, Tensor | None]:
    """The pooled images, and where in its plane each value comes from."""
    count, channels, height, width = images.shape
    step = max(1, _VALUES_AT_A_TIME // (channels * height * width))
    parts = min(ceil(channels * height * width / _VALUES_AT_A_TIME), channels // _CHANNELS)
    # As many channels as fit into a processor's registers, or a multiple.
    width_of_part = _CHANNELS * ceil(channels / parts / _CHANNELS)
    pooled = indices = None
    for first in range(0, count, step):
        for channel in range(0, channels, width_of_part):
            place = slice(first, first + step), slice(channel, channel + width_of_part)
            part = images[place].contiguous(memory_format=torch.channels_last)
            values, origins = torch.ops.aten.max_pool2d_with_indices(part, *_arguments(layer))
            if pooled is None:
                pooled = images.new_empty((count, channels, *values.shape[2:]))
                indices = torch.empty_like(pooled, dtype=origins.dtype) if with_indices else None
            pooled[place] = values
            if indices is not None:
                indices[place] = origins
    assert pooled is not None
    return pooled, indices


def _arguments(layer: nn.MaxPool2d) -> tuple[Any, ...]:
    pairs = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    return (*(list(pair) if isinstance(pair, Iterable) else [pair, pair] for pair in pairs), layer.ceil_mode)


def _is_watched(layer: nn.Module) -> bool:
    if layer.return_indices or "forward" in layer.__dict__ or nn.modules.module._has_any_global_hook():
        return True
    hooks = (*layer._forward_pre_hooks.values(), *layer._forward_hooks.values())
    return any(str(getattr(hook, "__module__", "")).partition(".")[0] != _OURS for hook in hooks)


def _gains(images: Any) -> bool:
    return (
        type(images) is Tensor
        and images.device.type == "cpu"
        and images.layout == torch.strided
        and images.dtype in _DTYPES
        and images.dim() == 4
        and images.shape[1] >= _CHANNELS
        and images.numel() >= _VALUES
        # Transforms know but one order, and derivatives that go forward none of this.
        and torch._C._functorch.maybe_current_level() is None
        and torch.autograd.forward_ad._current_level < 0
        and images.is_contiguous()
        and not images.is_contiguous(memory_format=torch.channels_last)
    )
