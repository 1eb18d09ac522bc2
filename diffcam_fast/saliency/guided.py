"""Guided back-propagation: ReLUs let only positive gradients back, in the graph of one pass and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import Node

from diffcam_fast.explain.targets import Logit, Target, TargetFunction
from diffcam_fast.saliency.gradients import Saliency, pulled_back

#: Nodes that are ReLU whatever they saved, and where the others save what they cut off below.
_ALWAYS = ("ReluBackward",)
_WHERE_LEAST_IS_ZERO = {
    "HardtanhBackward": "_saved_min_val",  # ReLU6 is one
    "ThresholdBackward": "_saved_threshold",
    "ClampBackward": "_saved_min",
    "ClampMinBackward": "_saved_min",
}

#: Nodes that hide others: what they do on the way back cannot be seen or changed.
_OPAQUE = {
    "CompiledFunctionBackward": "a compiled model; pass the model that was compiled",
    "CheckpointFunctionBackward": "reentrant checkpoints; use checkpoints with use_reentrant=False",
    "torch::autograd::CopySlices": "an operation in place on a part of a tensor",
}


def guided_backpropagation(
    model: nn.Module,
    images: Tensor,
    classes: Any = None,
    *,
    target: Target | TargetFunction = Logit(),  # noqa: B008 (immutable)
    chunk_size: int = 1,
) -> Saliency:
    """The gradient, but for ReLUs, which let back only what is positive.

    Springenberg, Dosovitskiy, Brox and Riedmiller, "Striving for Simplicity: The All Convolutional Net", ICLR workshop
    2015. The pictures are sharp, and much the same for every class: see `contrastive_saliency`.

    The rule is that of ReLU and of what ends below like it (`nn.ReLU6`, `clamp` from 0 on, `nn.Hardtanh` and
    `nn.Threshold` from 0 on), called as a module or a function, in place or not, and as many times as the model likes:
    it is applied to the autograd graph of this one pass. The model runs in evaluation mode; its modules, flags,
    gradients and hooks are left as they were.

    Args:
        model: a classifier: images ``(N, C, *S)`` to logits ``(N, K)``, with ReLUs in it.
        images: floating point, one to three spatial dimensions, on the model's device.
        classes: None (the predicted class), an integer for all images, or integers ``(N,)`` or ``(N, T)``.
        target: what is explained: see `Explainer`. One score a class: no pairwise targets.
        chunk_size: how many of the T classes are pulled back together: see `gradient`.

    Returns:
        The attributions, which may be of either sign, with classes and scores.

    Raises:
        TypeError: an argument is not of a type above.
        ValueError: classes or chunk size are out of range or of the wrong shape; the model does not return logits that
            depend on the images differentiably, has no ReLU on the way, or one might be hidden: in a compiled model, a
            reentrant checkpoint, or an operation in place on a part of a tensor.
    """
    return pulled_back(model, images, classes, target, chunk_size, _guiding)


@contextmanager
def _guiding(logits: Tensor) -> Iterator[None]:
    """Within, going back through the graph of the logits follows the rule."""
    handles = [node.register_prehook(_only_positive) for node in _rectifiers(logits)]
    if not handles:
        raise ValueError(
            "model: expected ReLU, ReLU6 or a clamp from 0 on between the images and the logits; found none: guided "
            "back-propagation is not defined for other activations"
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _only_positive(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    # ReLU's own rule, zero where its input was not positive, comes after this.
    return tuple(None if gradient is None else gradient.relu() for gradient in gradients)


def _rectifiers(logits: Tensor) -> list[Node]:
    assert logits.grad_fn is not None
    found: list[Node] = []
    seen = {logits.grad_fn}
    waiting = [logits.grad_fn]
    while waiting:
        node = waiting.pop()
        name = node.name()
        if name in _OPAQUE:
            raise ValueError(f"model: guided back-propagation cannot look into {_OPAQUE[name]}")
        if _is_rectifier(node, name):
            found.append(node)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return found


def _is_rectifier(node: Node, name: str) -> bool:
    stem = name.rstrip("0123456789")
    if stem in _ALWAYS:
        return True
    least = getattr(node, _WHERE_LEAST_IS_ZERO[stem], None) if stem in _WHERE_LEAST_IS_ZERO else None
    # A tensor as a bound is no number to compare with: its node is left alone.
    return isinstance(least, int | float) and least == 0
