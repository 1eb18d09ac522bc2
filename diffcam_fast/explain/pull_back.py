"""From cotangents at the logits to gradients at the layers, and no further."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from diffcam_fast.explain.graph import Tail


def check_differentiable(logits: Tensor, layers: list[str]) -> None:
    """Raise ValueError where there is no way back from the logits to any layer."""
    if not logits.requires_grad:
        names = ", ".join(repr(name) for name in layers)
        raise ValueError(
            f"layers: the logits do not depend differentiably on {names}: there is no gradient to explain by "
            "(the model's forward detaches, switches gradients off, leaves PyTorch, or does not use the layer)"
        )


def pull_back(
    tail: Tail, cotangents: Tensor, *, chunk_size: int | None, memory_budget: int, pooled: bool, last: bool
) -> Iterator[dict[str, Tensor]]:
    """Gradients of the targets' scores with respect to the layers' outputs.

    Only what lies between the layers and the logits is computed: no parameter gets a gradient.

    Args:
        tail: what was recorded.
        cotangents: ``(N, T, K)``, in the dtype of the logits.
        chunk_size: targets per pass; None: as many as the budget allows. More than one are batched by
            `torch.vmap` over the backward.
        memory_budget: bytes that the gradients of one pass may take, unless one target takes more.
        pooled: gradients that are the same at every position, because all the model does with the layer's
            output is to take its mean over positions, may be given once.
        last: whether nothing else will be pulled back through the tail.

    Yields:
        For each chunk of targets, by layer: ``(t, N, *shape of the output)``, or ``(t, N, C)`` where given
        once.

    Raises:
        ValueError: the logits do not depend on a layer.
        RuntimeError: an operator's backward fails, or cannot be batched.
    """
    pools = tail.pools if pooled else {}
    edges = [pools[name].edge if name in pools else layer.edge for name, layer in tail.captured.items()]
    targets = cotangents.shape[1]
    step = chunk_size
    if step is None:
        step = 1 if targets == 1 else max(1, memory_budget // max(tail.bytes_per_target(), 1))
    for start in range(0, targets, step):
        chunk = cotangents[:, start : start + step].transpose(0, 1)
        gradients = _gradients(tail.logits, edges, chunk, last=last and start + step >= targets)
        found = {}
        for (name, layer), gradient in zip(tail.captured.items(), gradients, strict=True):
            if gradient is None:
                raise ValueError(f"layers: the logits do not depend on layer {name!r}")
            if name in pools:
                shape = (len(chunk), *layer.output.shape[:2])
                gradient = (gradient.reshape(shape) / pools[name].positions).to(layer.output.dtype)
            found[name] = gradient
        del gradients
        yield found


def _gradients(logits: Tensor, edges: list[GradientEdge], cotangents: Tensor, *, last: bool) -> list[Tensor | None]:
    if len(cotangents) == 1:
        single = torch.autograd.grad(logits, edges, cotangents[0], retain_graph=not last, allow_unused=True)
        return [None if gradient is None else gradient.unsqueeze(0) for gradient in single]
    try:
        return list(
            torch.autograd.grad(
                logits, edges, cotangents, retain_graph=not last, allow_unused=True, is_grads_batched=True
            )
        )
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RuntimeError(
            f"pulling back {len(cotangents)} targets in one pass failed: {error}. If an operator's backward "
            "cannot be batched (torch.vmap), pass chunk_size=1 to the explainer"
        ) from error
