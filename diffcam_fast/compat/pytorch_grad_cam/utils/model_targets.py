"""Targets: functions of the model's output for one image, whose gradient is explained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffcam_fast.compat.originals import attribute


class ClassifierOutputTarget:
    """The logit of a class.

    Args:
        category: index of the class.
    """

    def __init__(self, category: int) -> None:
        self.category = category

    def __call__(self, model_output: Tensor) -> Tensor:
        """The logit, of logits ``(K,)`` or ``(N, K)``."""
        return _of_class(model_output, self.category)


class ClassifierOutputSoftmaxTarget:
    """The probability of a class.

    Args:
        category: index of the class.
    """

    def __init__(self, category: int) -> None:
        self.category = category

    def __call__(self, model_output: Tensor) -> Tensor:
        """The probability, of logits ``(K,)`` or ``(N, K)``."""
        return _of_class(model_output.softmax(-1), self.category)


class ClassifierOutputReST:
    """The logit of a class and the logarithm of its probability, added (https://arxiv.org/abs/2501.06261).

    Args:
        category: index of the class.
    """

    def __init__(self, category: int) -> None:
        self.category = category

    def __call__(self, model_output: Tensor) -> Tensor:
        """The sum, of logits ``(K,)`` or ``(N, K)``."""
        return _of_class(model_output + model_output.log_softmax(-1), self.category)


class BinaryClassifierOutputTarget:
    """The single logit of a binary classifier, with the sign of the class.

    Args:
        category: 1, or anything else for the other class.
    """

    def __init__(self, category: int) -> None:
        self.category = category

    def __call__(self, model_output: Tensor) -> Tensor:
        """The logit or its negative."""
        return model_output if self.category == 1 else -model_output


class SoftmaxOutputTarget:
    """All probabilities."""

    def __call__(self, model_output: Tensor) -> Tensor:
        """Probabilities of logits ``(..., K)``."""
        return model_output.softmax(-1)


class RawScoresOutputTarget:
    """The output as it is."""

    def __call__(self, model_output: Tensor) -> Tensor:
        """What is given."""
        return model_output


class SemanticSegmentationTarget:
    """The scores of a class at the pixels of a mask, added.

    Args:
        category: index of the class.
        mask: ``(H, W)``.
    """

    def __init__(self, category: int, mask: np.ndarray) -> None:
        self.category = category
        self.mask = torch.from_numpy(mask)

    def __call__(self, model_output: Tensor) -> Tensor:
        """The sum, of scores ``(K, H, W)``."""
        return (model_output[self.category] * self.mask.to(model_output.device)).sum()


class FinerWeightedTarget:
    """How far a class's logit is above those of others, weighted by their probabilities (Zhang et al. 2025).

    Args:
        main_category: index of the class.
        comparison_categories: indices of the others.
        alpha: factor of the others' logits.
    """

    def __init__(self, main_category: int, comparison_categories: Sequence[int], alpha: float) -> None:
        self.main_category = main_category
        self.comparison_categories = comparison_categories
        self.alpha = alpha

    def __call__(self, model_output: Tensor) -> Tensor:
        """The weighted mean of the differences, of logits ``(K,)`` or ``(N, K)``."""
        others = list(self.comparison_categories)
        weights = model_output.softmax(-1)[..., others]
        differences = model_output[..., [self.main_category]] - self.alpha * model_output[..., others]
        return (weights * differences).sum(-1) / (weights.sum(-1) + 1e-9)


def _of_class(values: Tensor, category: int) -> Tensor:
    return values[category] if values.dim() == 1 else values[:, category]


def __getattr__(name: str) -> Any:
    return attribute("pytorch_grad_cam", "utils.model_targets", name)
