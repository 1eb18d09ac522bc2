"""Attacked images, their maps, and how far the maps moved: the measuring part of the region-shift study."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

import diffcam_fast as dcf
from benchmarks.studies.region_shift_networks import Subject
from benchmarks.studies.region_shift_sets import RESNET, Watched
from benchmarks.studies.study import Settings
from diffcam_fast.robustness.adversarial import fgsm
from diffcam_fast.robustness.region_shift import RegionShift, nissim, psnr

STRENGTHS = (0.0, 0.01, 0.05, 0.075, 0.1)
"""Largest changes of a pixel, of a range of 1. The first is the check that nothing moves by itself."""

WHITE_BOX, TRANSFERRED, RANDOM = "white box", f"from {RESNET}", "random signs"
TRUE, SEEN = "true", "predicted"

MAIN, DIFFERENCE = "Grad-CAM, logit", "DiffGradCAM"

EXPLANATIONS: dict[str, dcf.Logit | dcf.LogitDifference] = {MAIN: dcf.Logit(), DIFFERENCE: dcf.LogitDifference()}

_BATCH = 50
_BINS = 50


@dataclass
class Watch:
    """What came out for one network under one attack, at each strength.

    Attributes:
        correct: bool (E, N), whether the true class is the predicted one.
        decibels: (E, N), PSNR of the attacked images.
        dissimilarity: NISSIM (E, N), by explanation and class explained.
        blank: bool (E, N), whether the map was zero everywhere, by the same.
        shift: what was counted on the way at all strengths but 0, by the same.
    """

    set_name: str
    subject: Subject
    attack: str
    correct: Tensor
    decibels: Tensor
    dissimilarity: dict[tuple[str, str], Tensor]
    blank: dict[tuple[str, str], Tensor]
    shift: dict[tuple[str, str], RegionShift] = field(default_factory=dict)


def directions(subject: Subject, watched: Watched, settings: Settings) -> Tensor:
    """Where FGSM moves each pixel: -1, 0 or 1, on the CPU.

    One gradient serves all strengths: the step's sign does not depend on its length, and a pixel that the bounds hold
    at one length they hold at any.
    """
    model = subject.model.to(settings.device)
    found = []
    for images, labels in _batches(watched.images, watched.labels):
        images = images.to(settings.device)
        attacked = fgsm(model, images, labels.to(settings.device), STRENGTHS[-1]).images
        found.append((attacked - images).sign().cpu())
    return torch.cat(found)


def attacked(images: Tensor, direction: Tensor) -> Tensor:
    """The images at each strength, (E, N, C, H, W)."""
    return torch.stack([(images + strength * direction).clamp(0, 1) for strength in STRENGTHS])


def watch(watched: Watched, subject: Subject, by_attack: dict[str, Tensor], settings: Settings) -> list[Watch]:
    """A network under each attack, given by the directions of its steps. Maps are kept for one batch at a time."""
    explainers = {
        name: dcf.Explainer(subject.model.to(settings.device), subject.layer, target=target)
        for name, target in EXPLANATIONS.items()
    }
    parts: dict[str, list[Watch]] = {attack: [] for attack in by_attack}
    shifts = {attack: {key: RegionShift(STRENGTHS[1:], bins=_BINS) for key in _keys()} for attack in by_attack}
    batches = list(_batches(watched.images, watched.labels, *by_attack.values()))
    for images, labels, *steps in settings.track(batches, f"{watched.name}, {subject.name}"):
        labels = labels.to(settings.device)
        _, original = _explained(subject, explainers, images.to(settings.device), labels)
        for attack, step in zip(by_attack, steps, strict=True):
            changed = attacked(images, step).to(settings.device)
            found = [_explained(subject, explainers, each, labels) for each in changed]
            maps = {key: torch.stack([each[1][key] for each in found]) for key in _keys()}
            for key in _keys():
                shifts[attack][key].update(original[key], maps[key][1:])
            parts[attack].append(
                Watch(
                    watched.name,
                    subject,
                    attack,
                    torch.stack([each[0] == labels for each in found]).cpu(),
                    torch.stack([psnr(images, each.cpu()) for each in changed]),
                    {key: nissim(original[key], maps[key]).cpu() for key in _keys()},
                    {key: (maps[key].amax((-2, -1)) == 0).cpu() for key in _keys()},
                )
            )
    return [_joined(parts[attack], shifts[attack]) for attack in by_attack]


def layer_maps(subject: Subject, images: Tensor, labels: Tensor, settings: Settings) -> dict[str, Tensor]:
    """Maps of the true class at every layer, from one forward and one pull-back, at the images' size: (N, H, W)."""
    explainer = dcf.Explainer(subject.model.to(settings.device), "all", target=dcf.Logit(), size=None)
    found = explainer(images.to(settings.device), labels.to(settings.device)).layer_maps
    size = images.shape[-2:]
    return {
        name: F.interpolate(maps, size, mode="bilinear", align_corners=False)[:, 0].cpu()
        for name, maps in found.items()
        if min(maps.shape[-2:]) > 1
    }


def _explained(
    subject: Subject, explainers: dict[str, dcf.Explainer], images: Tensor, labels: Tensor
) -> tuple[Tensor, dict[tuple[str, str], Tensor]]:
    """Predicted classes, and the maps of the true and the predicted class, by explanation and class."""
    with torch.inference_mode():
        predicted = subject.model(images).argmax(1)
    classes = torch.stack((labels, predicted), 1)
    maps = {}
    for name, explainer in explainers.items():
        both = explainer(images, classes).maps
        maps[name, TRUE], maps[name, SEEN] = both[:, 0], both[:, 1]
    return predicted, maps


def _keys() -> list[tuple[str, str]]:
    return [(name, kind) for name in EXPLANATIONS for kind in (TRUE, SEEN)]


def _batches(*values: Tensor) -> zip[tuple[Tensor, ...]]:
    return zip(*(value.split(_BATCH) for value in values), strict=True)


def _joined(parts: list[Watch], shift: dict[tuple[str, str], RegionShift]) -> Watch:
    first = parts[0]
    return Watch(
        first.set_name,
        first.subject,
        first.attack,
        torch.cat([part.correct for part in parts], 1),
        torch.cat([part.decibels for part in parts], 1),
        {key: torch.cat([part.dissimilarity[key] for part in parts], 1) for key in first.dissimilarity},
        {key: torch.cat([part.blank[key] for part in parts], 1) for key in first.blank},
        shift,
    )
