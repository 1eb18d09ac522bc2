"""Maps of every method and target from one forward pass, and how two of them are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffcam_fast.explain import Scores, Target
from diffcam_fast.explain.capture import Capture
from diffcam_fast.explain.evaluation import evaluating
from diffcam_fast.explain.finishing import finished
from diffcam_fast.explain.targets import TargetFunction, score
from diffcam_fast.ops.cam import cam
from diffcam_fast.reference.cam import METHODS

BATCH = 4


@dataclass(frozen=True)
class Evidence:
    """Maps of some images, before ReLU and normalisation.

    Attributes:
        logits: float32 (N, K).
        maps: by method, float32 (N, targets, classes an image, h, w).
    """

    logits: Tensor
    maps: dict[str, Tensor]


@dataclass(frozen=True)
class Sharper(Target):
    """A target of a network that is more certain: one whose logits are `factor` times as large."""

    inner: Target | TargetFunction
    factor: float

    def scores(self, logits: Tensor, classes: Tensor) -> Scores:
        """See `Target.scores`."""
        found = score(self.inner, logits * self.factor, classes)
        return Scores(found.delta, found.cotangent * self.factor)


def evidence(
    model: nn.Module,
    layer: str,
    images: Tensor,
    classes: Tensor,
    targets: Mapping[str, Target | TargetFunction],
    methods: Sequence[str] = METHODS,
    *,
    scored_in: torch.dtype = torch.float32,
) -> Evidence:
    """Every method's map of every target and class, from one forward pass for each batch.

    The maps that an `Explainer` for each method and target makes in as many passes.

    Args:
        model: of float32 or half precision; it gets the images in its own dtype.
        layer: dotted name.
        images: float32 (N, 3, H, W).
        classes: int64 (N, classes an image).
        targets: by name, each with one score a class.
        methods: of `METHODS`.
        scored_in: dtype in which logits are turned into the targets' gradients.
    """
    dtype = next(model.parameters()).dtype
    logits: list[Tensor] = []
    maps: dict[str, list[Tensor]] = {method: [] for method in methods}
    for part, chosen in zip(images.split(BATCH), classes.split(BATCH), strict=True):
        with evaluating(model):
            with Capture({layer: model.get_submodule(layer)}) as capture:
                output = model(part.to(dtype))
            captured = capture.outputs()[layer]
            wide = output.detach().to(scored_in)
            cotangents = torch.cat([score(target, wide, chosen).cotangent for target in targets.values()], 1)
            pulled = [
                torch.autograd.grad(output, captured.edge, cotangent.to(dtype), retain_graph=True)[0]
                for cotangent in cotangents.unbind(1)
            ]
            gradients, activations = torch.stack(pulled, 1), captured.output.detach()
            for method in methods:
                found = cam(activations, gradients, method, relu=False, normalize=None)
                maps[method].append(found.reshape(len(part), len(targets), -1, *found.shape[2:]))
        logits.append(output.detach().float())
    return Evidence(torch.cat(logits), {method: torch.cat(parts) for method, parts in maps.items()})


def change(before: Tensor, after: Tensor) -> Tensor:
    """Largest difference of raw maps (..., h, w) as a share of the range of `before`; NaN where that is constant."""
    span = before.amax((-2, -1)) - before.amin((-2, -1))
    return (after - before).abs().amax((-2, -1)) / torch.where(span > 0, span, torch.nan)


def correlation(one: Tensor, other: Tensor) -> Tensor:
    """Pearson's coefficient of maps (..., h, w); NaN where one is constant."""
    one, other = (maps.double().flatten(-2) for maps in (one, other))
    one, other = (maps - maps.mean(-1, keepdim=True) for maps in (one, other))
    return (one * other).sum(-1) / (one.norm(dim=-1) * other.norm(dim=-1))


def shown(raw: Tensor) -> Tensor:
    """What a user sees of raw maps (..., h, w): after ReLU, from 0 to 1."""
    return finished(raw.reshape(-1, 1, *raw.shape[-2:]), True, "minmax").reshape(raw.shape)


def peaks_at_corner(raw: Tensor) -> Tensor:
    """Whether the largest value of raw maps (..., h, w) is positive and at the top left."""
    flat = raw.flatten(-2)
    return (flat.argmax(-1) == 0) & (flat[..., 0] > 0)


def likeness_of_classes(raw: Tensor) -> Tensor:
    """Mean Pearson coefficient of each pair of an image's finished maps: (N, classes, h, w) -> (N,)."""
    maps = shown(raw)
    pairs = torch.combinations(torch.arange(maps.shape[1]))
    return correlation(maps[:, pairs[:, 0]], maps[:, pairs[:, 1]]).nanmean(1)
