"""Whether guided back-propagation tells classes apart, what its contrast adds, and both on attacked images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.studies import data, networks
from benchmarks.studies.contrastive_saliency_animals import PHOTO, Animals, animals_claims, animals_table, two_animals
from benchmarks.studies.contrastive_saliency_figures import Panel, draw_animals, draw_panels, draw_recovery
from benchmarks.studies.contrastive_saliency_recovery import CONTROLS, RANDOM, Recovery, recover
from benchmarks.studies.networks import Network
from benchmarks.studies.statistics import Interval, mean_interval
from benchmarks.studies.study import Claim, Findings, Settings, Table
from diffcam_fast.explain import Logit
from diffcam_fast.ops.saliency_contrast import saliency_contrast
from diffcam_fast.robustness.adversarial import carlini_wagner, fgsm
from diffcam_fast.saliency.contrast import contrastive_saliency
from diffcam_fast.saliency.gradients import gradient, gradient_times_input
from diffcam_fast.saliency.guided import guided_backpropagation
from diffcam_fast.saliency.integrated_gradients import integrated_gradients
from diffcam_fast.saliency.measures import average_difference, filter_similarity

NAME = "contrastive_saliency"
TITLE = "Contrastive saliency: guided back-propagation that discriminates"
QUESTION = (
    "Guided back-propagation has been said to recover the image and to tell nothing of the class (Nie, Zhang and "
    'Patel, "A Theoretical Explanation for Perplexing Behaviors of Backpropagation-based Visualizations", ICML 2018). '
    'Gu and Tresp ("Saliency Methods for Explaining Adversarial Attacks", arXiv:1908.08413, 2019) find in its maps '
    "what tells classes apart, bring it out by comparing two classes' maps at the same energy, and explain adversarial "
    "decisions with it. Here: how alike the maps of two classes are, how maps change when an attack succeeds, and how "
    "much accuracy returns when the pixels that a map ranks first are perturbed."
)

Method = Callable[..., Any]

_GUIDED = "guided back-propagation"

#: Where two classes' maps are compared.
_COMPARED: dict[str, Method] = {"gradient": gradient, _GUIDED: guided_backpropagation}

_WEAK_STRENGTH = 0.5 / 255


@dataclass(frozen=True)
class Size:
    """How much is done."""

    photos: int
    rivals: int
    batch: int
    panels: int
    attack: dict[str, Any]
    cifar_images: int
    recovery_attack: dict[str, Any]
    fractions: tuple[float, ...]
    path_steps: int


QUICK = Size(
    photos=3,
    rivals=1,
    batch=3,
    panels=1,
    attack={"steps": 12, "search_steps": 1, "initial_constant": 2.0, "step_size": 0.03},
    cifar_images=8,
    recovery_attack={"steps": 12, "search_steps": 1, "initial_constant": 2.0, "step_size": 0.03},
    fractions=(0.0, 0.1, 0.3, 0.5),
    path_steps=4,
)
FULL = Size(
    photos=24,
    rivals=4,
    batch=4,
    panels=3,
    attack={"steps": 30, "search_steps": 2, "initial_constant": 1.0, "step_size": 0.02},
    cifar_images=100,
    recovery_attack={"steps": 30, "search_steps": 2, "initial_constant": 0.5, "step_size": 0.02},
    fractions=(0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5),
    path_steps=8,
)


def methods(size: Size) -> dict[str, Method]:
    """What is compared, by name."""
    return {
        "gradient": gradient,
        "gradient x input": gradient_times_input,
        "integrated gradients": partial(integrated_gradients, target=Logit(), steps=size.path_steps),
        _GUIDED: guided_backpropagation,
    }


def run(settings: Settings) -> Findings:
    """The study, on real photos and CIFAR-10 images."""
    size = QUICK if settings.quick else FULL
    names = [settings.network] if settings.network else ["efficientnet_lite0", "inception_v3"]
    pairs: list[Pair] = []
    animals: list[Animals] = []
    attacked = None
    for name in names:
        network = _load(name, settings)
        photos = data.photos(settings.cache, network.size)
        images = photos.floats()[: size.photos].to(settings.device)
        pairs += class_pairs(network, images, size, settings)
        both = photos.floats()[photos.names.index(PHOTO)].to(settings.device)
        animals.append(two_animals(network, both, _COMPARED))
        if attacked is None:
            attacked = attacked_photos(network, images, size, settings)
    assert attacked is not None
    resnet = _load("cifar_resnet18", settings)
    recovery = _recovery(resnet, size, settings)
    return Findings(
        tables=[_pairs_table(pairs), animals_table(animals), _attacked_table(attacked), _recovery_table(recovery)],
        figures=[draw_animals(animals), draw_panels(attacked.panels), draw_recovery(recovery)],
        claims=[
            _pair_claim(pairs),
            *animals_claims(animals),
            _attacked_claim(attacked),
            *_recovery_claims(recovery),
        ],
        details={
            "networks": {"class pairs": names, "attacked photos": names[0], "recovery": resnet.name},
            "photos": size.photos,
            "rivals of a photo": size.rivals,
            "weak attack": {"method": "FGSM", "strength": _WEAK_STRENGTH},
            "strong attack": {"method": "Carlini-Wagner L2", **size.attack},
            "recovery": {
                "images": size.cifar_images,
                "correct and attacked with success": recovery.images,
                "mean L2 norm of the perturbations": recovery.norm,
                "attack": size.recovery_attack,
                "perturbation": "mean of the 3 x 3 pixels around",
            },
            "integrated gradients": {"steps": size.path_steps, "baseline": 0.0, "target": "logit"},
        },
    )


def _load(name: str, settings: Settings) -> Network:
    network = networks.load(name, settings.cache)
    network.model.to(settings.device)
    return network


# --- how alike the maps of two classes are


class Pair(NamedTuple):
    """How alike the maps of two classes are, with one network and method: (photos,), means over a photo's rivals."""

    network: str
    method: str
    is_contrast: bool
    similarity: Tensor
    difference: Tensor
    cosine: Tensor


