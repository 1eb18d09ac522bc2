"""What the autograd graph says about the way from a layer to the logits.

Every shortcut is taken only where the whole graph, with all consumers of every node on the way, allows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from diffcam_fast.explain.capture import Captured

# Heads that average over positions are short. Looking further costs time for layers that are far from the
# logits.
_NODES_SEARCHED = 64

# What changes neither the values nor their order: an adjoint that hands the gradient through.
_SHAPING = frozenset(
    f"{name}Backward{number}"
    for name in ("View", "UnsafeView", "ReshapeAlias", "Alias", "Squeeze", "Unsqueeze", "Clone", "ToCopy")
    for number in range(3)
)

_Slot = tuple[Node, int]


@dataclass
class Pool:
    """A mean over all positions: the only thing the model does with a layer's output."""

    edge: GradientEdge
    """Where the gradient with respect to the pooled vector arrives."""

    positions: int

    shape: tuple[int, int]
    """Of the pooled vectors: (N, C)."""


@dataclass
class Tail:
    """The recorded part of one forward pass.

    Args:
        logits: ``(N, K)``, recorded.
        captured: the layers' outputs.
    """

    logits: Tensor
    captured: Mapping[str, Captured]
    pools: dict[str, Pool] = field(init=False)
    """By layer, where there is one."""

    def __post_init__(self) -> None:
        # Nothing before the only layer can use what it puts out.
        only = [layer.edges[0] for layer in self.captured.values()] if len(self.captured) == 1 else [None]
        self._reached = _reached(self.logits, None if only[0] is None else only[0].node)
        self.pools = {}
        for name, layer in self.captured.items():
            pool = self._pool(layer)
            if pool is not None:
                self.pools[name] = pool

    def _pool(self, layer: Captured) -> Pool | None:
        if self._reached is None:
            return None
        if layer.is_leaf:
            users = self._reached.leaves.get(id(layer.handed_on), [])
        else:
            users = self._reached.consumers.get((layer.used.node, layer.used.output_nr), [])
        if len(users) != 1 or not _is_mean_over_positions(users[0], layer.output.dim()):
            return None
        # Hooks between layer and mean may change the gradient.
        if layer.handed_on._backward_hooks or _has_hooks(users[0]):
            return None
        if layer.handed_on is not layer.output and _has_hooks(layer.used.node):
            return None
        images, channels, *size = layer.output.shape
        return Pool(GradientEdge(users[0], 0), torch.Size(size).numel(), (images, channels))

    def head_weight(self, name: str, *, without_hooks: bool = False) -> Tensor | None:
        """The weight (K, C), where the logits are one linear layer of the layer's pooled vector; else None.

        Hooks on tensors between the two do not show in the graph: see `is_head`.

        Args:
            name: the layer's.
            without_hooks: only where every tensor on the way can be had, and none has a hook.
        """
        pool = self.pools.get(name)
        node = self.logits.grad_fn
        if pool is None or node is None or self.logits._backward_hooks:
            return None
        while node.name() == "ToCopyBackward0" and not _has_hooks(node):
            (following,) = node.next_functions
            if following[0] is None:
                return None
            node = following[0]
        known: Any = node
        if node.name() == "AddmmBackward0" and known._saved_alpha == 1:
            sizes, vector = known._saved_mat1_sym_sizes, node.next_functions[1]
        elif node.name() == "MmBackward0":
            sizes, vector = known._saved_self_sym_sizes, node.next_functions[0]
        else:
            return None
        output = self.captured[name].output
        if tuple(sizes) != tuple(output.shape[:2]) or output.device != self.logits.device or _has_hooks(node):
            return None
        shaped = self._only_shapes(vector, pool, node)
        if shaped is None:
            return None
        if without_hooks and (node is not self.logits.grad_fn or not _are_bare(node, shaped)):
            return None
        weight: Tensor = known._saved_mat2
        return weight.detach().t()

    def _only_shapes(self, vector: tuple[Node | None, int], pool: Pool, user: Node) -> int | None:
        """How often the vector that a node uses was given another shape, if it is the pooled one and nobody else's."""
        node, number = vector
        shaped = 0
        consumers = {} if self._reached is None else self._reached.consumers
        while node is not None and consumers.get((node, number)) == [user]:
            if node is pool.edge.node:
                return shaped
            if not (node.name() in _SHAPING or _only_strides(node, pool)):
                return None
            if len(node.next_functions) != 1 or _has_hooks(node):
                return None
            user, (node, number) = node, node.next_functions[0]
            shaped += 1
        return None

    def is_head(self, name: str, weight: Tensor) -> bool:
        """Whether autograd, asked for one target, finds what `head_weight` says. Waits for the device.

        Args:
            name: the layer's.
            weight: from `head_weight`.
        """
        logits = self.logits.detach()
        # Any cotangent will do that is different for every class.
        first = torch.linspace(-1, 1, logits.shape[1], dtype=logits.dtype, device=logits.device).expand_as(logits)
        (found,) = torch.autograd.grad(self.logits, self.pools[name].edge, first, retain_graph=True)
        found = found.reshape(len(first), -1).to(first.dtype)
        expected = first @ weight.to(first.device, first.dtype)
        rounding = 8 * max(torch.finfo(dtype).eps for dtype in (self.captured[name].output.dtype, weight.dtype))
        scale = expected.abs().amax()
        return bool(((found - expected).abs() <= max(rounding, 1e-3) * scale).all())

    def bytes_per_target(self) -> int:
        """An estimate of the memory that pulling back one target takes at its peak."""
        largest = 0
        for node in _nodes(self.logits):
            for gradient in getattr(node, "_input_metadata", ()):
                largest = max(largest, torch.Size(gradient.shape).numel() * gradient.dtype.itemsize)
        kept = sum(layer.output.nbytes for layer in self.captured.values())
        # What comes in, what goes out, and what waits at a skip connection.
        return 3 * largest + kept


