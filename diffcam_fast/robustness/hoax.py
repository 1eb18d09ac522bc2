"""The picture that an attacked network's maps are steered to, and the entropy by which it passes for one of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from diffcam_fast.explain.positions import check_size
from diffcam_fast.ops.arguments import check_number


def map_entropy(maps: Tensor) -> Tensor:
    """Shannon entropy of maps in nats, each map read as a distribution of its evidence over the positions.

    ``-sum_s p_s ln p_s`` with ``p = M / sum M``: 0 where all evidence is at one position, ``ln S`` where the same is at
    all S. ``exp`` of it is the number of positions that the evidence is spread over.

    Args:
        maps: ``(..., H, W)``, floating point, nowhere negative.

    Returns:
        ``(...)``, in the maps' dtype, float32 for half precisions. NaN for a map that is zero everywhere, which is no
        distribution, and for one that is not finite.

    Raises:
        TypeError: ``maps`` is not a floating point tensor.
        ValueError: fewer than two dimensions, no positions, or a negative value.
    """
    if not isinstance(maps, Tensor):
        raise TypeError(f"maps: expected a torch.Tensor; got {type(maps).__name__}")
    if not maps.is_floating_point():
        raise TypeError(f"maps: expected a floating point tensor; got {maps.dtype}")
    if maps.dim() < 2 or maps.shape[-2:].numel() == 0:
        raise ValueError(f"maps: expected shape (..., H, W) with positions; got {tuple(maps.shape)}")
    if bool((maps < 0).any()):
        raise ValueError("maps: expected no negative values, as after ReLU or normalisation; got some")
    flat = maps.to(torch.float64 if maps.dtype == torch.float64 else torch.float32).flatten(-2)
    # By the largest first: the sum of a float32 map's largest values could overflow.
    flat = flat / flat.amax(-1, keepdim=True)
    shares = flat / flat.sum(-1, keepdim=True)
    return torch.special.entr(shares).sum(-1)


class SalienceHoax:
    """A map that explains nothing: ones along the border, zeros in the centre.

    The picture that passive fooling with the hoax loss steers maps to, as in the work on DiffGradCAM and the salience
    hoax activation maps (SHAMs) against it: it has the entropy of the network's own maps, and nothing else of them. A
    7x7 map with 28 ones has entropy ``ln 28 = 3.33`` nats.

    ``n`` equal ones have entropy ``ln n``, so there are ``round(exp(entropy))`` of them, at least one, and at least one
    position stays zero: a constant map has no normalised form. Positions are taken ring by ring from the border
    inwards; within a ring from its corners to the middle of its sides, and among positions as far from a corner each
    next to the one opposite. So the 28 ones of a 7x7 map are the ring of 24 and the four corners of the ring inside
    it; fewer than a ring leave the middle of the sides open; and a hoax of an even number of ones looks the same when
    turned by half a turn, save for what the middle of a side, which has no twin, takes.

    Args:
        size: ``(height, width)`` of the map.
        entropy: of the hoax, in nats, from 0 to ``ln(height * width)``; None: the whole border ring, whatever its
            entropy.

    Attributes:
        size: as given.
        count: how many ones there are.
        entropy: ``ln count``, in nats.

    Raises:
        TypeError: the size is no tuple of integers, or the entropy no number.
        ValueError: the size is not two positive lengths with two positions at least, or no map of that size has such
            an entropy.
    """

    size: tuple[int, int]
    count: int
    entropy: float

    def __init__(self, size: Sequence[int], entropy: float | None = None) -> None:
        checked = check_size(size)
        if len(checked) != 2 or math.prod(checked) < 2:
            raise ValueError(f"size: expected (height, width) of two positions or more; got {checked}")
        self.size = height, width = checked[0], checked[1]
        positions = height * width
        if entropy is None:
            inside = max(height - 2, 0) * max(width - 2, 0)
            wanted = positions - inside
        else:
            wanted = round(math.exp(_checked_entropy(entropy, positions)))
        self.count = min(wanted, positions - 1)
        self.entropy = math.log(self.count)

    @classmethod
    def like(cls, maps: Tensor) -> SalienceHoax:
        """The hoax of the size and the mean entropy of maps.

        Args:
            maps: ``(..., H, W)``, nowhere negative. Maps that are zero everywhere do not count.

        Raises:
            TypeError, ValueError: as `map_entropy`; and where no map counts.
        """
        entropies = map_entropy(maps)
        counted = entropies[~entropies.isnan()]
        if counted.numel() == 0:
            raise ValueError(f"maps: expected at least one map that is not zero everywhere; got {tuple(maps.shape)}")
        return cls(maps.shape[-2:], float(counted.double().mean()))

    @property
    def map(self) -> Tensor:
        """``(height, width)``, float32 of ones and zeros, on the CPU; a new tensor each time."""
        hoax = torch.zeros(self.size)
        for _, (row, column) in zip(range(self.count), _positions(*self.size), strict=False):
            hoax[row, column] = 1.0
        return hoax

    def __repr__(self) -> str:
        return f"SalienceHoax(size={self.size}, count={self.count}, entropy={self.entropy:.3f})"


def _checked_entropy(entropy: Any, positions: int) -> float:
    check_number("entropy", entropy)
    # Rounding may put a uniform map's entropy a little above what it is.
    if not 0 <= float(entropy) <= math.log(positions) + 1e-6:
        raise ValueError(
            f"entropy: expected 0 to ln {positions} = {math.log(positions):.4f} nats for {positions} positions; "
            f"got {entropy!r}"
        )
    return float(entropy)


def _positions(height: int, width: int) -> Iterator[tuple[int, int]]:
    """All positions, in the order in which a hoax takes them."""
    seen = set()
    for ring in range((min(height, width) + 1) // 2):
        top, left, bottom, right = ring, ring, height - 1 - ring, width - 1 - ring
        for step in range(max(height, width)):
            along = (
                # clockwise from each corner, the opposite corner next, then counterclockwise
                (top, left + step),
                (bottom, right - step),
                (top + step, right),
                (bottom - step, left),
                (top + step, left),
                (bottom - step, right),
                (top, right - step),
                (bottom, left + step),
            )
            for row, column in along:
                if top <= row <= bottom and left <= column <= right and (row, column) not in seen:
                    seen.add((row, column))
                    yield row, column
