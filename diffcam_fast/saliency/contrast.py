"""Contrastive saliency: what speaks for a class and not for its rivals, of any saliency method."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from diffcam_fast.explain.capture import ordinary
from diffcam_fast.explain.checks import check_images, check_logits
from diffcam_fast.explain.classes import classes_for, parse_classes
from diffcam_fast.explain.evaluation import evaluating
from diffcam_fast.explain.targets import Logit
from diffcam_fast.ops.logit_difference import logit_difference
from diffcam_fast.ops.saliency_contrast import saliency_contrast
from diffcam_fast.reference.cam import accumulation_dtype
from diffcam_fast.saliency.guided import guided_backpropagation

Method = Callable[..., Any]

_PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "positive": torch.relu,
    "magnitude": torch.abs,
    "all": lambda maps: maps,
}
PARTS = tuple(_PARTS)


class ContrastiveSaliency(NamedTuple):
    """What speaks for a class and not for each of its R rivals. Everything is on the images' device."""

    contrast: Tensor
    """(N, R, C, *S), not negative, float32 (float64 for float64 images): one map a rival, strongest first."""

    saliency: Tensor
    """(N, C, *S): the method's own map of the class, as it came."""

    rival_saliency: Tensor
    """(N, R, C, *S): the method's own maps of the rivals."""

    classes: Tensor
    """int64 (N,): the classes asked for, or predicted."""

    rivals: Tensor
    """int64 (N, R): the rivals asked for, or the classes with the largest logits but for the class itself."""


def contrastive_saliency(
    model: nn.Module,
    images: Tensor,
    classes: Any = None,
    *,
    rivals: Any = 1,
    method: Method = guided_backpropagation,
    part: str = "positive",
    per_channel: bool = True,
    **options: Any,
) -> ContrastiveSaliency:
    """``relu(s_k / |s_k| - s_m / |s_m|)`` of a class k and its rivals m, for any saliency method.

    Gu and Tresp, "Saliency Methods for Explaining Adversarial Attacks", arXiv:1908.08413, 2019, for guided
    back-propagation, whose maps look alike for all classes; the energy ``|s|`` is the Euclidean norm here. The class
    and its rivals are explained in one call of the method; `saliency_contrast` does the rest in one pass.

    Maps are contrasted without their negative values unless `part` says otherwise. As they are, a place that a rival's
    map marks as strongly negative would count for the class: of a dog and a cat in one photo, the contrast of either
    with the other then shows both.

    Args:
        model: a classifier: images ``(N, C, *S)`` to logits ``(N, K)``.
        images: floating point, one to three spatial dimensions, on the model's device.
        classes: None (the predicted class), an integer for all images, or integers ``(N,)``.
        rivals: how many of the strongest other classes, 1 to K - 1; or classes, integers ``(N, R)`` as a tensor or an
            array.
        method: a function ``(model, images, classes, **options)`` that takes classes ``(N, T)`` and returns maps
            ``(N, T, C, *S)``, or something whose `attributions` they are: `gradient`, `gradient_times_input`,
            `guided_backpropagation`, `integrated_gradients`, or your own.
        part: of the maps, that is contrasted: "positive", "magnitude", or "all", their values as they are.
        per_channel: each channel has an energy of its own; False: all channels of a map have one together.
        options: for the method. Where there is no `target` among them, methods of this package explain logits,
            ``target=Logit()``.

    Returns:
        The contrasts, with what they were made from.

    Raises:
        TypeError: an argument is not of a type above, or the method returns no tensor.
        ValueError: classes or rivals are out of range or of the wrong shape, a rival is the class itself, an unknown
            part, the method returns maps of another shape, or what the method raises.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
    check_images(images)
    if not callable(method):
        raise TypeError(f"method: expected a function; got {type(method).__name__}")
    if part not in PARTS:
        raise ValueError(f"part: expected one of {', '.join(PARTS)}; got {part!r}")
    if np.ndim(0 if classes is None else classes) > 1:
        raise ValueError(f"classes: expected None, an integer, or ({len(images)},) integers; got {np.shape(classes)}")
    requested = parse_classes(classes, len(images))
    with evaluating(model):
        logits = check_logits(model(ordinary(images).clone()), len(images))
        logits = logits.to(accumulation_dtype(logits.dtype))
        chosen = classes_for(requested, logits)
        others = _rivals(rivals, chosen, logits)
    if "target" not in options and getattr(method, "__module__", "").startswith(f"{__package__}."):
        options["target"] = Logit()
    found = method(model, images, torch.cat([chosen, others], 1), **options)
    maps = getattr(found, "attributions", found)
    if not isinstance(maps, Tensor):
        raise TypeError(f"method: expected it to return a torch.Tensor or attributions; got {type(found).__name__}")
    expected = (len(images), 1 + others.shape[1], *images.shape[1:])
    if maps.dim() != len(expected) or maps.shape[:2] != expected[:2]:
        raise ValueError(f"method: expected maps (N, T, C, *S), such as {expected}; got shape {tuple(maps.shape)}")
    maps = maps.detach()
    own, theirs = maps[:, 0], maps[:, 1:]
    contrast = saliency_contrast(_PARTS[part](own), _PARTS[part](theirs), per_channel=per_channel)
    return ContrastiveSaliency(contrast, own, theirs, chosen.squeeze(1), others)


def _rivals(rivals: Any, chosen: Tensor, logits: Tensor) -> Tensor:
    """The rivals (N, R), int64, on the device of the logits."""
    images, count = logits.shape
    if isinstance(rivals, bool):
        raise TypeError("rivals: expected an integer or classes; got bool")
    if isinstance(rivals, Integral):
        if not 1 <= int(rivals) < count:
            raise ValueError(f"rivals: expected 1 to {count - 1} of {count} classes; got {rivals}")
        strongest = logit_difference(logits, chosen, baseline="max", top_k=int(rivals)).rivals
        assert strongest is not None
        return strongest.squeeze(1)
    if np.ndim(rivals) != 2:
        raise ValueError(f"rivals: expected an integer, or classes of shape ({images}, R); got {np.shape(rivals)}")
    parsed = parse_classes(rivals, images)
    others = classes_for(parsed, logits)
    # Elsewhere than on the CPU, looking would wait for the device; there the contrast is zero.
    if others.device.type == "cpu" and bool((others == chosen).any()):
        raise ValueError("rivals: expected other classes than those explained; got a class as its own rival")
    return others
