"""From cotangents at the logits to gradients at the layers, and no further."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from diffcam_fast.explain.capture import Captured

# Heads that average over positions are short. Looking further costs time for layers that are far from the
# logits.
_NODES_SEARCHED = 64


def pull_back(
    logits: Tensor,
    captured: Mapping[str, Captured],
    cotangents: Tensor,
    *,
    chunk_size: int | None,
    pooled: bool,
) -> Iterator[dict[str, Tensor]]:
    """Gradients of the targets' scores with respect to the layers' outputs.

    Only what lies between the layers and the logits is computed: no parameter gets a gradient.

    Args:
        logits: ``(N, K)``, with the history that leads to the layers.
        captured: the layers' outputs.
        cotangents: ``(N, T, K)``, in the dtype of the logits.
        chunk_size: targets per pass; None: all in one. More than one are batched by `torch.vmap` over the
            backward.
        pooled: gradients that are the same at every position, because all the model does with the layer's
            output is to take its mean over positions, may be given once.

    Yields:
        For each chunk of targets, by layer: ``(t, N, *shape of the output)``, or ``(t, N, C)`` where given
        once.

    Raises:
        ValueError: the logits do not depend on a layer, or not differentiably.
        RuntimeError: an operator's backward fails, or cannot be batched.
    """
    if not logits.requires_grad:
        names = ", ".join(repr(name) for name in captured)
        raise ValueError(
            f"layers: the logits do not depend differentiably on {names}: there is no gradient to explain by "
            "(the model's forward detaches, switches gradients off, leaves PyTorch, or does not use the layer)"
        )
    means = _means_over_positions(logits, captured) if pooled else {}
    edges = [
        GradientEdge(means[name], 0) if name in means else get_gradient_edge(layer.output)
        for name, layer in captured.items()
    ]
    targets = cotangents.shape[1]
    step = targets if chunk_size is None else chunk_size
    for start in range(0, targets, step):
        chunk = cotangents[:, start : start + step].transpose(0, 1)
        gradients = _gradients(logits, edges, chunk, last=start + step >= targets)
        found = {}
        for (name, layer), gradient in zip(captured.items(), gradients, strict=True):
            if gradient is None:
                raise ValueError(f"layers: the logits do not depend on layer {name!r}")
            if name in means:
                shape = layer.output.shape
                positions = shape[2:].numel()
                gradient = (gradient.reshape(len(gradient), *shape[:2]) / positions).to(layer.output.dtype)
            found[name] = gradient
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


def _means_over_positions(logits: Tensor, captured: Mapping[str, Captured]) -> dict[str, Node]:
    """Mean nodes, for the layers whose output goes nowhere but into a mean over all its positions."""
    consumers: dict[Node, list[Node]] = {layer.handed_on: [] for layer in captured.values()}
    assert logits.grad_fn is not None
    seen = {logits.grad_fn}
    waiting = [logits.grad_fn]
    while waiting:
        node = waiting.pop()
        for following, _ in node.next_functions:
            if following is None:
                continue
            if following in consumers:
                consumers[following].append(node)
            if following not in seen:
                seen.add(following)
                waiting.append(following)
        if len(seen) > _NODES_SEARCHED:
            return {}
    means = {}
    for name, layer in captured.items():
        nodes = consumers[layer.handed_on]
        if len(nodes) == 1 and _is_mean_over_positions(nodes[0], layer.output.dim()):
            means[name] = nodes[0]
    return means


def _is_mean_over_positions(node: Node, dimensions: int) -> bool:
    if node.name() != "MeanBackward1":
        return False
    # Saved as unsigned integers: -1 comes as 2^64 - 1.
    saved = node._saved_dim  # type: ignore[attr-defined]
    reduced = {(dim - 2**64 if dim >= 2**63 else dim) % dimensions for dim in saved or ()}
    return dimensions > 2 and reduced == set(range(2, dimensions))
