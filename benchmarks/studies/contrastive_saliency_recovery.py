"""The recovery curve: attacked images whose first pixels in a ranking are perturbed, and how many are right again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.studies.study import Settings
from diffcam_fast.robustness.adversarial import carlini_wagner
from diffcam_fast.saliency.contrast import contrastive_saliency

#: Rankings that explain nothing.
RANDOM, PERTURBATION = "random", "the attack's perturbation"
CONTROLS = (RANDOM, PERTURBATION)

_BATCH = 24


class Recovery(NamedTuple):
    """Which images are right again."""

    fractions: tuple[float, ...]
    """Of the pixels, that are perturbed."""

    right: Mapping[str, Tensor]
    """By ranking: (images, fractions), 1 where the network decides for the label, else 0."""

    norm: float
    """Mean Euclidean norm of the perturbations."""

    @property
    def images(self) -> int:
        """How many there are."""
        return len(next(iter(self.right.values())))

    def mean(self, ranking: str) -> Tensor:
        """The share of fractions above 0 at which each image is right."""
        above = torch.tensor(self.fractions) > 0
        return self.right[ranking][:, above].mean(1)


def recover(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    methods: Mapping[str, Callable[..., Any]],
    fractions: Sequence[float],
    attack: Mapping[str, Any],
    settings: Settings,
) -> Recovery:
    """Attack images, rank their pixels by every method's map and its contrast, perturb, and ask the model again.

    Args:
        model: a classifier of images from 0 to 1.
        images: (N, C, H, W).
        labels: (N,); images that the model gets wrong, and those on which the attack fails, are left out.
        methods: saliency methods by name.
        fractions: of the pixels, from 0 to 1.
        attack: options of `carlini_wagner`.
        settings: for the progress bar and the seed.
    """
    generator = settings.generator(1)
    right: dict[str, list[Tensor]] = {}
    norms = []
    for part, names in settings.track(
        zip(images.split(_BATCH), labels.split(_BATCH), strict=True), "recovery", -(-len(images) // _BATCH)
    ):
        with torch.no_grad():
            correct = model(part).argmax(1) == names
        found = carlini_wagner(model, part[correct], names[correct], **attack)
        attacked, truth = found.images[found.succeeded], names[correct][found.succeeded]
        norms.append(found.l2[found.succeeded])
        change = (attacked - part[correct][found.succeeded]).abs().sum(1)
        noise = torch.rand(change.shape, generator=generator).to(change.device)
        scores = {RANDOM: noise, PERTURBATION: change}
        for name, method in methods.items():
            explained = contrastive_saliency(model, attacked, method=method)
            scores[name] = explained.saliency.relu().sum(1)
            scores[f"contrast of {name}"] = explained.contrast[:, 0].sum(1)
        for name, score in scores.items():
            right.setdefault(name, []).append(
                torch.stack([_is_right(model, perturbed(attacked, score, share), truth) for share in fractions], 1)
            )
    return Recovery(
        tuple(fractions), {name: torch.cat(parts) for name, parts in right.items()}, float(torch.cat(norms).mean())
    )


def perturbed(images: Tensor, scores: Tensor, fraction: float) -> Tensor:
    """Images in which the pixels with the largest scores take the mean of the 3 x 3 pixels around them.

    Args:
        images: (N, C, H, W).
        scores: (N, H, W).
        fraction: of the pixels, from 0 to 1; rounded to whole pixels.
    """
    around = functional.avg_pool2d(functional.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    flat = scores.flatten(1)
    first = flat.topk(round(fraction * flat.shape[1]), dim=1).indices
    chosen = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, first, True).view_as(scores)
    return torch.where(chosen.unsqueeze(1), around, images)


def _is_right(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().cpu()
