"""What an explanation holds, and what is made of it when asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from diffcam_fast.explain.positions import check_size
from diffcam_fast.reference.cam import finish
from diffcam_fast.viz import overlay

EPS = 1e-7
"""Added to the denominator where maps are normalised, as in `diffcam_fast.cam`."""

_INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}


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
        return self.resized(self._size)

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
        size = check_size(size)
        resized = [self._resize(maps, size) for maps in self.layer_maps.values()]
        if len(resized) == 1:
            return resized[0]
        return self._finish(torch.stack(resized).mean(0))

    def overlay(self, images: Tensor, colormap: str = "jet", opacity: float = 0.5) -> Tensor:
        """The maps laid over the images as heat.

        Args:
            images: pixels, not normalised for the network: see `diffcam_fast.viz.overlay`.
            colormap: name of a colormap.
            opacity: from 0 (the image alone) to 1.

        Returns:
            uint8 ``(N, T, H, W, 3)``.

        Raises:
            TypeError: images of a dtype that is not understood.
            ValueError: shapes or values that do not fit, as for maps that are not normalised.
        """
        return overlay(images, self.maps, colormap=colormap, opacity=opacity)

    def numpy(self) -> np.ndarray:
        """`maps` as an array on the host. Waits for the device."""
        array: np.ndarray = self.maps.numpy(force=True)
        return array

    def __repr__(self) -> str:
        count, targets = self.delta.shape
        return f"Explanation(images={count}, targets={targets}, size={self._size}, layers={self.layers})"

    def _resize(self, maps: Tensor, size: tuple[int, ...]) -> Tensor:
        if maps.shape[2:] == size:
            return maps
        if len(size) != maps.dim() - 2:
            raise ValueError(
                f"size: expected {maps.dim() - 2} lengths for maps of shape {tuple(maps.shape)}; got {size}"
            )
        mode = _INTERPOLATION[len(size)]
        return self._finish(functional.interpolate(maps, size, mode=mode, align_corners=False))

    def _finish(self, maps: Tensor) -> Tensor:
        return finish(maps, False, "none" if self._normalize is None else self._normalize, EPS)


def largest(sizes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The size with the most positions, the first among equals."""
    return tuple(max(sizes, key=lambda size: torch.Size(size).numel()))
