"""Maps of every explanation from one forward pass, and how alike they are to the hoax and to what they were before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.studies.fooling_tasks import Task
from benchmarks.studies.statistics import Interval, mean_interval
from diffcam_fast import cam
from diffcam_fast.explain import Finer, Logit, LogitDifference, Probability, Target
from diffcam_fast.reference.cam import METHODS
from diffcam_fast.robustness.agreement import pearson, rmse, ssim
from diffcam_fast.robustness.fooling import PassiveFooling, Step
from diffcam_fast.robustness.fooling_losses import MapLoss
from diffcam_fast.robustness.fooling_maps import differentiable_scores, record
from diffcam_fast.robustness.hoax import map_entropy

EXPLAINED: dict[str, Target] = {
    "logit": Logit(),
    "probability": Probability(),
    "difference, logsumexp": LogitDifference("logsumexp"),
    "difference, expected": LogitDifference("expected"),
    "difference, mean": LogitDifference("mean"),
    "difference, max": LogitDifference("max"),
    "difference, finer": Finer(),
}
DIFFERENCES = tuple(name for name in EXPLAINED if name.startswith("difference"))
MEASURES = ("SSIM to hoax", "Pearson to hoax", "RMSE to hoax", "SSIM to clean", "Pearson to clean", "RMSE to clean")
Key = tuple[str, str]
"""An explanation: the name of its target, and its method."""

_BATCH = 100


@dataclass(frozen=True)
class Explained:
    """What a network says of images.

    Attributes:
        probabilities: (N, K), float32.
        maps: by explanation, of each image's classes: (N, T, h, w) at the layer's own size, after ReLU, from 0 to 1.
    """

    probabilities: Tensor
    maps: dict[Key, Tensor]

    def correct(self, labels: Tensor) -> Tensor:
        """Which images are classified as labelled, bool (N,)."""
        return self.probabilities.argmax(1) == labels


def explain(model: nn.Module, layer: str, images: Tensor, classes: Tensor, device: torch.device) -> Explained:
    """All explanations of classes: one forward pass, a pull-back for each target and class.

    Args:
        model: in eval mode.
        layer: dotted name.
        images: uint8 (N, 3, H, W).
        classes: int64 (N, T).
        device: of the model.
    """
    probabilities: list[Tensor] = []
    found: dict[Key, list[Tensor]] = {(name, method): [] for name in EXPLAINED for method in METHODS}
    for part, wanted in zip(images.split(_BATCH), classes.split(_BATCH), strict=True):
        with torch.no_grad():  # up to the layer, from which on the recording is switched on
            recorded = record(model, layer, model.get_submodule(layer), (part.float() / 255).to(device))
        activations = recorded.activations.detach()
        probabilities.append(recorded.logits.detach().softmax(1).cpu())
        for name, target in EXPLAINED.items():
            scores = differentiable_scores(target, recorded.logits, wanted.to(device)).sum(0)
            gradients = torch.stack(
                [torch.autograd.grad(score, recorded.activations, retain_graph=True)[0] for score in scores], 1
            )
            for method in METHODS:
                found[name, method].append(cam(activations, gradients, method).cpu())
    return Explained(torch.cat(probabilities), {key: torch.cat(maps) for key, maps in found.items()})


def similarities(maps: dict[Key, Tensor], clean: dict[Key, Tensor], hoax: Tensor) -> dict[Key, dict[str, Tensor]]:
    """The measures of each image's only map, and its entropy, by explanation and name.

    Args:
        maps: (N, 1, h, w) by explanation.
        clean: the same of the network before the attack.
        hoax: (h, w).

    Returns:
        float64 (N,) each. An empty map correlates with nothing and has no entropy: NaN.
    """
    keys = list(maps)
    all_maps, all_clean = (torch.stack([given[key][:, 0] for key in keys]) for given in (maps, clean))
    found = {"entropy": map_entropy(all_maps)}
    for what, other in (("hoax", hoax.expand_as(all_maps)), ("clean", all_clean)):
        found[f"SSIM to {what}"] = ssim(all_maps, other)
        found[f"Pearson to {what}"] = pearson(all_maps, other)
        found[f"RMSE to {what}"] = rmse(all_maps, other)
    return {key: {name: values[row].double() for name, values in found.items()} for row, key in enumerate(keys)}


@dataclass(frozen=True)
class Outcome:
    """What one attack did, over its seeds.

    Attributes:
        correct: (seeds, N), 1 where an image is classified as labelled.
        agrees: (seeds, N), 1 where the prediction is the clean network's.
        moved: (seeds, N), half the sum of the changes of an image's probabilities (total variation).
        measures: by explanation and measure, (seeds, N).
        reached: by explanation, the attack's own loss of the maps, (seeds, M): for active fooling of the images
            of its two classes, for other attacks of all.
        unattacked: the same of the clean network's maps, (M,).
        maps: by explanation, those of the first seed, (N, 1, h, w).
        training: what the first and the last step of each seed found.
    """

    correct: Tensor
    agrees: Tensor
    moved: Tensor
    measures: dict[Key, dict[str, Tensor]]
    reached: dict[Key, Tensor]
    unattacked: dict[Key, Tensor]
    maps: dict[Key, Tensor]
    training: list[tuple[Step, Step]]

    def interval(self, key: Key, measure: str) -> Interval:
        """Mean over images and seeds, with its interval over images, each the mean of its seeds."""
        return mean_interval(self.measures[key][measure].nanmean(0))

    def over_seeds(self, key: Key, measure: str) -> Interval:
        """The same mean, with its interval over seeds, each the mean of its images."""
        return mean_interval(self.measures[key][measure].nanmean(1))


def attacked(
    task: Task, clean: Explained, hoax: Tensor, loss: MapLoss, networks: list[PassiveFooling], steps: list[list[Step]]
) -> Outcome:
    """The outcome of an attack.

    Args:
        task: that was attacked.
        clean: what its network says of the test images.
        hoax: (h, w).
        loss: the attack's.
        networks: what the attack made of the network, for each seed.
        steps: of their training.
    """
    device = next(task.model.parameters()).device
    labels = task.test_labels.unsqueeze(1)
    found = [explain(each.model, task.layer, task.test, labels, device) for each in networks]
    if torch.equal(loss.classes(task.test_labels), labels):
        compared, before = found, clean
    else:
        chosen = loss.counts(task.test_labels)
        images, classes = task.test[chosen], loss.classes(task.test_labels)[chosen]
        compared = [explain(each.model, task.layer, images, classes, device) for each in networks]
        before = explain(task.model, task.layer, images, classes, device)
    measures = [similarities(each.maps, clean.maps, hoax) for each in found]
    probabilities = torch.stack([each.probabilities for each in found])
    return Outcome(
        torch.stack([each.correct(task.test_labels).double() for each in found]),
        (probabilities.argmax(2) == clean.probabilities.argmax(1)).double(),
        (probabilities - clean.probabilities).abs().sum(2).double() / 2,
        {key: _stacked([seed[key] for seed in measures]) for key in clean.maps},
        {key: torch.stack([_losses(loss, each, before, key) for each in compared]) for key in clean.maps},
        {key: _losses(loss, before, before, key) for key in clean.maps},
        found[0].maps,
        [(each[0], each[-1]) for each in steps],
    )


def _losses(loss: MapLoss, found: Explained, before: Explained, key: Key) -> Tensor:
    return loss(found.maps[key], before.maps[key]).double()


def _stacked(seeds: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([seed[name] for seed in seeds]) for name in seeds[0]}


def clean_likeness(clean: Explained, method: str, name: str) -> dict[str, Interval]:
    """How alike a clean network's maps are to those of single logits by the same method."""
    maps, logit = clean.maps[name, method][:, 0], clean.maps["logit", method][:, 0]
    return {"Pearson": mean_interval(pearson(maps, logit)), "SSIM": mean_interval(ssim(maps, logit))}
