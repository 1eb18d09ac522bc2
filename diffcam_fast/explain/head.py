"""Maps for many classes where the head is one linear layer: products of its weight with the activations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffcam_fast.explain.finishing import EPS, finished
from diffcam_fast.explain.shared import SharedCotangent
from diffcam_fast.ops.cam import cam
from diffcam_fast.reference.cam import XGRADCAM_EPS, accumulation_dtype

# Methods whose maps are linear in gradients that are the same at every position.
_LINEAR = ("gradcam", "hirescam", "xgradcam")

# From this share of all classes on, maps of all classes are computed and the ones asked for picked.
_PICKED_FROM = 0.25


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
            if self.method in _LINEAR and targets >= _PICKED_FROM * len(weight):
                return finished(self._picked(cotangents, weight), self.relu, self.normalize)
        else:
            targets = cotangents.shape[1]
        images, channels = self.activations.shape[:2]
        step = max(1, self.memory_budget // max(2 * images * channels * dtype.itemsize, 1))
        positions = self.activations.shape[2:].numel()
        parts = []
        for start in range(0, targets, step):
            chunk = cotangents[:, start : start + step]
            gradients = chunk @ weight if isinstance(chunk, Tensor) else chunk.times(weight)
            gradients = (gradients / positions).to(self.activations.dtype)
            parts.append(self._from_gradients(gradients))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _from_gradients(self, gradients: Tensor) -> Tensor:
        activations = self.activations
        # (N, T, C) could be taken for one gradient (N, C, S) where T = C = S.
        if activations.dim() == 3 and gradients.shape == activations.shape:
            gradients = gradients.unsqueeze(3).expand(*gradients.shape, activations.shape[2])
        return cam(activations, gradients, self.method, relu=self.relu, normalize=self.normalize, eps=EPS)

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
            own *= (cotangent.own[some] / positions).unsqueeze(2)
            shared = torch.bmm(cotangent.shared[some], each)
            torch.baddbmm(own, cotangent.mix[some], shared, alpha=1 / positions, out=raw[some])
        return raw.reshape(images, -1, *size)
