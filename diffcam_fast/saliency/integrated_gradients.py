"""Integrated gradients of any target: captum's quadrature along the path, our targets at its end."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from diffcam_fast.explain.capture import ordinary
from diffcam_fast.explain.checks import check_images, check_logits
from diffcam_fast.explain.classes import classes_for, parse_classes
from diffcam_fast.explain.evaluation import evaluating
from diffcam_fast.explain.targets import LogitDifference, Target, TargetFunction, check_target, score
from diffcam_fast.ops.arguments import check_integer
from diffcam_fast.reference.cam import accumulation_dtype

QUADRATURES = ("gausslegendre", "riemann_left", "riemann_middle", "riemann_right", "riemann_trapezoid")


class IntegratedGradients(NamedTuple):
    """Attributions with what they explain. Everything is on the images' device, float32 (float64 for float64 images).

    With classes ``(N, T)`` everything but the attributions is ``(N, T)``; otherwise ``(N,)``.
    """

    attributions: Tensor
    """(N, C, *S), or (N, T, C, *S) for classes (N, T): how much each value of an image adds to the score."""

    classes: Tensor
    """int64: the classes asked for, or predicted."""

    scores: Tensor
    """The target's scores of the images."""

    baseline_scores: Tensor
    """The target's scores of the baseline."""

    completeness_error: Tensor
    """The attributions' sum less `scores - baseline_scores`, which it would be had the steps been infinitely many."""


def integrated_gradients(
    model: nn.Module,
    images: Tensor,
    classes: Any = None,
    *,
    target: Target | TargetFunction = LogitDifference(),  # noqa: B008 (immutable)
    baseline: float | Tensor = 0.0,
    steps: int = 50,
    quadrature: str = "gausslegendre",
    batch_size: int = 32,
) -> IntegratedGradients:
    """Integrated gradients: the gradient of a score, averaged on the way from a baseline, times the way.

    ``(x - b) * integral over a from 0 to 1 of the gradient of the score at b + a (x - b)``: Sundararajan, Taly and Yan,
    "Axiomatic Attribution for Deep Networks", ICML 2017. The path and the quadrature are captum's.

    A target that depends on differences of logits alone (`LogitDifference`, `Probability`, `LogProbability`) has
    attributions that a number added to all logits cannot change; those of `Logit` can be anything.

    The model runs in evaluation mode; its flags, gradients and hooks are left as they were.

    Args:
        model: a classifier: images ``(N, C, *S)`` to logits ``(N, K)``, an image's logits depending on it alone.
        images: floating point, on the model's device. N may be 0. In half precision the path is made in float32 and
            rounded to the images' dtype point by point.
        classes: None (the predicted class), an integer for all images, or integers ``(N,)`` or ``(N, T)``.
        target: what is explained: see `Explainer`. One score a class: no pairwise targets.
        baseline: a number, or a tensor that can be broadcast to the images, such as ``(N, C, *S)`` or ``(C, 1, 1)``.
        steps: points on each path, at least 2.
        quadrature: "gausslegendre", or one of the Riemann sums "riemann_left", "riemann_middle", "riemann_right" and
            "riemann_trapezoid".
        batch_size: how many points go through the model at a time, whatever N and the number of steps.

    Returns:
        The attributions, with the error that the finite number of steps made.

    Raises:
        TypeError: an argument is not of a type above.
        ValueError: an argument is out of range or of the wrong shape, or the model does not return logits that depend
            on the images differentiably.
        ImportError: captum is missing.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
    check_images(images)
    target = check_target(target)
    if isinstance(target, Target) and target.targets_per_class != 1:
        raise ValueError(f"target: expected one with one score a class; got {target}")
    check_integer("steps", steps, least=2)
    check_integer("batch_size", batch_size, least=1)
    if quadrature not in QUADRATURES:
        raise ValueError(f"quadrature: expected one of {', '.join(QUADRATURES)}; got {quadrature!r}")
    single = classes is None or np.ndim(classes) < 2
    requested = parse_classes(classes, len(images))
    attribution = _captum()
    with evaluating(model):
        images = ordinary(images)
        scored = _Scored(model, target, images.dtype)
        start = _start(baseline, images)
        inputs = images.to(start.dtype)
        logits = [scored.logits(part) for part in inputs.split(batch_size)] or [scored.logits(inputs)]
        chosen = classes_for(requested, torch.cat(logits))
        # One row for each class of each image.
        targets = chosen.shape[1]
        rows = [tensor.repeat_interleave(targets, 0) for tensor in (inputs, start)]
        rows.append(chosen.flatten())
        parts = []
        for points, origins, one in zip(*(tensor.split(max(1, batch_size // steps)) for tensor in rows), strict=True):
            if len(points) == 0:
                parts.append((points, points.new_empty(0), points.new_empty(0)))
                continue
            found = attribution.IntegratedGradients(scored).attribute(
                points, origins, None, (one,), int(steps), quadrature, int(batch_size)
            )
            parts.append((found.detach(), scored(points, one).detach(), scored(origins, one).detach()))
        attributions, scores, baseline_scores = (torch.cat(column) for column in zip(*parts, strict=True))
        error = attributions.flatten(1).sum(1) - (scores - baseline_scores)
        shape = (len(images),) if single else tuple(chosen.shape)
        return IntegratedGradients(
            attributions.reshape(*shape, *images.shape[1:]),
            chosen.reshape(shape),
            *(values.reshape(shape) for values in (scores, baseline_scores, error)),
        )


class _Scored:
    """Points and classes to the target's scores, as captum differentiates them."""

    def __init__(self, model: nn.Module, target: Target | TargetFunction, dtype: torch.dtype) -> None:
        self._model = model
        self._target = target
        self._dtype = dtype

    def logits(self, points: Tensor) -> Tensor:
        # A copy, because a model may normalise its input in place.
        found = check_logits(self._model(points.to(self._dtype, copy=True)), len(points))
        return found.to(accumulation_dtype(found.dtype))

    def __call__(self, points: Tensor, classes: Tensor) -> Tensor:
        logits = self.logits(points)
        if points.requires_grad and not logits.requires_grad:
            raise ValueError("model: expected logits that depend on the images differentiably; these do not")
        found = score(self._target, logits, classes.unsqueeze(1))
        # The score, with the target's own gradient: the second term is zero.
        value = found.delta + (found.cotangent * (logits - logits.detach()).unsqueeze(1)).sum(2)
        return value.squeeze(1)


def _start(baseline: Any, images: Tensor) -> Tensor:
    """The baseline of each image, in the dtype that the path is made in."""
    dtype = accumulation_dtype(images.dtype)
    if isinstance(baseline, Tensor):
        given = ordinary(baseline).to(images.device, dtype)
    elif isinstance(baseline, int | float) and not isinstance(baseline, bool):
        given = torch.tensor(float(baseline), dtype=dtype, device=images.device)
    else:
        raise TypeError(f"baseline: expected a number or a torch.Tensor; got {type(baseline).__name__}")
    try:
        start = given.expand(images.shape)
    except RuntimeError as error:
        raise ValueError(
            f"baseline: expected a number or a shape that broadcasts to the images' {tuple(images.shape)}; got "
            f"{tuple(given.shape)}"
        ) from error
    if not bool(start.isfinite().all()):
        raise ValueError("baseline: expected finite numbers")
    return start


def _captum() -> Any:
    try:
        return importlib.import_module("captum.attr")
    except ImportError as error:
        raise ImportError("integrated gradients need captum: pip install 'diffcam_fast[saliency]'") from error
