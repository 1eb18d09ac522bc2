"""Class activation maps from activations and gradients: schema, shape inference, autograd and the public function."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from diffcam_fast.backends import direct
from diffcam_fast.backends.library import NAMESPACE, define
from diffcam_fast.reference import cam as reference
from diffcam_fast.reference.cam import METHODS, NORMALIZATIONS, accumulation_dtype

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def cam(
    activations: Tensor,
    gradients: Tensor,
    method: str = "gradcam",
    *,
    relu: bool = True,
    normalize: str | None = "minmax",
    eps: float = 1e-7,
) -> Tensor:
    """Class activation maps: weight the activations, pool over channels, apply ReLU and normalise, in one pass.

    With activations ``A[n,c,s]`` and gradients ``G[n,t,c,s]`` of target ``t``'s score, ``S`` positions ``s``:

    =============  ====================================================================================
    method         map before ReLU and normalisation
    =============  ====================================================================================
    gradcam        ``sum_c w A``, ``w = mean_s G`` (Selvaraju et al. 2017)
    gradcam++      ``sum_c w A``, ``w = sum_s a relu(G)``, ``a = G^2 / (2 G^2 + (sum_s A) G^3 + 1e-6)`` where
                   ``G != 0``, else 0 (Chattopadhay et al. 2018)
    xgradcam       ``sum_c w A``, ``w = sum_s(G A) / (sum_s A + 1e-7)`` (Fu et al. 2020)
    hirescam       ``sum_c G A`` (Draelos and Carin 2020)
    layercam       ``sum_c relu(G) A`` (Jiang et al. 2021)
    elementwise    ``sum_c relu(G A)``
    =============  ====================================================================================

    Sums are taken in float32 whatever the input's dtype (float64 for float64). Contiguous and channels-last inputs are
    read as they are. Differentiable, to first order, in both tensors. An image with non-finite input gets a
    non-finite map; other images are not affected.

    Args:
        activations: ``(N, C, *S)`` with one to three spatial dimensions; float32, float64, bfloat16 or float16.
        gradients: same dtype and device. ``(N, C, *S)`` or, for T targets an image, ``(N, T, C, *S)``. Gradients that
            are the same at every position are given once, as ``(N, C)`` or ``(N, T, C)``. For one spatial dimension,
            gradients whose shape equals the activations' are read as ``(N, C, S)``.
        method: see the table.
        relu: set negative evidence to zero.
        normalize: ``"minmax"``: ``(M - min) / (max - min + eps)``; ``"max"``: ``M / (max + eps)``; None: as it is.
            Each map by itself. A constant map becomes zeros under "minmax".
        eps: see ``normalize``; positive.

    Returns:
        Maps ``(N, *S)``, or ``(N, T, *S)`` where the gradients have a target dimension; contiguous; float32, or
        float64 for float64 input. Their storage may be one that `resize_` cannot make larger.

    Raises:
        TypeError: an argument is not a tensor, has a dtype that is not supported, or dtypes differ.
        ValueError: ranks or shapes do not match, devices differ, or ``method``, ``normalize`` or ``eps`` is not valid.
    """
    if not is_dynamo_compiling():
        served = direct.cam(activations, gradients, method, relu, normalize, eps, False)
        if served is not None:
            return served
    check(activations, gradients, method, normalize, eps)
    has_targets = has_target_dimension(activations.shape, gradients.shape)
    name = "none" if normalize is None else normalize
    op = getattr(torch.ops, NAMESPACE).cam.default
    if torch.is_grad_enabled() and (activations.requires_grad or gradients.requires_grad):
        # The finish is small: PyTorch differentiates it, and the backward need not compute the raw map again.
        raw = op(activations, gradients if has_targets else gradients.unsqueeze(1), method, False, "none", eps)
        maps = reference.finish(raw, relu, name, eps)
        return maps if has_targets else maps.squeeze(1)
    # A Python autograd formula costs microseconds even where nothing requires a gradient.
    with nullcontext() if torch.compiler.is_compiling() else torch._C._AutoDispatchBelowAutograd():
        maps = op(activations, gradients if has_targets else gradients.unsqueeze(1), method, relu, name, eps)
        return maps if has_targets else maps.squeeze(1)


def check(activations: Any, gradients: Any, method: str, normalize: str | None, eps: float) -> None:
    """Raise for arguments of `cam` that are not valid, shapes aside; see `has_target_dimension` for those."""
    for name, value in (("activations", activations), ("gradients", gradients)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor; got {type(value).__name__}")
    if activations.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"activations: expected dtype {known}; got {activations.dtype}")
    if gradients.dtype != activations.dtype:
        raise TypeError(f"gradients: expected the dtype of activations, {activations.dtype}; got {gradients.dtype}")
    if gradients.device != activations.device:
        raise ValueError(f"gradients: expected the device of activations, {activations.device}; got {gradients.device}")
    if not 3 <= activations.dim() <= 5:
        raise ValueError(
            f"activations: expected shape (N, C, *S) with 1 to 3 spatial dimensions; got {tuple(activations.shape)}"
        )
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}; got {method!r}")
    if normalize is not None and (normalize not in NORMALIZATIONS or normalize == "none"):
        raise ValueError(f"normalize: expected None, 'max' or 'minmax'; got {normalize!r}")
    if not eps > 0:
        raise ValueError(f"eps: expected a positive number; got {eps!r}")


def has_target_dimension(activations: Sequence[int], gradients: Sequence[int]) -> bool:
    """Whether gradients of this shape are (N, T, C, *S) or (N, T, C), and not (N, C, *S) or (N, C).

    Raises:
        ValueError: they are none of these for activations of the other shape.
    """
    shape, expected = tuple(gradients), tuple(activations)
    images, channels = expected[:2]
    if shape in (expected, expected[:2]):
        return False
    if len(shape) == len(expected) + 1 and shape[0] == images and shape[2:] == expected[1:]:
        return True
    if len(shape) == 3 and shape[0] == images and shape[2] == channels:
        return True
    positions = ", ".join(str(size) for size in expected[2:])
    raise ValueError(
        f"gradients: expected shape ({images}, {channels}, {positions}), ({images}, T, {channels}, {positions}), "
        f"({images}, {channels}) or ({images}, T, {channels}) for activations {expected}; got {shape}"
    )


define(
    "cam",
    "(Tensor activations, Tensor gradients, str method, bool relu, str normalize, float eps) -> Tensor",
    reference.cam,
)


define(
    "cam_backward",
    "(Tensor grad_raw, Tensor activations, Tensor gradients, str method, bool for_activations, bool for_gradients)"
    " -> (Tensor, Tensor)",
    reference.cam_backward,
)


@torch.library.register_fake(f"{NAMESPACE}::cam")
def _cam_fake(activations: Tensor, gradients: Tensor, method: str, relu: bool, normalize: str, eps: float) -> Tensor:
    shape = (gradients.shape[0], gradients.shape[1], *activations.shape[2:])
    return activations.new_empty(shape, dtype=accumulation_dtype(activations.dtype))


@torch.library.register_fake(f"{NAMESPACE}::cam_backward")
def _cam_backward_fake(
    grad_raw: Tensor,
    activations: Tensor,
    gradients: Tensor,
    method: str,
    for_activations: bool,
    for_gradients: bool,
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(activations) if for_activations else activations.new_empty(0),
        torch.empty_like(gradients) if for_gradients else gradients.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    activations, gradients, ctx.method, ctx.relu, ctx.normalize, ctx.eps = inputs
    ctx.save_for_backward(activations, gradients)


def _backward(ctx: Any, grad_maps: Tensor) -> tuple[Tensor | None, ...]:
    activations, gradients = ctx.saved_tensors
    ops = getattr(torch.ops, NAMESPACE)
    grad_raw = grad_maps
    if ctx.relu or ctx.normalize != "none":
        raw = ops.cam(activations, gradients, ctx.method, False, "none", ctx.eps)
        grad_raw = _finish_backward(grad_maps, raw, ctx.relu, ctx.normalize, ctx.eps)
    for_activations, for_gradients = ctx.needs_input_grad[:2]
    grad_activations, grad_gradients = ops.cam_backward(
        grad_raw.contiguous(), activations, gradients, ctx.method, for_activations, for_gradients
    )
    return (
        grad_activations if for_activations else None,
        grad_gradients if for_gradients else None,
        None,
        None,
        None,
        None,
    )


def _finish_backward(grad_maps: Tensor, raw: Tensor, relu: bool, normalize: str, eps: float) -> Tensor:
    """Gradient of `reference.finish` with respect to the raw maps; extrema that tie share theirs, as PyTorch has it."""
    maps = raw.relu() if relu else raw
    positions = tuple(range(2, maps.dim()))
    grad = grad_maps
    if normalize != "none" and maps.numel() > 0:
        high = maps.amax(positions, keepdim=True)
        low = maps.amin(positions, keepdim=True) if normalize == "minmax" else torch.zeros_like(high)
        span = high - low + eps
        at_high = (maps == high).to(maps.dtype)
        grad_span = -(grad_maps * (maps - low)).sum(positions, keepdim=True) / (span * span)
        grad = grad_maps / span + grad_span * at_high / at_high.sum(positions, keepdim=True)
        if normalize == "minmax":
            at_low = (maps == low).to(maps.dtype)
            grad_low = -grad_maps.sum(positions, keepdim=True) / span - grad_span
            grad = grad + grad_low * at_low / at_low.sum(positions, keepdim=True)
    return grad * (raw > 0) if relu else grad


torch.library.register_autograd(f"{NAMESPACE}::cam", _backward, setup_context=_setup_context)
