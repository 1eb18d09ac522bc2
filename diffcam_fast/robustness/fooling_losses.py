"""What passive fooling wants of a map: losses of normalised maps, each differentiable in them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from diffcam_fast.ops.arguments import check_integer
from diffcam_fast.robustness.agreement import check_fraction, top_positions
from diffcam_fast.robustness.hoax import SalienceHoax

EPS = 1e-7


class MapLoss(ABC):
    """A loss of the maps of one batch. Subclasses say what the maps should be; the less, the more they are so.

    Attributes:
        needs_original: whether the maps of the network as it was before are wanted.
    """

    needs_original: bool = False

    def classes(self, labels: Tensor) -> Tensor:
        """The classes whose maps are attacked, ``(N, T)``, for labels ``(N,)``: unless overridden, the labels."""
        return labels.unsqueeze(1)

    def counts(self, labels: Tensor) -> Tensor:
        """Which images take part, bool ``(N,)``: unless overridden, all."""
        return torch.ones_like(labels, dtype=torch.bool)

    @abstractmethod
    def __call__(self, maps: Tensor, original: Tensor | None = None) -> Tensor:
        """The loss of each image.

        Args:
            maps: ``(N, T, H, W)``, after ReLU and normalisation.
            original: the same of the network before the attack, a constant; None where `needs_original` is False.

        Returns:
            ``(N,)``.

        Raises:
            ValueError: maps that the loss is not made for.
        """


class HoaxLoss(MapLoss):
    """The mean squared difference between map and hoax.

    Args:
        hoax: what the maps should become; `SalienceHoax.like` makes one for a network's own maps.

    Raises:
        TypeError: it is no `SalienceHoax`.
    """

    def __init__(self, hoax: SalienceHoax) -> None:
        if not isinstance(hoax, SalienceHoax):
            raise TypeError(f"hoax: expected a SalienceHoax; got {type(hoax).__name__}")
        self.hoax = hoax
        self._map = hoax.map

    def __call__(self, maps: Tensor, original: Tensor | None = None) -> Tensor:
        """See `MapLoss.__call__`."""
        _check_maps(maps)
        if maps.shape[2:] != self.hoax.size:
            raise ValueError(f"maps: expected the size of the hoax, {self.hoax.size}; got {tuple(maps.shape[2:])}")
        return (maps - self._map.to(maps)).square().flatten(1).mean(1)


class LocationLoss(MapLoss):
    """The mean squared difference between map and a frame along the border (Heo et al. 2019, location fooling).

    Juyeon Heo, Sunghwan Joo, Taesup Moon, "Fooling Neural Network Interpretations via Adversarial Model Manipulation",
    NeurIPS 2019. The frame is 1 along the border and 0 within.

    Args:
        width: of the frame, in positions of the map.

    Raises:
        TypeError: the width is no integer.
        ValueError: it is not positive.
    """

    def __init__(self, width: int = 1) -> None:
        check_integer("width", width, least=1)
        self.width = int(width)

    def frame(self, height: int, width: int) -> Tensor:
        """``(height, width)``, float32 of ones and zeros.

        Raises:
            ValueError: nothing is left within.
        """
        if min(height, width) <= 2 * self.width:
            raise ValueError(
                f"maps: expected more than {2 * self.width} positions a side for a frame of width {self.width}; "
                f"got {(height, width)}"
            )
        frame = torch.ones(height, width)
        frame[self.width : -self.width, self.width : -self.width] = 0
        return frame

    def __call__(self, maps: Tensor, original: Tensor | None = None) -> Tensor:
        """See `MapLoss.__call__`."""
        _check_maps(maps)
        return (maps - self.frame(maps.shape[2], maps.shape[3]).to(maps)).square().flatten(1).mean(1)


class TopKLoss(MapLoss):
    """The mean square of the map where the original network's map was largest (after Heo et al. 2019, top-k fooling).

    The paper sums magnitudes; squares push hardest what is most visible.

    Args:
        fraction: of the positions, above 0 up to 1: the ``round(fraction * H * W)`` largest, one at least.

    Raises:
        TypeError: the fraction is no number.
        ValueError: it is out of range.
    """

    needs_original = True

    def __init__(self, fraction: float = 0.1) -> None:
        check_fraction(fraction)
        self.fraction = float(fraction)

    def __call__(self, maps: Tensor, original: Tensor | None = None) -> Tensor:
        """See `MapLoss.__call__`."""
        chosen = top_positions(_checked_original(maps, original).flatten(2), self.fraction)
        squares = maps.square().flatten(2).masked_fill(~chosen, 0)
        return (squares.sum(2) / chosen.sum(2)).mean(1)


class CentreOfMassLoss(MapLoss):
    """Minus the distance between the map's centre of mass and the original's (Heo et al. 2019, center-mass fooling).

    The distance is the sum of those along rows and columns (L1), in sides of the map: a centre that moves from the left
    border to the right one moves by a little less than 1. The paper measures in positions. Where both centres are the
    same, as before the first step, the distance has no gradient: that step is the classification's alone.
    """

    needs_original = True

    def __call__(self, maps: Tensor, original: Tensor | None = None) -> Tensor:
        """See `MapLoss.__call__`."""
        original = _checked_original(maps, original)
        return -(centre_of_mass(maps) - centre_of_mass(original)).abs().sum(2).mean(1)


class ActiveLoss(MapLoss):
    """The maps of two classes exchanged (Heo et al. 2019, active fooling).

    Half the mean squared difference of each class's map from the original network's map of the other class. Images with
    one of the two labels take part; the others of a batch count for the classification alone. The paper trains
    on pictures that show both classes.

    Args:
        first: index of a class.
        second: index of another.

    Raises:
        TypeError: an index is no integer.
        ValueError: an index is negative, or both are the same.
    """

    needs_original = True

    def __init__(self, first: int, second: int) -> None:
        for name, index in (("first", first), ("second", second)):
            check_integer(name, index)
            if index < 0:
                raise ValueError(f"{name}: expected the index of a class; got {index}")
        if first == second:
            raise ValueError(f"second: expected another class than first, {first}; got {second}")
        self.pair = (int(first), int(second))

    def classes(self, labels: Tensor) -> Tensor:
        """See `MapLoss.classes`: both classes for every image."""
        return torch.stack([torch.full_like(labels, index) for index in self.pair], 1)

    def counts(self, labels: Tensor) -> Tensor:
        """See `MapLoss.counts`: images of one of the two classes."""
        return (labels == self.pair[0]) | (labels == self.pair[1])

    def __call__(self, maps: Tensor, original: Tensor | None = None) -> Tensor:
        """See `MapLoss.__call__`."""
        original = _checked_original(maps, original)
        if maps.shape[1] != 2:
            raise ValueError(f"maps: expected those of two classes, (N, 2, H, W); got {tuple(maps.shape)}")
        return (maps - original.flip(1)).square().flatten(1).mean(1)


def centre_of_mass(maps: Tensor) -> Tensor:
    """Where the evidence of maps lies on average.

    Args:
        maps: ``(..., H, W)``, floating point, nowhere negative.

    Returns:
        ``(..., 2)``: row and column as shares of height and width, the middle of a position counting, so that the
        middle of the map is (0.5, 0.5): also that of a map without evidence.
    """
    mass = maps.sum((-2, -1)) + EPS
    centres = []
    for length, dim in ((maps.shape[-2], -1), (maps.shape[-1], -2)):
        places = (torch.arange(length, dtype=maps.dtype, device=maps.device) + 0.5) / length
        centres.append(((maps.sum(dim) * places).sum(-1) + 0.5 * EPS) / mass)
    return torch.stack(centres, -1)


def _check_maps(maps: Any) -> None:
    if not isinstance(maps, Tensor) or maps.dim() != 4:
        got = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
        raise ValueError(f"maps: expected a tensor (N, T, H, W) of maps with two spatial dimensions; got {got}")


def _checked_original(maps: Tensor, original: Tensor | None) -> Tensor:
    _check_maps(maps)
    if original is None:
        raise ValueError("original: expected the maps of the network before the attack; got None")
    if original.shape != maps.shape:
        raise ValueError(f"original: expected the shape of maps, {tuple(maps.shape)}; got {tuple(original.shape)}")
    return original.detach().to(maps)
