"""How far an attack shifts the region that a network's maps show: NISSIM, MOD and VID.

Chakraborty, Trehan, Mallat and Dugelay, "Generalizing Adversarial Explanations with Grad-CAM", 2022. With ``M_0`` the
map of an image and ``M_e`` that of the image attacked with strength ``e``:

- ``NISSIM(e) = (1 - SSIM(M_0, M_e)) / 2``, for each image: 0 for equal maps, 1 for opposite ones;
- ``MOD(e)``, mean observed dissimilarity: the mean of NISSIM(e) over the images;
- ``VID``, variation in dissimilarity: the standard deviation over the strengths about their mean, dividing by their
  number: ``sqrt(sum_e (D(e) - m)^2 / E)`` with ``m = sum_e D(e) / E`` over ``E`` strengths. The paper's formula has
  ``D = NISSIM``, which gives a number for each image; with ``D = MOD`` it is one for the set. `RegionShift` has both.

Which strengths there are is the caller's choice. Strength 0, at which everything is exactly 0, makes VID larger.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffcam_fast.ops.arguments import check_integer, check_number, check_positive
from diffcam_fast.reference.cam import accumulation_dtype
from diffcam_fast.robustness.structural_similarity import structural_similarity


def nissim(original: Tensor, attacked: Tensor, *, data_range: float = 1.0) -> Tensor:
    """Normalised inverted structural similarity of maps, pair by pair: ``(1 - SSIM) / 2``.

    SSIM is that of `diffcam_fast.robustness.agreement.ssim`, in an implementation for many small maps.

    Args:
        original: ``(N, H, W)``, ``(N, T, H, W)`` or more dimensions before H and W; floating point.
        attacked: the same shape, or with it one of two that broadcast to a common shape, such as ``(E, N, H, W)``.
        data_range: from the least to the largest value that the maps could have; 1 for normalised maps.

    Returns:
        One number a pair, from 0 to 1, of the common shape without H and W: float32, or float64 where both are. Exactly
        0 where the two maps are equal.

    Raises:
        TypeError: not floating point tensors, or a range that is no number.
        ValueError: shapes or devices that do not go together, or a range that is not positive.
    """
    original, attacked = _common(original, attacked)
    check_positive("data_range", data_range)
    if original.dim() < 2 or original.shape[-2:].numel() == 0:
        raise ValueError(f"original: expected shape (N, H, W) or (N, T, H, W); got {tuple(original.shape)}")
    shape = original.shape
    similarity = structural_similarity(
        original.reshape(-1, *shape[-2:]), attacked.reshape(-1, *shape[-2:]), float(data_range)
    )
    return ((1 - similarity) / 2).clamp(0, 1).reshape(shape[:-2])


def mod(dissimilarities: Tensor) -> Tensor:
    """Mean observed dissimilarity: the mean of `nissim` over the images, which are the last dimension.

    Args:
        dissimilarities: ``(N,)`` of one strength, or ``(E, N)`` of several; floating point, N at least 1.

    Returns:
        A number, or ``(E,)``.

    Raises:
        TypeError: not a floating point tensor.
        ValueError: no dimension, or no images.
    """
    _check_floating("dissimilarities", dissimilarities)
    if dissimilarities.dim() == 0 or dissimilarities.shape[-1] == 0:
        raise ValueError(f"dissimilarities: expected one or more images; got shape {tuple(dissimilarities.shape)}")
    return dissimilarities.mean(-1)


def vid(dissimilarities: Tensor) -> Tensor:
    """Variation in dissimilarity: the standard deviation over the strengths, which are the first dimension.

    Args:
        dissimilarities: `mod` of each strength, ``(E,)``, or `nissim` of each strength and image, ``(E, N)``; floating
            point, E at least 1.

    Returns:
        A number, or ``(N,)``, one for each image. With one strength 0.

    Raises:
        TypeError: not a floating point tensor.
        ValueError: no dimension, or no strengths.
    """
    _check_floating("dissimilarities", dissimilarities)
    if dissimilarities.dim() == 0 or len(dissimilarities) == 0:
        raise ValueError(f"dissimilarities: expected one or more strengths; got shape {tuple(dissimilarities.shape)}")
    return (dissimilarities - dissimilarities.mean(0)).square().mean(0).sqrt()


def psnr(original: Tensor, attacked: Tensor, *, data_range: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio of images, pair by pair: ``10 log10(range^2 / mean squared difference)``.

    Args:
        original: ``(N, C, *S)``, floating point.
        attacked: the same shape, or with it one of two that broadcast to a common shape with the same images.
        data_range: from the least to the largest value that the images could have.

    Returns:
        ``(N,)`` in decibels, float32, or float64 where both are; infinity where the two are equal.

    Raises:
        TypeError: not floating point tensors, or a range that is no number.
        ValueError: shapes or devices that do not go together, or a range that is not positive.
    """
    original, attacked = _common(original, attacked)
    check_positive("data_range", data_range)
    if original.dim() < 2 or original.shape[1:].numel() == 0:
        raise ValueError(f"original: expected shape (N, C, *S); got {tuple(original.shape)}")
    return 10 * torch.log10(float(data_range) ** 2 / (original - attacked).square().flatten(1).mean(1))


