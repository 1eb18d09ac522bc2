"""Gradients of scores with respect to images: the saliency that others are made of."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from diffcam_fast.explain.capture import ordinary
from diffcam_fast.explain.checks import check_images, check_logits
from diffcam_fast.explain.classes import classes_for, parse_classes
from diffcam_fast.explain.evaluation import autocast_off, evaluating
from diffcam_fast.explain.targets import Logit, Target, TargetFunction, check_target, score
from diffcam_fast.ops.arguments import check_integer
from diffcam_fast.reference.cam import accumulation_dtype


class Saliency(NamedTuple):
    """Attributions with what they explain. Everything is on the images' device."""

    attributions: Tensor
    """(N, C, *S), or (N, T, C, *S) for classes (N, T); float32, or float64 for float64 images."""

    classes: Tensor
    """int64 (N,) or (N, T): the classes asked for, or predicted."""

    scores: Tensor
    """(N,) or (N, T): the target's scores, float32 or float64."""


def gradient(
    model: nn.Module,
    images: Tensor,
    classes: Any = None,
    *,
    target: Target | TargetFunction = Logit(),  # noqa: B008 (immutable)
    chunk_size: int = 1,
) -> Saliency:
    """How much the score of a class grows with each value of an image.

    Simonyan, Vedaldi and Zisserman, "Deep Inside Convolutional Networks: Visualising Image Classification Models and
    Saliency Maps", ICLR workshop 2014, who take the largest magnitude over the channels; here channels are kept.

    The model runs in evaluation mode; its flags, gradients and hooks are left as they were.

    Args:
        model: a classifier: images ``(N, C, *S)`` to logits ``(N, K)``.
        images: floating point, one to three spatial dimensions, on the model's device.
        classes: None (the predicted class), an integer for all images, or integers ``(N,)`` or ``(N, T)``.
        target: what is explained: see `Explainer`. One score a class: no pairwise targets.
        chunk_size: how many of the T classes are pulled back together, by `torch.vmap`. More than one needs as many
            times the memory; it pays on a GPU, with few images.

    Returns:
        The gradients, with classes and scores.

    Raises:
        TypeError: an argument is not of a type above.
        ValueError: classes or chunk size are out of range or of the wrong shape, or the model does not return logits
            that depend on the images differentiably.
    """
    return pulled_back(model, images, classes, target, chunk_size)


def gradient_times_input(
    model: nn.Module,
    images: Tensor,
    classes: Any = None,
    *,
    target: Target | TargetFunction = Logit(),  # noqa: B008 (immutable)
    chunk_size: int = 1,
) -> Saliency:
    """The gradient times the image: what each value adds to the score, were the score linear.

    Shrikumar, Greenside, Shcherbina and Kundaje, "Not Just a Black Box: Learning Important Features Through Propagating
    Activation Differences", arXiv:1605.01713, 2016. Values are those that the model is given: with a normalisation
    inside the model, black counts as nothing; with one outside, the average does.

    Args:
        model: as in `gradient`.
        images: as in `gradient`.
        classes: as in `gradient`.
        target: as in `gradient`.
        chunk_size: as in `gradient`.

    Returns:
        The products, with classes and scores.

    Raises:
        TypeError: as in `gradient`.
        ValueError: as in `gradient`.
    """
    found = pulled_back(model, images, classes, target, chunk_size)
    values = ordinary(images).to(found.attributions.dtype)
    if found.classes.dim() == 2:
        values = values.unsqueeze(1)
    return found._replace(attributions=found.attributions * values)


def pulled_back(
    model: nn.Module,
    images: Tensor,
    classes: Any,
    target: Any,
    chunk_size: int,
    rule: Callable[[Tensor], AbstractContextManager[object]] = lambda logits: nullcontext(),
) -> Saliency:
    """Gradients of scores with respect to images, by a rule.

    Args:
        model: as in `gradient`.
        images: as in `gradient`.
        classes: as in `gradient`.
        target: as in `gradient`.
        chunk_size: as in `gradient`.
        rule: takes the logits with the graph behind them; in the context that it returns, the graph is gone back
            through.

    Raises:
        TypeError: as in `gradient`.
        ValueError: as in `gradient`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
    check_images(images)
    target = check_target(target)
    if isinstance(target, Target) and target.targets_per_class != 1:
        raise ValueError(f"target: expected one with one score a class; got {target}")
    check_integer("chunk_size", chunk_size, least=1)
    single = classes is None or np.ndim(classes) < 2
    requested = parse_classes(classes, len(images))
    with evaluating(model):
        leaf = ordinary(images)
        with torch.enable_grad():
            leaf.requires_grad_()
            # A copy: the model may change what it is given in place.
            logits = check_logits(model(leaf.clone()), len(images))
        if not logits.requires_grad:
            raise ValueError("model: expected logits that depend on the images differentiably; these do not")
        with autocast_off(images.device.type):
            wide = logits.detach().to(accumulation_dtype(logits.dtype))
            chosen = classes_for(requested, wide)
            found = score(target, wide, chosen)
            cotangents = found.cotangent.to(logits.dtype).transpose(0, 1)
            with rule(logits):
                parts = _gradients(logits, leaf, cotangents, int(chunk_size))
        attributions = torch.cat(parts).transpose(0, 1).to(accumulation_dtype(images.dtype))
    if single:
        return Saliency(attributions.squeeze(1), chosen.squeeze(1), found.delta.squeeze(1))
    return Saliency(attributions, chosen, found.delta)


def _gradients(logits: Tensor, leaf: Tensor, cotangents: Tensor, step: int) -> list[Tensor]:
    """Of each cotangent of (T, N, K), as parts of (T, N, C, *S)."""
    parts = []
    for start in range(0, len(cotangents), step):
        chunk = cotangents[start : start + step]
        last = start + step >= len(cotangents)
        # One by one where there is one: batching has its price.
        several = len(chunk) > 1
        (part,) = torch.autograd.grad(
            logits,
            leaf,
            chunk if several else chunk[0],
            retain_graph=not last,
            is_grads_batched=several,
            allow_unused=True,
        )
        if part is None:
            raise ValueError("model: expected logits that depend on the images differentiably; these do not")
        parts.append(part if several else part.unsqueeze(0))
    return parts
