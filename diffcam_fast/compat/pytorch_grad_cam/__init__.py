"""The names of pytorch-grad-cam (https://github.com/jacobgil/pytorch-grad-cam), version 1.5.7.

The classes below are ours; every other name is the installed original's.
"""

from __future__ import annotations

from typing import Any

from diffcam_fast.compat.originals import attribute
from diffcam_fast.compat.pytorch_grad_cam import utils
from diffcam_fast.compat.pytorch_grad_cam.base_cam import BaseCAM
from diffcam_fast.compat.pytorch_grad_cam.finer_cam import FinerCAM
from diffcam_fast.compat.pytorch_grad_cam.methods import (
    EigenCAM,
    EigenGradCAM,
    GradCAM,
    GradCAMElementWise,
    GradCAMPlusPlus,
    HiResCAM,
    LayerCAM,
    XGradCAM,
)

__all__ = [
    "BaseCAM",
    "EigenCAM",
    "EigenGradCAM",
    "FinerCAM",
    "GradCAM",
    "GradCAMElementWise",
    "GradCAMPlusPlus",
    "HiResCAM",
    "LayerCAM",
    "XGradCAM",
    "utils",
]

MODULES = (
    "base_cam",
    "finer_cam",
    "utils",
    "utils.image",
    "utils.model_targets",
    "utils.reshape_transforms",
    "utils.svd_on_activations",
)
"""Modules of the original that have a file here."""

ELSEWHERE = {
    "eigen_cam": ("EigenCAM",),
    "eigen_grad_cam": ("EigenGradCAM",),
    "grad_cam": ("GradCAM",),
    "grad_cam_elementwise": ("GradCAMElementWise",),
    "grad_cam_plusplus": ("GradCAMPlusPlus",),
    "hirescam": ("HiResCAM",),
    "layer_cam": ("LayerCAM",),
    "xgrad_cam": ("XGradCAM",),
}
"""Modules of the original whose classes are in another file here."""


def __getattr__(name: str) -> Any:
    return attribute("pytorch_grad_cam", "", name)
