"""What an explanation holds, and what is made of it when asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from diffcam_fast.explain.finishing import EPS, finished, resized
from diffcam_fast.explain.positions import check_size
from diffcam_fast.ops.overlay import overlay


class Explanation:
    """The maps of one batch of images, with what they explain.

    N images, T targets an image, K classes. Everything is on the images' device; nothing has waited for it.

    Attributes:
        layers: names of the explained layers, as given or as chosen.
        layer_maps: layer name to maps ``(N, T, *S)`` at the layer's own resolution S; float32, float64 for a
            float64 model.
        logits: ``(N, K)``, from the same forward pass, in the model's dtype.
        classes: ``(N, C)``, int64: the classes asked for, or predicted. ``T = C``, except for a pairwise
            target: ``T = C * k``, those of the first class first.
        rivals: ``(N, C, k)``, int64: the classes compared with; None for targets that compare with no certain
            ones.
        delta: ``(N, T)``: the targets' scores; for logit differences the class's logit less its rivals'
            baseline.
    """

    layers: tuple[str, ...]
    layer_maps: dict[str, Tensor]
    logits: Tensor
    classes: Tensor
    rivals: Tensor | None
    delta: Tensor

    def __init__(
        self,
        layer_maps: Mapping[str, Tensor],
        logits: Tensor,
        classes: Tensor,
        rivals: Tensor | None,
        delta: Tensor,
        *,
        size: Sequence[int] | None,
        normalize: str | None,
    ) -> None:
        self.layers = tuple(layer_maps)
        self.layer_maps = dict(layer_maps)
        self.logits = logits
        self.classes = classes
        self.rivals = rivals
        self.delta = delta
        self._size = largest([maps.shape[2:] for maps in layer_maps.values()]) if size is None else tuple(size)
        self._normalize = normalize

    @cached_property
    def maps(self) -> Tensor:
        """``(N, T, *size)``, float32 (float64 for a float64 model), computed on first use.

        Layer maps resized (linear interpolation, corners not aligned) and normalised; of several layers their
        mean, which is normalised once more.
        """
        return self._at(self._size)

    def resized(self, size: Sequence[int]) -> Tensor:
        """The maps at another size.

        Args:
            size: positions along each spatial dimension of the maps.

        Returns:
            ``(N, T, *size)``.

        Raises:
            TypeError: ``size`` is not a sequence of integers.
            ValueError: it has another number of dimensions than the maps, or one that is not positive.
        """
        return self._at(check_size(size))

    def overlay(
        self, images: Tensor, colormap: str | Tensor = "jet", opacity: float = 0.5, *, blend: str = "proportional"
    ) -> Tensor:
        """The maps laid over the images as heat, resized to them whatever the size of `maps`.

        Args:
            images: pixels, not normalised for the network: see `diffcam_fast.overlay`. Moved to the maps' device.
            colormap: name of a colormap, or a table of colours.
            opacity: from 0 (the image alone) to 1.
            blend: "proportional" or "uniform".

        Returns:
            uint8 ``(N, T, H, W, 3)``.

        Raises:
            TypeError: images of a dtype that is not understood.
            ValueError: shapes or values that do not fit, as for maps that are not normalised, or maps without
                exactly two spatial dimensions.
        """
        maps = next(iter(self.layer_maps.values())) if len(self.layer_maps) == 1 else self.maps
        if maps.dim() != 4:
            raise ValueError(f"maps: expected two spatial dimensions, to lie over images; got {tuple(maps.shape)}")
        if isinstance(images, Tensor):
            images = images.to(maps.device)
        return overlay(
            maps, images, colormap=colormap, opacity=opacity, normalize=self._normalize, blend=blend, eps=EPS
        )

    def numpy(self) -> np.ndarray:
        """`maps` as an array on the host. Waits for the device."""
        array: np.ndarray = self.maps.numpy(force=True)
        return array

    def copied(self) -> Explanation:
        """The same in memory of its own, with the maps where they were asked for before."""
        copy = Explanation(
            {name: maps.clone() for name, maps in self.layer_maps.items()},
            self.logits.clone(),
            self.classes.clone(),
            None if self.rivals is None else self.rivals.clone(),
            self.delta.clone(),
            size=self._size,
            normalize=self._normalize,
        )
        maps = self.__dict__.get("maps")
        if maps is not None:
            same = [name for name, layer_maps in self.layer_maps.items() if layer_maps is maps]
            copy.__dict__["maps"] = copy.layer_maps[same[0]] if same else maps.clone()
        return copy

    def __repr__(self) -> str:
        count, targets = self.delta.shape
        return f"Explanation(images={count}, targets={targets}, size={self._size}, layers={self.layers})"

    def _at(self, size: tuple[int, ...]) -> Tensor:
        found = [self._resize(maps, size) for maps in self.layer_maps.values()]
        if len(found) == 1:
            return found[0]
        fused = torch.stack(found).mean(0)
        return fused if self._normalize is None else finished(fused, False, self._normalize)

    def _resize(self, maps: Tensor, size: tuple[int, ...]) -> Tensor:
        if maps.shape[2:] == size:
            return maps
        if len(size) != maps.dim() - 2:
            raise ValueError(
                f"size: expected {maps.dim() - 2} lengths for maps of shape {tuple(maps.shape)}; got {size}"
            )
        return resized(maps, size, self._normalize)


def largest(sizes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The size with the most positions, the first among equals."""
    return tuple(max(sizes, key=lambda size: torch.Size(size).numel()))
