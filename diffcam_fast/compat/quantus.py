"""Our maps for the metrics of Quantus (https://github.com/understandable-machine-intelligence-lab/Quantus), 0.6.0.

Quantus calls a function for the explanations that it measures: `explain` is one. Nothing here imports Quantus.
"""

from __future__ import annotations

import inspect
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffcam_fast.explain.classes import parse_classes
from diffcam_fast.explain.explainer import Explainer

_OPTIONS = tuple(name for name in inspect.signature(Explainer).parameters if name != "model")


def explain(
    model: nn.Module,
    inputs: np.ndarray | Tensor,
    targets: Any,
    *,
    device: str | torch.device | None = None,
    channel_first: bool | None = None,
    **options: Any,
) -> np.ndarray:
    """Class activation maps, as Quantus's ``explain_func``.

    ``metric(model=model, x_batch=images, y_batch=labels, explain_func=explain, explain_func_kwargs={...})`` measures
    them; the keyword arguments are those below.

    Args:
        model: a classifier, images ``(N, C, *S)`` to logits; it stays where it is, in the mode that it is in.
        inputs: images, ``(N, C, *S)`` or ``(N, *S, C)``, one to three dimensions S; converted to the model's dtype.
        targets: the class of each image: integers ``(N,)``, or one for all; None: the predicted classes.
        device: of the model; None: that of its first parameter.
        channel_first: whether channels come before the positions; None: unless the last dimension is smaller than all
            but the first, in one or two dimensions.
        **options: of `diffcam_fast.Explainer`: ``layers``, ``method``, ``target``, ``normalize``, ``size``,
            ``reshape``, ``relu``, ``chunk_size``, ``memory_budget``.

    Returns:
        Maps ``(N, 1, *S)``, float32 (float64 for a float64 model).

    Raises:
        TypeError: an argument is of the wrong type, or not known.
        ValueError: an argument has no valid value.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
    unknown = sorted(options.keys() - set(_OPTIONS))
    if unknown:
        raise TypeError(f"options: expected some of {', '.join(_OPTIONS)}; got {', '.join(unknown)}")
    first = next(chain(model.parameters(), model.buffers()), None)
    place = _device(device, None if first is None else first.device)
    images = _channels_first(_as_tensor(inputs), channel_first)
    dtype = first.dtype if first is not None and first.is_floating_point() else torch.float32
    images = images.to(place, dtype)
    explanation = Explainer(model, **options)(images, _classes(targets, len(images)))
    if explanation.maps.shape[1] != 1:
        raise ValueError(
            f"target: expected one that makes one map of an image; it makes {explanation.maps.shape[1]} of each"
        )
    return explanation.maps.numpy(force=True)


def _as_tensor(inputs: Any) -> Tensor:
    if isinstance(inputs, Tensor):
        tensor = inputs.detach()
    elif isinstance(inputs, np.ndarray) and inputs.dtype.kind in "fiu":
        tensor = torch.from_numpy(np.array(inputs))  # a copy: arrays may be read-only
    else:
        what = f"an array of {inputs.dtype}" if isinstance(inputs, np.ndarray) else type(inputs).__name__
        raise TypeError(f"inputs: expected an array or a tensor of numbers; got {what}")
    if not 3 <= tensor.dim() <= 5:
        raise ValueError(
            f"inputs: expected images (N, C, *S) or (N, *S, C) with one to three dimensions S; got shape "
            f"{tuple(tensor.shape)}"
        )
    return tensor


def _channels_first(images: Tensor, channel_first: Any) -> Tensor:
    if channel_first is None:
        channel_first = images.dim() > 4 or images.shape[-1] >= min(images.shape[1:-1])
    elif not isinstance(channel_first, bool):
        raise TypeError(f"channel_first: expected True, False or None; got {type(channel_first).__name__}")
    return images if channel_first else images.movedim(-1, 1)


def _classes(targets: Any, images: int) -> Tensor | None:
    try:
        classes = parse_classes(targets, images)
    except (TypeError, ValueError) as error:
        raise type(error)(f"targets: {error}") from error
    if classes is not None and classes.dim() == 2 and classes.shape[1] != 1:
        raise ValueError(f"targets: expected one class for each image; got shape {tuple(classes.shape)}")
    return classes


def _device(given: Any, of_model: torch.device | None) -> torch.device:
    if given is None:
        return torch.device("cpu") if of_model is None else of_model
    try:
        wanted = torch.device(given)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: expected the name of a device; got {given!r}") from error
    if of_model is not None and (wanted.type != of_model.type or wanted.index not in (None, of_model.index)):
        raise ValueError(f"device: expected that of the model, {of_model}; got {wanted}")
    return wanted if of_model is None else of_model
