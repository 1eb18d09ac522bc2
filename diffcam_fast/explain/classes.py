"""The classes to explain, in every form that callers have them in."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

# So many classes are looked at one by one sooner than by an operator.
_LISTED = 64


def parse_classes(classes: Any, images: int) -> Tensor | None:
    """Check the classes' form before the model runs.

    Args:
        classes: None, an integer, or ``(N,)`` or ``(N, T)`` integers as a tensor, an array or nested lists.
        images: N.

    Returns:
        None, a tensor without dimensions (one class for every image), or ``(N, T)``, T at least 1.

    Raises:
        TypeError: not integers.
        ValueError: another shape.
    """
    if classes is None:
        return None
    # Tensors first: asking one whether it is a number takes longer than all of this.
    if not isinstance(classes, Tensor) and isinstance(classes, Integral) and not isinstance(classes, bool):
        return torch.tensor(int(classes))
    tensor = classes if isinstance(classes, Tensor) else _from_array(classes)
    if tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex():
        raise TypeError(f"classes: expected integers; got {tensor.dtype}")
    if tensor.dim() == 0:
        return tensor
    if tensor.dim() == 1 and tensor.shape[0] == images:
        return tensor.unsqueeze(1)
    if tensor.dim() == 2 and tensor.shape[0] == images and tensor.shape[1] > 0:
        return tensor
    hint = "; several classes for the one image are [[a, b]]" if tensor.dim() == 1 and images == 1 else ""
    raise ValueError(
        f"classes: expected None, an integer, or integers of shape ({images},) or ({images}, T) for {images} "
        "images; "
        f"got shape {tuple(tensor.shape)}{hint}"
    )


def classes_for(parsed: Tensor | None, logits: Tensor) -> Tensor:
    """Class indices ``(N, T)``, int64, on the device of the logits ``(N, K)``; the predicted ones for None.

    Classes that are on another device than the CPU are not read: that would wait for the device.

    Raises:
        ValueError: a class is out of range.
    """
    if parsed is None:
        return logits.detach().argmax(1, keepdim=True)
    count = logits.shape[1]
    if parsed.device.type == "cpu" and parsed.numel() > 0:
        low, high = _bounds(parsed)
        if low < 0 or high >= count:
            raise ValueError(
                f"classes: expected indices from 0 to {count - 1} for {count} classes; got {low} to {high}"
            )
        if parsed.dim() == 0:
            return torch.full((logits.shape[0], 1), int(parsed), dtype=torch.int64, device=logits.device)
    moved = parsed.to(logits.device, torch.int64, non_blocking=True)
    return moved.expand(logits.shape[0], 1) if moved.dim() == 0 else moved


def _bounds(classes: Tensor) -> tuple[int, int]:
    if classes.numel() > _LISTED:
        low, high = classes.aminmax()
        return int(low), int(high)
    listed = classes.flatten().tolist()
    return min(listed), max(listed)


def _from_array(classes: Any) -> Tensor:
    try:
        array = np.asarray(classes)
    except ValueError as error:
        raise ValueError("classes: expected as many classes for each image; got rows of different lengths") from error
    if array.dtype.kind not in "iu":
        if array.size == 0 and array.dtype.kind == "f":  # an empty list has no dtype of its own
            array = array.astype(np.int64)
        else:
            raise TypeError(f"classes: expected integers; got {type(classes).__name__} of {array.dtype}")
    return torch.from_numpy(array.astype(np.int64))
