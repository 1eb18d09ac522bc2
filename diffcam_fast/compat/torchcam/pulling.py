"""From scores to the gradients of the recorded layers, and no further."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from diffcam_fast.compat.torchcam.recording import Recorded
from diffcam_fast.compat.torchcam.scoring import Scores
from diffcam_fast.explain.capture import Captured
from diffcam_fast.explain.graph import Tail, _has_hooks, _is_mean_over_positions

# Heads that average over positions are short.
_NODES_SEARCHED = 24

NEEDS_RETAIN_GRAPH = "a second map of the same pass needs retain_graph=True for the first"

_LAYER = "target_layer"

# Looking for a mean takes longer than the gradient of fewer elements.
_WORTH_POOLING = 2**15


class LinearHead:
    """The weight of a model's head in the place of a pull-back, where the head is one linear layer of means."""

    def __init__(self) -> None:
        self._agrees: bool | None = None

    def gradients(self, scores: Scores, layer: Recorded) -> Tensor | None:
        """What `pull_back` would find, given once; None where it has to be asked.

        Args:
            scores: sums of logits.
            layer: what was recorded.
        """
        logits, chosen = scores.outputs, scores.chosen
        if logits is None or chosen is None or self._agrees is False or logits.grad_fn is None or len(logits) == 0:
            return None
        if logits.dtype != layer.output.dtype or logits.dtype not in (torch.float32, torch.float64):
            return None
        captured = Captured(layer.output, layer.output, (layer.edge, layer.edge), (0, 0), False)
        tail = Tail(logits, {_LAYER: captured})
        try:
            weight = tail.head_weight(_LAYER, without_hooks=True)
        except RuntimeError:
            # The graph has been used up, or the weight changed meanwhile: `pull_back` says so.
            return None
        if weight is None:
            return None
        if self._agrees is None:
            # What the graph shows is taken at its word only after autograd has confirmed it once.
            self._agrees = tail.is_head(_LAYER, weight)
            if not self._agrees:
                return None
        found = chosen.times(weight).div_(tail.pools[_LAYER].positions)
        return found.transpose(0, 1) if scores.several else found[0]


def pull_back(scores: Scores, layers: Sequence[Recorded | None], *, pooled: bool, retain_graph: bool) -> list[Tensor]:
    """Gradients of scores with respect to layers' outputs.

    Args:
        scores: T of them, scalars.
        layers: what was recorded.
        pooled: gradients that are the same at every position, because all the model does with the layer's output is
            to take its mean over positions, may be given once.
        retain_graph: more will be pulled back through the same graph.

    Returns:
        For each layer ``(N, C, *positions)``, or ``(N, C)`` where given once; for several scores
        ``(N, T, C, *positions)`` or ``(N, T, C)``.

    Raises:
        RuntimeError: there is no way from the scores to a layer, or its graph has been freed.
    """
    known = [layer for layer in layers if layer is not None]
    if len(known) < len(layers) or not all(score.requires_grad for score in scores.values):
        raise RuntimeError(
            "scores: expected a tensor that depends differentiably on every target layer. Where gradients are switched "
            "off (torch.no_grad, torch.inference_mode), call the model as a whole and pass its output as it is"
        )
    pooled = pooled and (scores.alike or len(scores.values) == 1)
    pools = [_pool(scores.values[0], layer) if pooled else None for layer in known]
    edges = [pool or layer.edge for pool, layer in zip(pools, known, strict=True)]
    found: list[list[Tensor]] = [[] for _ in known]
    for number, score in enumerate(scores.values):
        retain = retain_graph or number + 1 < len(scores.values)
        try:
            ones = None if score.numel() == 1 else torch.ones_like(score)
            gradients = torch.autograd.grad(score, edges, ones, retain_graph=retain, allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(f"scores: cannot be differentiated ({error}); {NEEDS_RETAIN_GRAPH}") from error
        for layer, pool, gradient, into in zip(known, pools, gradients, found, strict=True):
            if gradient is None:
                raise RuntimeError(
                    "scores: expected a tensor that depends on every target layer; got one that does not"
                )
            if pool is not None:
                gradient = (gradient.reshape(layer.shape[:2]) / layer.shape[2:].numel()).to(layer.output.dtype)
            into.append(gradient)
    return [torch.stack(each, 1) if scores.several else each[0] for each in found]


def _pool(scores: Tensor, layer: Recorded) -> GradientEdge | None:
    """Where the gradient of the layer's mean over positions arrives, if nothing else is made of its output."""
    if layer.shape.numel() < _WORTH_POOLING or layer.output._backward_hooks:
        return None
    last = layer.output.grad_fn
    assert last is not None and scores.grad_fn is not None
    users: list[Node] = []
    seen = {scores.grad_fn, last}
    waiting = [scores.grad_fn]
    while waiting:
        node = waiting.pop()
        for following, number in node.next_functions:
            if following is last:
                if number != layer.output.output_nr:
                    return None
                users.append(node)
            elif following is not None and following not in seen:
                if len(seen) == _NODES_SEARCHED:
                    return None
                seen.add(following)
                waiting.append(following)
    if len(users) != 1 or not _is_mean_over_positions(users[0], layer.output.dim()) or _has_hooks(users[0]):
        return None
    # What was done to the output in place, or to its copy, would show here.
    if last is not layer.edge.node and (last.name() != "CloneBackward0" or _has_hooks(last)):
        return None
    return GradientEdge(users[0], 0)
