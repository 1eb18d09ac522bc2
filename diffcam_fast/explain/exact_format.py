"""Channels-last images where that changes no bit of the result.

In which order a convolution adds up depends on the order in memory for some sizes alone: for many channels and few
positions. Up to the first of these a network puts out the same bits for channels-last images as for contiguous ones,
and in less time where `FasterFormat` says so (`benchmarks/results/same_bits.md`). From there on images are contiguous.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from diffcam_fast.explain.capture import LayerHooks
from diffcam_fast.explain.layers import run_eagerly

# Modules that add up.
_ADDING = (nn.Conv2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
# Random values that a probe repeats, drawing being slow; prime, so that no two channels or rows are the same.
_DIFFERENT = 10007


@dataclass(frozen=True)
class Restored:
    """Where channels-last images become contiguous again.

    Attributes:
        before: modules that get contiguous images.
        after: modules that put out contiguous ones.
    """

    before: tuple[nn.Module, ...] = ()
    after: tuple[nn.Module, ...] = ()


NOWHERE = Restored()


class Restoring(LayerHooks):
    """Within, images become contiguous where a model would round them otherwise.

    Args:
        where: from `exact_format`.
    """

    def __init__(self, where: Restored) -> None:
        super().__init__((*where.before, *where.after))
        self._before = len(where.before)

    def _register(self, index: int, module: nn.Module) -> None:
        if index < self._before:
            self._handles.append(module.register_forward_pre_hook(self._input_hook(index)))
        else:
            # Before hooks that take note of what the layer puts out.
            self._handles.append(module.register_forward_hook(self._output_hook(index), prepend=True, with_kwargs=True))

    def on_input(self, index: int, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Hand on the first input contiguous."""
        return (inputs[0].contiguous(), *inputs[1:]) if inputs and _is_channels_last(inputs[0]) else None

    def on_output(self, index: int, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
        """Hand on the output contiguous."""
        return output.contiguous() if _is_channels_last(output) else None


class _Probing(Restoring):
    """Finds out where images have to become contiguous, and what the layers put out then."""

    def __init__(self, model: nn.Module, layers: Iterable[nn.Module]) -> None:
        adding = tuple(module for module in model.modules() if type(module) in _ADDING)
        super().__init__(Restored(adding, tuple(layers)))
        # By id: modules may define their own equality.
        self.before: dict[int, nn.Module] = {}
        self.after: dict[int, nn.Module] = {}
        self.outputs: list[Any] = []

    def on_input(self, index: int, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        module = self._modules[index]
        if not (len(inputs) == 1 and _is_channels_last(inputs[0]) and _rounds_otherwise(module, inputs[0])):
            return None
        self.before[id(module)] = module
        return super().on_input(index, inputs)

    def on_output(self, index: int, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
        restored = super().on_output(index, inputs, output)
        if restored is not None:
            self.after[id(self._modules[index])] = self._modules[index]
        found = output if restored is None else restored
        # The model may go on in place.
        self.outputs.append(found.clone() if isinstance(found, Tensor) else found)
        return restored


def exact_format(model: nn.Module, layers: Iterable[nn.Module], images: Tensor) -> Restored | None:
    """Where channels-last images have to become contiguous for the same bits as of contiguous images.

    Found by two passes over the images, and on random values for each convolution. Other images of their kind round in
    the same places, as long as PyTorch works on as many threads.

    Args:
        model: in evaluation mode, gradients off.
        layers: modules of it, which put out contiguous images in any case.
        images: ``(N, C, H, W)``, contiguous.

    Returns:
        The places; None where the model's output or a layer's differs all the same, where the model draws random
        numbers or does not work on channels-last images, and in other precisions than float32: results that are rounded
        to fewer digits hardly ever show in which order was added.
    """
    if images.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return None
    layers = tuple(layers)
    state = torch.get_rng_state()
    try:
        with _Probing(model, layers) as contiguous:
            expected = run_eagerly(model, images)
        if not torch.equal(torch.get_rng_state(), state):
            return None
        with _Probing(model, layers) as channels_last:
            found = run_eagerly(model, images.contiguous(memory_format=torch.channels_last))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever it is, the explanation itself will show it or does without
        return None
    finally:
        if not torch.equal(torch.get_rng_state(), state):
            torch.set_rng_state(state)
    if not _are_same((found, channels_last.outputs), (expected, contiguous.outputs)):
        return None
    return Restored(tuple(channels_last.before.values()), tuple(channels_last.after.values()))


def _is_channels_last(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.dim() == 4
        and not value.is_contiguous()
        and value.is_contiguous(memory_format=torch.channels_last)
    )


def _rounds_otherwise(module: nn.Module, images: Tensor) -> bool:
    # Not on the images themselves, whose zeros would tell nothing.
    some = torch.randn(_DIFFERENT, generator=torch.Generator().manual_seed(0))
    probe = some.repeat(ceil(images.numel() / _DIFFERENT))[: images.numel()].view(images.shape)
    one, other = (
        type(module).forward(module, given) for given in (probe, probe.contiguous(memory_format=torch.channels_last))
    )
    return not torch.equal(one, other)


def _are_same(found: Any, expected: Any) -> bool:
    pairs = list(zip(tree_leaves(found), tree_leaves(expected), strict=False))
    return len(pairs) == len(tree_leaves(expected)) and all(
        isinstance(one, Tensor)
        and isinstance(other, Tensor)
        and one.stride() == other.stride()
        and torch.equal(one, other)
        for one, other in pairs
    )