def class_pairs(network: Network, images: Tensor, size: Size, settings: Settings) -> list[Pair]:
    """Both statistics of every method's maps, and of their contrasts, of the predicted class and its rivals.

    Args:
        network: what is explained.
        images: (N, 3, H, W).
        size: how many rivals, and images at a time.
        settings: for the progress bar.
    """
    found: dict[tuple[str, bool], list[tuple[Tensor, ...]]] = {}
    for batch in settings.track(images.split(size.batch), f"class pairs, {network.name}"):
        with torch.no_grad():
            classes = network.model(batch).topk(1 + size.rivals).indices
        for name, method in _COMPARED.items():
            maps = method(network.model, batch, classes).attributions
            own, rivals = maps[:, :1].expand_as(maps[:, 1:]), maps[:, 1:]
            contrast = saliency_contrast(maps[:, 0].relu(), rivals.relu())
            # The other way round each pair stands by itself.
            reverse = saliency_contrast(rivals.flatten(0, 1).relu(), own.flatten(0, 1).relu())
            reverse = reverse.unflatten(0, rivals.shape[:2])
            for is_contrast, (a, b) in ((False, (own, rivals)), (True, (contrast, reverse))):
                a, b = a.flatten(0, 1).flatten(1), b.flatten(0, 1).flatten(1)
                # Means are for maps without negative values: of what speaks for a class.
                means_apart = average_difference(a.relu(), b.relu())
                statistics = (filter_similarity(a, b), means_apart, functional.cosine_similarity(a, b))
                means = tuple(values.view(len(batch), -1).mean(1).cpu() for values in statistics)
                found.setdefault((name, is_contrast), []).append(means)
    return [
        Pair(network.name, name, is_contrast, *(torch.cat(column) for column in zip(*parts, strict=True)))
        for (name, is_contrast), parts in found.items()
    ]


def _pairs_table(pairs: Sequence[Pair]) -> Table:
    rows = [
        {
            "network": pair.network,
            "method": pair.method,
            "maps": "contrasts" if pair.is_contrast else "as they are",
            **mean_interval(pair.similarity).cells("filter similarity"),
            **mean_interval(pair.difference).cells("average difference"),
            **mean_interval(pair.cosine).cells("cosine"),
            "photos": len(pair.similarity),
        }
        for pair in pairs
    ]
    return Table(
        "pairs",
        "Maps of the predicted class and of its strongest rivals",
        rows,
        "Filter similarity: the share of values that are positive in both maps or in neither. Average difference: "
        "|a - b| / max(a, b) of the means of the maps' positive parts. Cosine: of the angle between the maps, 1 where "
        "one is the other times a number. Means with 95 % intervals over photos, of each photo over its rivals. "
        "Contrasts: of the class with the rival beside the rival's with the class, which are never positive at the "
        "same place.",
        _formats(rows),
    )


