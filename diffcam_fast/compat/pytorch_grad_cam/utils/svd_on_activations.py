"""Principal components of activations as maps."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from diffcam_fast.compat.eigen import first_component
from diffcam_fast.compat.originals import attribute


def get_2d_projection(activation_batch: np.ndarray) -> np.ndarray:
    """See `diffcam_fast.compat.eigen.first_component`.

    Args:
        activation_batch: ``(N, C, *S)``.

    Returns:
        ``(N, *S)``, float32.
    """
    component = first_component(torch.from_numpy(np.ascontiguousarray(activation_batch)))
    result: np.ndarray = component.float().numpy()
    return result


def __getattr__(name: str) -> Any:
    return attribute("pytorch_grad_cam", "utils.svd_on_activations", name)
