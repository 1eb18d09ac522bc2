"""Maps for many classes where the head is one linear layer: products of its weight with the activations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffcam_fast.explain.finishing import EPS, finished, unchecked_cam
from diffcam_fast.explain.shared import SharedCotangent
from diffcam_fast.reference.cam import XGRADCAM_EPS, accumulation_dtype

# Methods whose maps are linear in gradients that are the same at every position.
_LINEAR = ("gradcam", "hirescam", "xgradcam")

# Whose maps are as many times as large where gradients are.
_PROPORTIONAL = (*_LINEAR, "layercam", "elementwise")

# From this share of all classes on, if there are more than a few, maps of all classes are computed and the ones asked
# for picked.
_PICKED_FROM = 0.25

#: Fewer classes than this have their cotangents written down, unless those are ones and zeros.
FEW = 16


@dataclass
class LinearHead:
    """Logits that are one linear layer of the mean over positions, and the activations that it is taken of.

    Args:
        activations: ``(N, C, *S)``.
        weight: ``(K, C)``.
        method: one of `METHODS`.
        relu: see `diffcam_fast.cam`.
        normalize: see `diffcam_fast.cam`.
        memory_budget: bytes that intermediate results may take, unless those of one image take more.
    """

    activations: Tensor
    weight: Tensor
    method: str
    relu: bool
    normalize: str | None
    memory_budget: int

    def maps(self, cotangents: Tensor | SharedCotangent) -> Tensor:
        """Finished maps ``(N, T, *S)`` of cotangents ``(N, T, K)``, given as they are or by what they share."""
        dtype = accumulation_dtype(self.activations.dtype)
        weight = self.weight.to(self.activations.device, dtype)
        if isinstance(cotangents, SharedCotangent):
            targets = cotangents.classes.shape[1]
            if self.method in _LINEAR and targets >= max(FEW, _PICKED_FROM * len(weight)):
                return finished(self._picked(cotangents, weight), self.relu, self.normalize)
        else:
            targets = cotangents.shape[1]
        images, channels = self.activations.shape[:2]
        step = max(1, self.memory_budget // max(2 * images * channels * dtype.itemsize, 1))
        positions = self.activations.shape[2:].numel()
        parts = []
        for start in range(0, targets, step):
            some = slice(start, start + step)
            if isinstance(cotangents, Tensor):
                gradients = cotangents[:, some] @ weight
            else:
                gradients = (cotangents if targets <= step else cotangents.targets(some)).times(weight)
            parts.append(self._from_pooled_gradients(gradients, positions))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _from_pooled_gradients(self, gradients: Tensor, positions: int) -> Tensor:
        eps = EPS
        if self.normalize is None or self.method not in _PROPORTIONAL:
            gradients /= positions
        else:
            # Maps that are as many times as large, beside an eps that is as large, come out the same.
            eps *= positions
        gradients = gradients.to(self.activations.dtype)
        return unchecked_cam(self.activations, gradients, self.method, self.relu, self.normalize, eps)

    def _picked(self, cotangent: SharedCotangent, weight: Tensor) -> Tensor:
        """Raw maps, from those of all classes."""
        images, _, *size = self.activations.shape
        positions = self.activations.shape[2:].numel()
        classes = len(weight)
        raw = weight.new_empty((images, cotangent.classes.shape[1], positions))
        step = max(1, self.memory_budget // max(2 * classes * positions * weight.itemsize, 1))
        for start in range(0, images, step):
            some = slice(start, start + step)
            activations = self.activations[some].to(weight.dtype).flatten(2)
            if self.method == "xgradcam":
                total = activations.sum(2, keepdim=True)
                activations = activations * (total / (total + XGRADCAM_EPS))
            each = torch.matmul(weight, activations)
            first = torch.arange(len(each), device=each.device).unsqueeze(1) * classes
            rows = (cotangent.classes[some] + first).flatten()
            own = each.flatten(0, 1).index_select(0, rows).reshape(len(each), -1, positions)
            if cotangent.own is None:
                own /= positions
            else:
                own *= (cotangent.own[some] / positions).unsqueeze(2)
            if cotangent.mix is None or cotangent.shared is None:
                raw[some] = own
                continue
            shared = torch.bmm(cotangent.shared[some], each)
            torch.baddbmm(own, cotangent.mix[some], shared, alpha=1 / positions, out=raw[some])
        return raw.reshape(images, -1, *size)