def _pair_claim(pairs: Sequence[Pair]) -> Claim:
    plain = {(pair.network, pair.method): pair for pair in pairs if not pair.is_contrast}
    guided = {network: pair for (network, method), pair in plain.items() if method == _GUIDED}
    above = {name: mean_interval(pair.similarity - plain[name, "gradient"].similarity) for name, pair in guided.items()}
    similarities = {name: mean_interval(pair.similarity) for name, pair in guided.items()}
    cosines = {name: mean_interval(pair.cosine) for name, pair in guided.items()}
    return Claim(
        "Guided back-propagation draws more alike for two classes than the gradient does (Nie, Zhang and Patel: it "
        "recovers the image).",
        _verdict(above.values()),
        f"Filter similarity {_listed(similarities)}, above the gradient's by {_listed(above)}; cosine "
        f"{_listed(cosines)}.",
    )


# --- maps of clean and attacked photos


class Attacked(NamedTuple):
    """How maps of attacked photos agree with those of the photos."""

    agreement: Mapping[tuple[str, bool, str], Tensor]
    """By method, whether it is the contrast, and condition: correlations (photos,), NaN where there is none."""

    counts: Mapping[str, int]
    panels: list[Panel]


def attacked_photos(network: Network, images: Tensor, size: Size, settings: Settings) -> Attacked:
    """Maps of photos, of failed and of successful attacks, each of the class that the network decides for.

    Args:
        network: what is attacked and explained.
        images: (N, 3, H, W) from 0 to 1.
        size: strength of the attack, panels, images at a time.
        settings: for the progress bar.
    """
    agreement: dict[tuple[str, bool, str], list[Tensor]] = {}
    counts = {"photos": 0, "failed": 0, "successful": 0}
    panels: list[Panel] = []
    for batch in settings.track(images.split(size.batch), f"attacked photos, {network.name}"):
        with torch.no_grad():
            decided = network.model(batch).argmax(1)
        weak = fgsm(network.model, batch, decided, _WEAK_STRENGTH)
        strong = carlini_wagner(network.model, batch, decided, **size.attack)
        conditions = {
            "clean": (batch, torch.ones_like(weak.succeeded)),
            "failed": (weak.images, ~weak.succeeded),
            "successful": (strong.images, strong.succeeded),
        }
        maps = {name: _maps(network, pictures, size) for name, (pictures, _) in conditions.items()}
        counts["photos"] += len(batch)
        for name, (_, valid) in list(conditions.items())[1:]:
            counts[name] += int(valid.sum())
            for key, clean in maps["clean"].maps.items():
                correlation = _correlation(clean, maps[name].maps[key])
                correlation[~valid] = torch.nan
                agreement.setdefault((*key, name), []).append(correlation.cpu())
        for index in range(len(batch)):
            if len(panels) < size.panels and all(bool(valid[index]) for _, valid in conditions.values()):
                panels.append(_panel(network, conditions, maps, index))
    return Attacked({key: torch.cat(parts) for key, parts in agreement.items()}, counts, panels)


class _Explained(NamedTuple):
    classes: Tensor
    maps: dict[tuple[str, bool], Tensor]
    """By method and whether it is the contrast: (N, H, W), positive parts summed over channels."""


def _maps(network: Network, images: Tensor, size: Size) -> _Explained:
    found = {}
    for name, method in methods(size).items():
        explained = contrastive_saliency(network.model, images, method=method)
        found[name, False] = explained.saliency.relu().sum(1)
        found[name, True] = explained.contrast[:, 0].sum(1)
    return _Explained(explained.classes, found)


def _panel(
    network: Network, conditions: Mapping[str, tuple[Tensor, Tensor]], maps: Mapping[str, _Explained], index: int
) -> Panel:
    rows = []
    for name, (pictures, _) in conditions.items():
        label = network.labels[int(maps[name].classes[index])]
        parts = {
            f"{method}{', contrast' if is_contrast else ''}": values[index].cpu()
            for (method, is_contrast), values in maps[name].maps.items()
        }
        rows.append((f"{name}:\n{label}", pictures[index].cpu(), parts))
    return Panel(rows)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's, of each pair of maps (N, H, W); NaN where a map is constant."""
    a, b = (values.flatten(1).double() for values in (a, b))
    a, b = (values - values.mean(1, keepdim=True) for values in (a, b))
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


