"""The order in memory that images are handed to a model in.

Convolutions of PyTorch on a CPU work on channels that lie next to each other, and reorder what they get and what they
return for everybody else. Depthwise separable convolutions, depthwise ones and pointwise ones in turn, do so little
arithmetic that reordering takes a good part of their time, and networks made of them take less on channels-last images
(`benchmarks/results/memory_format.md`). Where linear layers take the place of the pointwise ones, as in ConvNeXt,
channels lie next to each other already, and nothing is gained. Many networks of dense convolutions gain as well, but
not at every size, and the logits of some differ by ten times as much: there the caller decides.
"""

from __future__ import annotations

import platform
from typing import Any

import torch
from torch import Tensor, nn

AUTO = "auto"
"""See `FasterFormat`."""

_DIMENSIONS = {torch.channels_last: 4, torch.channels_last_3d: 5}
_DTYPES = (torch.float32, torch.bfloat16)
#: Mean difference, as a share of the range.
_ROUNDING = 1e-2


def check_memory_format(given: Any) -> str | torch.memory_format:
    """What was given, if it is "auto" or a memory format.

    Raises:
        TypeError: it is neither a string nor a memory format.
        ValueError: it is another string.
    """
    if isinstance(given, str):
        if given != AUTO:
            raise ValueError(f"memory_format: expected 'auto' or a torch.memory_format; got {given!r}")
    elif not isinstance(given, torch.memory_format):
        raise TypeError(f"memory_format: expected 'auto' or a torch.memory_format; got {type(given).__name__}")
    return given


def in_format(images: Tensor, memory_format: str | torch.memory_format) -> Tensor:
    """Images in the order that was asked for by name; as they come where none was.

    Args:
        images: ``(N, C, *S)``.
        memory_format: "auto" or a memory format.

    Raises:
        ValueError: a format for images of other dimensions.
    """
    if isinstance(memory_format, str) or memory_format == torch.preserve_format:
        return images
    expected = _DIMENSIONS.get(memory_format, images.dim())
    if images.dim() != expected:
        raise ValueError(
            f"memory_format: {memory_format} is for images of {expected} dimensions; got shape {tuple(images.shape)}"
        )
    return images.contiguous(memory_format=memory_format)


class FasterFormat:
    """Whether a model is faster on images in another order than they come in.

    Depends on nothing but the model's modules and what the images look like: the same images are always handed on in
    the same order.

    Args:
        model: the network.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._separable: bool | None = None

    def __call__(self, images: Tensor) -> torch.memory_format | None:
        """The faster order; None where that is the images' own, or where nothing is known."""
        if (
            images.device.type != "cpu"
            or images.dim() != 4
            or images.dtype not in _DTYPES
            or type(images) is not Tensor
        ):
            return None
        if not images.is_contiguous() or images.is_contiguous(memory_format=torch.channels_last):
            return None
        if images.numel() == 0 or not _is_measured_here() or not self._has_separable_convolutions():
            return None
        return torch.channels_last

    def _has_separable_convolutions(self) -> bool:
        if self._separable is None:
            found = [module for module in self._model.modules() if isinstance(module, nn.Conv2d)]
            depthwise = any(1 < module.groups == module.in_channels for module in found)
            pointwise = any(module.groups == 1 and set(module.kernel_size) == {1} for module in found)
            self._separable = depthwise and pointwise
        return self._separable


def _is_measured_here() -> bool:
    return platform.machine() in ("x86_64", "AMD64") and bool(torch.backends.mkldnn.enabled)


def same_but_for_rounding(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors could be one result, rounded in two ways.

    Far from strict: what mistakes one order in memory for another gets something altogether different.
    """
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    if not one.is_floating_point():
        return True
    finite = other.isfinite()
    if not torch.equal(one.isfinite(), finite):
        return False
    mine, theirs = one[finite].double(), other[finite].double()
    if mine.numel() == 0:
        return True
    spread = theirs.amax() - theirs.amin()
    return bool((mine - theirs).abs().mean() <= _ROUNDING * spread)
