"""FinerCAM: what tells a class from those that come nearest to it (Zhang et al. 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from diffcam_fast.compat.engine import Reshape
from diffcam_fast.compat.pytorch_grad_cam.base_cam import BaseCAM, leave_block
from diffcam_fast.compat.pytorch_grad_cam.methods import GradCAM
from diffcam_fast.compat.pytorch_grad_cam.scoring import NearestRivals, Targets


class FinerCAM:
    """Any method of ours, of the difference between a class and its nearest rivals.

    Args:
        model: see `BaseCAM`.
        target_layers: see `BaseCAM`.
        reshape_transform: see `BaseCAM`.
        base_method: class of the method.
        strict: see `BaseCAM`.

    Raises:
        TypeError: the class is not one of ours, nor a subclass.
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module],
        reshape_transform: Reshape | None = None,
        base_method: type[BaseCAM] = GradCAM,
        *,
        strict: bool | None = None,
    ) -> None:
        if not (isinstance(base_method, type) and issubclass(base_method, BaseCAM)):
            raise TypeError(f"base_method: expected a class of diffcam_fast.compat.pytorch_grad_cam; got {base_method}")
        # A subclass need not know of it.
        options: dict[str, Any] = {} if strict is None else {"strict": strict}
        self.base_cam = base_method(model, target_layers, reshape_transform, **options)
        self.compute_input_gradient = self.base_cam.compute_input_gradient
        self.uses_gradients = self.base_cam.uses_gradients

    def __call__(self, *args: Any, **kwargs: Any) -> np.ndarray | Tensor:
        """`forward`."""
        return self.forward(*args, **kwargs)

    def forward(
        self,
        input_tensor: Tensor,
        targets: Any = None,
        eigen_smooth: bool = False,
        alpha: float = 1,
        comparison_categories: Sequence[int] | None = None,
        target_idx: int | None = None,
        *,
        as_tensor: bool = False,
    ) -> np.ndarray | Tensor:
        """Explain images.

        Args:
            input_tensor: see `BaseCAM.forward`.
            targets: see `BaseCAM.forward`; None: the class's logit against those nearest to it.
            eigen_smooth: see `BaseCAM.forward`.
            alpha: factor of the other classes' logits.
            comparison_categories: which other classes, by how near they are; 1 is the nearest. None: 1, 2 and 3.
            target_idx: the class; None: that with the largest logit.
            as_tensor: see `BaseCAM.forward`.

        Returns:
            See `BaseCAM.forward`.
        """
        wanted = (
            NearestRivals(alpha, comparison_categories, target_idx)
            if targets is None
            else Targets(targets, len(input_tensor), zeros=self.base_cam.strict)
        )
        return self.base_cam._explain(input_tensor, wanted, eigen_smooth, as_tensor=as_tensor)

    def __enter__(self) -> FinerCAM:
        return self

    def __exit__(self, exc_type: Any, exc_value: Any, exc_tb: Any) -> bool | None:
        return leave_block(self.base_cam, exc_type, exc_value)
