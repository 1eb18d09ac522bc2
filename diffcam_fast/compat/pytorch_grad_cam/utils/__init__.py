"""What pytorch-grad-cam has beside its classes."""

from __future__ import annotations

from typing import Any

from diffcam_fast.compat.originals import attribute
from diffcam_fast.compat.pytorch_grad_cam.utils import model_targets, reshape_transforms
from diffcam_fast.compat.pytorch_grad_cam.utils.image import deprocess_image
from diffcam_fast.compat.pytorch_grad_cam.utils.svd_on_activations import get_2d_projection

__all__ = ["deprocess_image", "get_2d_projection", "model_targets", "reshape_transforms"]


def __getattr__(name: str) -> Any:
    return attribute("pytorch_grad_cam", "utils", name)