def _nodes(logits: Tensor) -> list[Node]:
    assert logits.grad_fn is not None
    found = [logits.grad_fn]
    seen = {logits.grad_fn}
    for node in found:
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                found.append(following)
    return found


def _are_bare(linear: Node, shaped: int) -> bool:
    """Whether the vector that a linear layer saved, and the one that it is a view of, can be had and have no hooks."""
    known: Any = linear
    # Absent where the weight is frozen.
    vector = known._saved_mat1 if linear.name() == "AddmmBackward0" else known._saved_self
    # What is unpacked anew each time, as by hooks on saved tensors, is not the tensor that the model had.
    if vector is None or vector is not (known._saved_mat1 if linear.name() == "AddmmBackward0" else known._saved_self):
        return False
    passed = [vector] if vector._base is None else [vector, vector._base]
    # Strides that were changed in place made no tensor.
    in_place = passed[-1].grad_fn is not None and _changes_strides(passed[-1].grad_fn)
    return len(passed) + in_place == shaped + 1 and not any(tensor._backward_hooks for tensor in passed)


def _changes_strides(node: Node) -> bool:
    return node.name() in ("AsStridedBackward0", "AsStridedBackward1")


def _only_strides(node: Node, pool: Pool) -> bool:
    """Whether a node gives pooled vectors other strides alone, as pooling does after channels-last layers."""
    known: Any = node
    if not _changes_strides(node) or known._saved_storage_offset is not None:
        return False
    size, stride = known._saved_size, known._saved_stride
    images, channels = pool.shape
    if tuple(size[:2]) != pool.shape or any(length != 1 for length in size[2:]):
        return False
    return (channels == 1 or stride[1] == 1) and (images == 1 or stride[0] == channels)


class _Reached(NamedTuple):
    """What a pull-back from the logits meets."""

    consumers: dict[_Slot, list[Node]]
    """Who uses each result."""

    leaves: dict[int, list[Node]]
    """Who uses each leaf, by its id."""


def _reached(logits: Tensor, end: Node | None) -> _Reached | None:
    """All that a pull-back meets, as far as a node, where it ends; None where that is much."""
    assert logits.grad_fn is not None
    consumers: dict[_Slot, list[Node]] = {}
    seen = {logits.grad_fn} if end is None else {logits.grad_fn, end}
    waiting = [logits.grad_fn]
    while waiting:
        node = waiting.pop()
        for following, number in node.next_functions:
            if following is None:
                continue
            consumers.setdefault((following, number), []).append(node)
            if following not in seen:
                if len(seen) == _NODES_SEARCHED:
                    return None
                seen.add(following)
                waiting.append(following)
    leaves = {id(node.variable): users for (node, _), users in consumers.items() if hasattr(node, "variable")}
    return _Reached(consumers, leaves)


def _has_hooks(node: Node) -> bool:
    # A node does not tell, but a hook's handle knows the others.
    for register in (node.register_hook, node.register_prehook):
        handle: Any = register(_no_change)
        hooks = handle.hooks_dict_ref()
        others = len(hooks) - 1
        handle.remove()
        if others:
            return True
    return False


def _no_change(*gradients: Any) -> None:
    return None


def _is_mean_over_positions(node: Node, dimensions: int) -> bool:
    if node.name() != "MeanBackward1":
        return False
    # Saved as unsigned integers: -1 comes as 2^64 - 1.
    saved = node._saved_dim  # type: ignore[attr-defined]
    reduced = {(dim - 2**64 if dim >= 2**63 else dim) % dimensions for dim in saved or ()}
    return dimensions > 2 and reduced == set(range(2, dimensions))
