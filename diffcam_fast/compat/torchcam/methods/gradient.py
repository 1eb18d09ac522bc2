"""torchcam's methods that take gradients. LeGrad is the original's."""

from __future__ import annotations

from typing import Any

from diffcam_fast.compat.originals import attribute
from diffcam_fast.compat.torchcam.gradients import GradCAM, GradCAMpp, LayerCAM, XGradCAM, _GradCAM
from diffcam_fast.compat.torchcam.smoothing import SmoothGradCAMpp
from diffcam_fast.compat.torchcam.wrappers import FinerCAM, RefineCAM

__all__ = [
    "FinerCAM",
    "GradCAM",
    "GradCAMpp",
    "LayerCAM",
    "RefineCAM",
    "SmoothGradCAMpp",
    "XGradCAM",
    "_GradCAM",
]


def __getattr__(name: str) -> Any:
    return attribute("torchcam", "methods.gradient", name)
