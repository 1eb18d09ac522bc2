"""One photo with two animals that the networks know: does each class's map lie on its own?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.studies.networks import Network
from benchmarks.studies.study import Claim, Table
from diffcam_fast.saliency.contrast import contrastive_saliency

#: The photo has the one above and the other below.
PHOTO = "both.png"
ABOVE, BELOW = 243, 282

#: Where their centres are, from the top; what separates them.
_HALF = 0.5


class Animals(NamedTuple):
    """Maps of both classes."""

    network: str
    photo: Tensor
    """(3, H, W)."""

    maps: Mapping[tuple[str, str], tuple[Tensor, Tensor]]
    """By method and kind ("as they are", "contrasts", "contrasts of all values"): (H, W) of either class."""

    def heights(self, method: str, kind: str) -> tuple[float, float]:
        """Centres of the maps of the class above and of the one below, from 0 at the top to 1."""
        first, second = self.maps[method, kind]
        return _height(first), _height(second)

    def are_apart(self, method: str, kind: str) -> bool:
        """Whether the one centre lies in the upper half and the other in the lower."""
        first, second = self.heights(method, kind)
        return first < _HALF < second


def two_animals(network: Network, photo: Tensor, methods: Mapping[str, Callable[..., Any]]) -> Animals:
    """Maps of both classes and their contrasts with each other.

    Args:
        network: of ImageNet's classes.
        photo: (3, H, W).
        methods: saliency methods by name.
    """
    images = photo.unsqueeze(0).expand(2, -1, -1, -1)
    classes = torch.tensor([ABOVE, BELOW], device=photo.device)
    maps: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
    for name, method in methods.items():
        for kind, part in (("contrasts", "positive"), ("contrasts of all values", "all")):
            found = contrastive_saliency(
                network.model, images, classes, rivals=classes.flip(0).unsqueeze(1), method=method, part=part
            )
            maps[name, "as they are"] = _flat(found.saliency.relu())
            maps[name, kind] = _flat(found.contrast[:, 0])
    return Animals(network.name, photo.cpu(), maps)


def animals_table(animals: Sequence[Animals]) -> Table:
    """Where the maps' centres are."""
    rows: list[dict[str, Any]] = []
    for each in animals:
        for method, kind in each.maps:
            above, below = each.heights(method, kind)
            row = {"network": each.network, "method": method, "maps": kind}
            rows.append(row | {"centre of bull mastiff": above, "centre of tiger cat": below})
    return Table(
        "animals",
        "A bull mastiff above a tiger cat: centres of the maps of either",
        rows,
        "From 0 at the top of the photo to 1 at its bottom. Contrasts: of either class with the other, of the maps' "
        "positive parts; contrasts of all values: of the maps with their negative values, which count for the other "
        "class.",
        dict.fromkeys(("centre of bull mastiff", "centre of tiger cat"), ".2f"),
    )


def animals_claims(animals: Sequence[Animals]) -> list[Claim]:
    """Whether contrasts show the animal that is asked for."""
    guided = "guided back-propagation"

    def found(kind: str) -> str:
        parts = []
        for each in animals:
            above, below = each.heights(guided, kind)
            parts.append(f"{above:.2f} and {below:.2f} ({each.network})")
        return f"Centres from the top, mastiff and cat: {', '.join(parts)}."

    return [
        Claim(
            "Yet its maps hold what tells classes apart (Gu and Tresp): of two animals in one photo, their contrast "
            "shows the one that is asked for. The centre of the mastiff's lies in the upper half, that of the cat's in "
            "the lower.",
            all(each.are_apart(guided, "contrasts") for each in animals),
            found("contrasts"),
        ),
        Claim(
            "The contrast does so without taking the maps' positive parts first.",
            all(each.are_apart(guided, "contrasts of all values") for each in animals),
            found("contrasts of all values"),
        ),
    ]


def _flat(maps: Tensor) -> tuple[Tensor, Tensor]:
    first, second = maps.sum(1).cpu()
    return first, second


def _height(values: Tensor) -> float:
    rows = values.double().sum(1)
    return float((rows * torch.linspace(0, 1, len(rows), dtype=torch.float64)).sum() / rows.sum())