def _attacked_table(attacked: Attacked) -> Table:
    rows = []
    for method, is_contrast in dict.fromkeys(key[:2] for key in attacked.agreement):
        row: dict[str, Any] = {"method": method, "maps": "contrasts" if is_contrast else "as they are"}
        for condition in ("failed", "successful"):
            row |= mean_interval(attacked.agreement[method, is_contrast, condition]).cells(f"{condition} attack")
        rows.append(row)
    counts = attacked.counts
    return Table(
        "attacked",
        "Maps of attacked photos beside those of the photos: Pearson correlation",
        rows,
        f"Of {counts['photos']} photos, FGSM of {255 * _WEAK_STRENGTH:g}/255 failed on {counts['failed']} and the "
        f"Carlini-Wagner attack succeeded on {counts['successful']}. Each map explains the class that the network "
        "decides for, contrasts against the class that comes next. Means with 95 % intervals over photos.",
        _formats(rows),
    )


def _attacked_claim(attacked: Attacked) -> Claim:
    kept, changed = (attacked.agreement[_GUIDED, is_contrast, "successful"] for is_contrast in (False, True))
    apart = mean_interval(kept - changed)
    return Claim(
        "A successful attack changes the contrast of guided back-propagation more than its map.",
        _verdict([apart]),
        f"Correlation with the clean photo's: map {mean_interval(kept)}, contrast {mean_interval(changed)}; apart by "
        f"{apart}, over {apart.count} photos.",
    )


# --- how much accuracy returns


def _recovery(network: Network, size: Size, settings: Settings) -> Recovery:
    test = data.cifar10("test", settings.cache)
    chosen = torch.randperm(len(test), generator=settings.generator())[: size.cifar_images]
    images, labels = test.floats()[chosen].to(settings.device), test.labels[chosen].to(settings.device)
    return recover(network.model, images, labels, methods(size), size.fractions, size.recovery_attack, settings)


def _recovery_table(recovery: Recovery) -> Table:
    rows = []
    for ranking, right in recovery.right.items():
        row: dict[str, Any] = {"pixels ranked by": ranking}
        for index, fraction in enumerate(recovery.fractions):
            row |= mean_interval(right[:, index]).cells(f"{fraction:.0%} of pixels")
        rows.append(row | mean_interval(recovery.mean(ranking)).cells("mean"))
    return Table(
        "recovery",
        "Accuracy that returns on Carlini-Wagner images when the first pixels of a ranking are perturbed",
        rows,
        f"CIFAR-10, ResNet-18, {recovery.images} images that were right before the attack and wrong after it. A "
        "perturbed pixel takes the mean of the 3 x 3 pixels around it. Maps explain the adversarial decision, "
        "contrasts against the class that comes next. Mean: over the fractions above 0. Random ranking and the "
        "attack's own perturbation, which nobody knows, stand beside. Means with 95 % intervals over images.",
        _formats(rows),
    )


def _recovery_claims(recovery: Recovery) -> list[Claim]:
    best = f"contrast of {_GUIDED}"
    mine = recovery.mean(best)
    plain = mean_interval(mine - recovery.mean(_GUIDED))
    others = [name for name in recovery.right if name not in (best, *CONTROLS)]
    leads = {name: mean_interval(mine - recovery.mean(name)) for name in others}
    worst = min(leads, key=lambda name: leads[name].mean)
    return [
        Claim(
            "Perturbing the pixels that the contrast ranks first returns more accuracy than those of guided "
            "back-propagation itself (Gu and Tresp).",
            _verdict([plain]),
            f"Mean accuracy {mean_interval(mine)} against {mean_interval(recovery.mean(_GUIDED))}; image by image more "
            f"by {plain}.",
        ),
        Claim(
            "It returns more than every other method's (Gu and Tresp: the state of the art in explaining adversarial "
            "decisions).",
            _verdict(leads.values()),
            f"Image by image it leads {worst} by {leads[worst]}, and random ranking by "
            f"{mean_interval(mine - recovery.mean(RANDOM))}.",
        ),
    ]


# --- words and numbers


def _formats(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    return {key: ".3f" for row in rows for key, value in row.items() if isinstance(value, float)}


def _listed(intervals: Mapping[str, Interval]) -> str:
    return ", ".join(f"{interval} ({name})" for name, interval in intervals.items())


def _verdict(leads: Iterable[Interval]) -> bool | None:
    """Whether all are above zero; None where an interval holds zero and none lies below it."""
    leads = list(leads)
    if any(lead.high < 0 for lead in leads):
        return False
    return True if all(lead.low > 0 for lead in leads) else None
