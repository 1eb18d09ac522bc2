"""What the study of adversarial images computes for a network, and how regions are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.studies.networks import Network
from benchmarks.studies.study import Settings
from diffcam_fast.explain import Explainer, Logit, LogitDifference, Probability, Target
from diffcam_fast.robustness.adversarial import Adversarial, bim, carlini_wagner, fgsm
from diffcam_fast.saliency.integrated_gradients import integrated_gradients

TARGETS: dict[str, Target] = {
    "logit": Logit(),
    "probability": Probability(),
    "difference": LogitDifference(),
}
METHODS = ("Grad-CAM", "integrated gradients")
TRUE, ADVERSARIAL = "true class", "adversarial class"
BATCH = 8


@dataclass(frozen=True)
class Sizes:
    """How much of the study is run on a network."""

    images: int
    attacks: tuple[str, ...]
    strength: float
    steps: int
    attack_steps: int
    search_steps: int


@dataclass
class Attacked:
    """What one attack did, and the maps of the images on which it succeeded.

    Attributes:
        name: of the attack.
        result: for all images.
        kept: indices of those that it succeeded on.
        classes: int64 (kept, 2): true and adversarial class.
        confidences: float32 (kept, 2, 2): probability on original and adversarial image of true and adversarial class.
        maps: signed (kept, H, W) on the adversarial images, by method, target and class.
    """

    name: str
    result: Adversarial
    kept: Tensor
    classes: Tensor
    confidences: Tensor
    maps: dict[tuple[str, str, str], Tensor] = field(default_factory=dict)


@dataclass
class Subject:
    """One network, its images and all that was computed of them.

    Attributes:
        network: the network.
        images: float32 (N, 3, H, W), all classified correctly.
        labels: int64 (N,).
        attacks: in their order.
        maps: signed (N, H, W) of the true class on the original images, by method and target.
        completeness: by target, for every integration: error and difference of the scores.
    """

    network: Network
    images: Tensor
    labels: Tensor
    attacks: list[Attacked]
    maps: dict[tuple[str, str], Tensor]
    completeness: dict[str, list[tuple[float, float]]]


def heat(
    network: Network, method: str, target: str, images: Tensor, classes: Tensor, steps: int
) -> tuple[Tensor, list[tuple[float, float]]]:
    """Evidence for and against a class, pixel by pixel, before any ReLU.

    Args:
        network: explained.
        method: of `METHODS`.
        target: of `TARGETS`.
        images: (N, 3, H, W).
        classes: (N,).
        steps: of integrated gradients.

    Returns:
        float32 (N, H, W); and of integrated gradients error and difference of scores of each image.
    """
    size = tuple(images.shape[2:])
    if len(images) == 0:
        return images.new_empty((0, *size)), []
    if method == "Grad-CAM":
        explainer = Explainer(network.model, network.layer, "gradcam", TARGETS[target], None, None, relu=False)
        raw = torch.cat(
            [
                explainer(part, chosen).maps
                for part, chosen in zip(images.split(BATCH), classes.split(BATCH), strict=True)
            ]
        )
        return functional.interpolate(raw, size, mode="bilinear", align_corners=False)[:, 0], []
    found = integrated_gradients(
        network.model, images, classes, target=TARGETS[target], steps=steps, batch_size=2 * BATCH
    )
    rise = found.scores - found.baseline_scores
    return found.attributions.sum(1), list(zip(found.completeness_error.tolist(), rise.tolist(), strict=True))


def study_network(network: Network, images: Tensor, labels: Tensor, sizes: Sizes, settings: Settings) -> Subject:
    """Attack and explain the first images that the network classifies correctly."""
    model = network.model.to(settings.device)
    images, labels = images.to(settings.device), labels.to(settings.device)
    with torch.inference_mode():
        right = torch.cat([model(part).argmax(1) for part in images.split(BATCH)]) == labels
    first = right.nonzero().flatten()[: sizes.images]
    images, labels = images[first], labels[first]
    attacks = []
    for name in settings.track(sizes.attacks, f"{network.name}: attacks"):
        result = attack(name, network, images, labels, sizes)
        kept = result.succeeded.nonzero().flatten()
        classes = torch.stack([labels[kept], result.predicted[kept]], 1)
        with torch.inference_mode():
            told = [model(x[kept]).softmax(1).gather(1, classes) for x in (images, result.images)]
        attacks.append(Attacked(name, result, kept, classes, torch.stack(told, 1)))
    subject = Subject(network, images, labels, attacks, {}, {target: [] for target in TARGETS})
    jobs = [(method, target) for method in METHODS for target in TARGETS]
    for method, target in settings.track(jobs, f"{network.name}: explanations"):
        subject.maps[method, target], errors = heat(network, method, target, images, labels, sizes.steps)
        subject.completeness[target] += errors
        for one in attacks:
            for number, kind in enumerate((TRUE, ADVERSARIAL)):
                given = (one.result.images[one.kept], one.classes[:, number])
                one.maps[method, target, kind], errors = heat(network, method, target, *given, sizes.steps)
                subject.completeness[target] += errors
    return subject


def attack(name: str, network: Network, images: Tensor, labels: Tensor, sizes: Sizes) -> Adversarial:
    """One of the three attacks, in batches; away from the labels."""
    parts = []
    for part, chosen in zip(images.split(BATCH), labels.split(BATCH), strict=True):
        given = (network.model, part, chosen)
        if name == "FGSM":
            parts.append(fgsm(*given, sizes.strength, bounds=network.bounds))
        elif name == "BIM":
            parts.append(bim(*given, sizes.strength, steps=10, bounds=network.bounds))
        else:
            limits = {"steps": sizes.attack_steps, "search_steps": sizes.search_steps, "initial_constant": 1.0}
            parts.append(carlini_wagner(*given, bounds=network.bounds, **limits))
    return Adversarial(*(torch.cat(column) for column in zip(*parts, strict=True)))


def overlap(one: Tensor, other: Tensor, share: float) -> Tensor:
    """How much of the most important pixels two maps have in common.

    Args:
        one: (N, H, W).
        other: the same.
        share: of the pixels that count as important.

    Returns:
        (N,): pixels that are important in both, divided by those important in one. 1: the same region; `share`: what
        two unrelated maps have in common. NaN where a map is constant.
    """
    count = round(share * one[0].numel()) if len(one) else 0
    sets = [torch.zeros_like(maps.flatten(1)).scatter_(1, top_pixels(maps, count), 1.0) for maps in (one, other)]
    common = (sets[0] * sets[1]).sum(1) / max(count, 1)
    flat = [maps.flatten(1) for maps in (one, other)]
    constant = torch.stack([maps.amax(1) == maps.amin(1) for maps in flat]).any(0) if len(one) else common.bool()
    return common.masked_fill(constant, torch.nan)


def top_pixels(maps: Tensor, count: int) -> Tensor:
    """Indices (N, count) of the largest values of maps (N, H, W)."""
    return maps.flatten(1).topk(count, 1).indices


def decided(one: Attacked, subject: Subject, method: str, target: str) -> Sequence[tuple[str, Tensor, Tensor]]:
    """The pairs of maps whose regions are compared, with what they are."""
    before = subject.maps[method, target][one.kept]
    true, adversarial = (one.maps[method, target, kind] for kind in (TRUE, ADVERSARIAL))
    return (
        ("true class, original and adversarial image", before, true),
        ("decision, original and adversarial image", before, adversarial),
        ("true and adversarial class, adversarial image", true, adversarial),
        ("true class, original and adversarial image, by magnitude", before.abs(), true.abs()),
    )
