"""From a recorded forward pass to maps: scores, pull-back and one fused pass over both results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from diffcam_fast.explain.finishing import EPS, unchecked_cam
from diffcam_fast.explain.graph import Tail
from diffcam_fast.explain.head import FEW, LinearHead
from diffcam_fast.explain.pull_back import pull_back
from diffcam_fast.explain.shared import SharedScores
from diffcam_fast.explain.targets import Logit, Scores, Target, TargetFunction, score
from diffcam_fast.ops.cam import DTYPES, cam


class Recipe(NamedTuple):
    """How gradients become maps; the arguments of `Explainer`."""

    method: str
    target: Target | TargetFunction
    normalize: str | None
    relu: bool
    reshape: Callable[[Tensor], Tensor] | None
    chunk_size: int | None
    memory_budget: int


class Evidence(NamedTuple):
    """Layer maps (N, T, *S) by layer, with the scores that they explain."""

    layer_maps: dict[str, Tensor]
    delta: Tensor
    rivals: Tensor | None


def gather_evidence(
    recipe: Recipe,
    tail: Tail,
    activations: Mapping[str, Tensor],
    classes: Tensor,
    device: torch.device,
    head_weight: Tensor | None,
) -> Evidence:
    """Maps of every layer for every target.

    Args:
        recipe: what to do.
        tail: what was recorded; its logits are float32 or float64.
        activations: the layers' outputs as ``(N, C, *positions)``.
        classes: ``(N, T)``, int64.
        device: where the maps go.
        head_weight: ``(K, C)``, where the logits are one linear layer of the mean over the positions of the only
            layer.
    """
    logits = tail.logits.detach()
    head = None
    if head_weight is not None:
        ((_, only),) = activations.items()
        head = LinearHead(only, head_weight, recipe.method, recipe.relu, recipe.normalize, recipe.memory_budget)
    parts: list[Evidence] = []
    shared = None
    # The gradient of a single logit is a row of the weight: nothing has to be multiplied.
    if head is not None and (classes.shape[1] >= FEW or type(recipe.target) is Logit):
        shared = recipe.target.shared_scores(logits, classes) if isinstance(recipe.target, Target) else None
    scores: Scores | SharedScores
    for chosen, last in [(classes, True)] if shared is not None else _affordable(classes, logits, recipe):
        found: dict[str, list[Tensor]] = {name: [] for name in activations}
        if head is not None:
            scores = score(recipe.target, logits, chosen) if shared is None else shared
            (name,) = activations
            found[name].append(head.maps(scores.cotangent).to(device))
        else:
            scores = score(recipe.target, logits, chosen)
            for gradients in pull_back(
                tail,
                scores.cotangent,
                chunk_size=recipe.chunk_size,
                memory_budget=recipe.memory_budget,
                pooled=recipe.reshape is None,
                last=last,
            ):
                for name in list(gradients):
                    found[name].append(maps_of(recipe, activations[name], gradients.pop(name)).to(device))
        layer_maps = {name: maps[0] if len(maps) == 1 else torch.cat(maps, 1) for name, maps in found.items()}
        parts.append(Evidence(layer_maps, scores.delta, scores.rivals))
    if len(parts) == 1:
        return parts[0]
    return Evidence(
        {name: torch.cat([part.layer_maps[name] for part in parts], 1) for name in activations},
        torch.cat([part.delta for part in parts], 1),
        None if parts[0].rivals is None else torch.cat([part.rivals for part in parts if part.rivals is not None], 1),
    )


def _affordable(classes: Tensor, logits: Tensor, recipe: Recipe) -> Iterator[tuple[Tensor, bool]]:
    """Classes in chunks whose cotangents the memory budget allows, and whether a chunk is the last."""
    targets = recipe.target.targets_per_class if isinstance(recipe.target, Target) else 1
    step = max(1, recipe.memory_budget // max(logits.nbytes * targets, 1))
    for start in range(0, classes.shape[1], step):
        yield classes[:, start : start + step], start + step >= classes.shape[1]


def maps_of(recipe: Recipe, activations: Tensor, gradient: Tensor) -> Tensor:
    """Finished maps (N, t, *positions) from gradients (t, N, *output) or (t, N, C)."""
    if recipe.reshape is not None:
        count = gradient.shape[0]
        flat = recipe.reshape(gradient.flatten(0, 1))
        gradient = flat.reshape(count, *activations.shape)
    gradients = gradient.transpose(0, 1)
    if gradients.dim() == activations.dim() == 3:
        # (N, t, C) could be taken for one gradient (N, C, S) where t = C = S.
        gradients = gradients.unsqueeze(3).expand(*gradients.shape, activations.shape[2])
    if recipe.reshape is None and activations.dtype in DTYPES and not torch.compiler.is_compiling():
        # Autograd vouches for the gradient. With many layers the checks would add up.
        return unchecked_cam(activations, gradients, recipe.method, recipe.relu, recipe.normalize)
    return cam(activations, gradients, recipe.method, relu=recipe.relu, normalize=recipe.normalize, eps=EPS)
