"""Contrast of saliency maps: schema, shape inference, autograd and the public function."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from diffcam_fast.backends.library import NAMESPACE, define
from diffcam_fast.reference import saliency_contrast as reference
from diffcam_fast.reference.cam import accumulation_dtype

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def saliency_contrast(saliency: Tensor, rivals: Tensor, *, per_channel: bool = True) -> Tensor:
    """What speaks for a class and not for its rivals: ``relu(s_k / |s_k| - s_m / |s_m|)``, in one pass.

    ``s_k`` is the saliency of the explained class, ``s_m`` that of a rival. ``|s|`` is the energy, the Euclidean norm
    over the positions of each channel, or over all channels and positions. Many saliency methods paint nearly the same
    picture for every class; with both at energy 1 the picture cancels, and what tells the classes apart is left (Gu and
    Tresp 2019, "Saliency Methods for Explaining Adversarial Attacks", arXiv:1908.08413).

    Values are taken as they are: where ``s_m`` is negative, that counts for the class. Give the positive parts of maps
    to compare only what speaks for either class, as `contrastive_saliency` does.

    Energies are summed in float32 whatever the input's dtype (float64 for float64), and neither very large nor very
    small values leave its range. A map of energy 0 counts as zeros. Maps may lie in memory in any way and are not
    copied. Differentiable, to first order, in both; zero where an energy is 0. A value that is not finite makes what
    shares its energy NaN and nothing else: other images are not affected.

    Args:
        saliency: ``(N, C, *S)`` with one to three spatial dimensions; float32, float64, bfloat16 or float16.
        rivals: same dtype and device; ``(N, C, *S)`` or, for T rivals an image, ``(N, T, C, *S)``.
        per_channel: each channel has an energy of its own; False: all channels of a map have one together.

    Returns:
        Non-negative maps of the shape of ``rivals``; contiguous; float32, or float64 for float64 input.

    Raises:
        TypeError: an argument is not a tensor, has a dtype that is not supported, or dtypes differ; or ``per_channel``
            is not a bool.
        ValueError: ranks or shapes do not match, or devices differ.
    """
    has_targets = _check(saliency, rivals, per_channel)
    op = getattr(torch.ops, NAMESPACE).saliency_contrast.default
    differentiable = torch.is_grad_enabled() and (saliency.requires_grad or rivals.requires_grad)
    # A Python autograd formula costs microseconds even where nothing requires a gradient.
    below = not differentiable and not torch.compiler.is_compiling()
    with torch._C._AutoDispatchBelowAutograd() if below else nullcontext():
        contrast: Tensor = op(saliency, rivals if has_targets else rivals.unsqueeze(1), per_channel)
        return contrast if has_targets else contrast.squeeze(1)


def _check(saliency: Any, rivals: Any, per_channel: Any) -> bool:
    """Whether rivals have a target dimension; raises for arguments that are not valid."""
    for name, value in (("saliency", saliency), ("rivals", rivals)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor; got {type(value).__name__}")
    if not isinstance(per_channel, bool):
        raise TypeError(f"per_channel: expected True or False; got {type(per_channel).__name__}")
    if saliency.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"saliency: expected dtype {known}; got {saliency.dtype}")
    if rivals.dtype != saliency.dtype:
        raise TypeError(f"rivals: expected the dtype of saliency, {saliency.dtype}; got {rivals.dtype}")
    if rivals.device != saliency.device:
        raise ValueError(f"rivals: expected the device of saliency, {saliency.device}; got {rivals.device}")
    own, others = tuple(saliency.shape), tuple(rivals.shape)
    if not 3 <= len(own) <= 5:
        raise ValueError(f"saliency: expected shape (N, C, *S) with 1 to 3 spatial dimensions; got {own}")
    if others == own:
        return False
    if len(others) == len(own) + 1 and others[0] == own[0] and others[2:] == own[1:]:
        return True
    rest = ", ".join(map(str, own[1:]))
    raise ValueError(
        f"rivals: expected shape ({own[0]}, {rest}) or ({own[0]}, T, {rest}) for saliency {own}; got {others}"
    )


define(
    "saliency_contrast",
    "(Tensor saliency, Tensor rivals, bool per_channel) -> Tensor",
    reference.saliency_contrast,
)


@torch.library.register_fake(f"{NAMESPACE}::saliency_contrast")
def _fake(saliency: Tensor, rivals: Tensor, per_channel: bool) -> Tensor:
    return rivals.new_empty(rivals.shape, dtype=accumulation_dtype(saliency.dtype))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    saliency, rivals, ctx.per_channel = inputs
    ctx.save_for_backward(saliency, rivals, output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    saliency, rivals, contrast = ctx.saved_tensors
    found = reference.saliency_contrast_backward(
        grad, contrast, saliency, rivals, ctx.per_channel, *ctx.needs_input_grad[:2]
    )
    return (*found, None)


torch.library.register_autograd(f"{NAMESPACE}::saliency_contrast", _backward, setup_context=_setup_context)
