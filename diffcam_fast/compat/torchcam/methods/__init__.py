"""torchcam's classes. ScoreCAM, SSCAM, ISCAM and LeGrad are the original's."""

from __future__ import annotations

from typing import Any

from diffcam_fast.compat.originals import attribute
from diffcam_fast.compat.torchcam.methods.activation import CAM
from diffcam_fast.compat.torchcam.methods.core import OutputTarget
from diffcam_fast.compat.torchcam.methods.gradient import (
    FinerCAM,
    GradCAM,
    GradCAMpp,
    LayerCAM,
    RefineCAM,
    SmoothGradCAMpp,
    XGradCAM,
)

__all__ = [
    "CAM",
    "FinerCAM",
    "GradCAM",
    "GradCAMpp",
    "LayerCAM",
    "OutputTarget",
    "RefineCAM",
    "SmoothGradCAMpp",
    "XGradCAM",
]


def __getattr__(name: str) -> Any:
    return attribute("torchcam", "methods", name)