class RegionShift:
    """MOD and VID of any number of images, batch by batch, without keeping their maps.

    What is kept are sums in float64 and, for plots, how many NISSIM fell into each of `bins` equal parts of 0 to 1.

    Args:
        strengths: of the attacks, in the order in which their maps will come; one at least, each once.
        data_range: as in `nissim`.
        bins: how finely the distribution is counted.

    Raises:
        TypeError: an argument is not of a type above.
        ValueError: no strengths, or one twice, a range that is not positive, or no bins.
    """

    def __init__(self, strengths: Sequence[float], *, data_range: float = 1.0, bins: int = 100) -> None:
        for strength in strengths:
            check_number("strengths", strength)
        self.strengths = tuple(float(strength) for strength in strengths)
        if not self.strengths or len(set(self.strengths)) < len(self.strengths):
            raise ValueError(f"strengths: expected one or more, each once; got {list(strengths)}")
        check_positive("data_range", data_range)
        check_integer("bins", bins, least=1)
        self._data_range = float(data_range)
        self.count = 0
        """How many images there were."""
        self.histogram = torch.zeros(len(self.strengths), bins, dtype=torch.int64)
        """int64 (E, bins): how many NISSIM of each strength fell into each part of 0 to 1."""
        self._sum = torch.zeros(len(self.strengths), dtype=torch.float64)
        self._sum_of_squares = torch.zeros(len(self.strengths), dtype=torch.float64)
        self._sum_of_deviations = 0.0

    def update(self, original: Tensor, attacked: Tensor | Sequence[Tensor]) -> Tensor:
        """Count a batch of images in.

        Args:
            original: their maps, ``(N, H, W)``, on any device; N may be 0.
            attacked: the maps of the attacked images, ``(E, N, H, W)``, or a list of ``(N, H, W)``, by strength.

        Returns:
            Their NISSIM, ``(E, N)``, on the maps' device.

        Raises:
            TypeError, ValueError: as `nissim`, or shapes that are not as above, or maps that are not finite. Nothing
                of the batch is counted then.
        """
        if not isinstance(attacked, Tensor):
            attacked = torch.stack(list(attacked))
        expected = (len(self.strengths), *getattr(original, "shape", ()))
        if tuple(attacked.shape) != expected or attacked.dim() != 4:
            raise ValueError(
                f"attacked: expected (E, N, H, W) for {len(self.strengths)} strengths and original (N, H, W); "
                f"got {tuple(attacked.shape)} for original {tuple(expected[1:])}"
            )
        found = nissim(original, attacked, data_range=self._data_range)
        values = found.detach().to("cpu", torch.float64)
        if not bool(values.isfinite().all()):
            raise ValueError("original, attacked: expected finite maps; got some that are not")
        bins = self.histogram.shape[1]
        parts = (values * bins).long().clamp(max=bins - 1)
        self.count += values.shape[1]
        self._sum += values.sum(1)
        self._sum_of_squares += values.square().sum(1)
        self._sum_of_deviations += float(vid(values).sum())
        self.histogram.scatter_add_(1, parts, torch.ones_like(parts))
        return found

    @property
    def mod(self) -> Tensor:
        """Mean observed dissimilarity of each strength, float64 (E,); NaN before any image came."""
        return self._sum / self.count

    @property
    def spread(self) -> Tensor:
        """Standard deviation of NISSIM over the images, dividing by their number, of each strength: float64 (E,)."""
        return (self._sum_of_squares / self.count - self.mod.square()).clamp(min=0).sqrt()

    @property
    def vid(self) -> float:
        """Variation in dissimilarity of the set: the standard deviation of `mod` over the strengths."""
        return float(vid(self.mod))

    @property
    def mean_image_vid(self) -> float:
        """Variation in dissimilarity of an image, the standard deviation of its NISSIM over the strengths: the mean."""
        return self._sum_of_deviations / self.count if self.count else math.nan


def _common(original: Any, attacked: Any) -> tuple[Tensor, Tensor]:
    """Both in the same shape and dtype."""
    _check_floating("original", original)
    _check_floating("attacked", attacked)
    if original.device != attacked.device:
        raise ValueError(f"attacked: expected the device of original, {original.device}; got {attacked.device}")
    try:
        shape = torch.broadcast_shapes(original.shape, attacked.shape)
    except RuntimeError as error:
        raise ValueError(
            f"attacked: expected a shape that goes with that of original, {tuple(original.shape)}; "
            f"got {tuple(attacked.shape)}"
        ) from error
    dtypes = {accumulation_dtype(original.dtype), accumulation_dtype(attacked.dtype)}
    dtype = torch.float64 if dtypes == {torch.float64} else torch.float32
    return original.to(dtype).expand(shape), attacked.to(dtype).expand(shape)


def _check_floating(name: str, values: Any) -> None:
    if not isinstance(values, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor; got {type(values).__name__}")
    if not values.is_floating_point():
        raise TypeError(f"{name}: expected a floating point tensor; got {values.dtype}")
