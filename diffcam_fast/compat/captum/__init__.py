"""The names of captum (https://github.com/pytorch/captum), version 0.9.0.

`LayerGradCam` is ours; every other name is the installed original's.
"""

from __future__ import annotations

from typing import Any

from diffcam_fast.compat.captum import attr as attr
from diffcam_fast.compat.captum.layer_grad_cam import LayerGradCam as LayerGradCam
from diffcam_fast.compat.originals import attribute, original

MODULES = ("attr",)
"""Modules of the original that have a file here."""

ELSEWHERE = {"attr._core.layer.grad_cam": ("LayerGradCam",)}
"""Modules of the original whose classes are in another file here."""


def __getattr__(name: str) -> Any:
    if name in ("__all__", "__version__"):
        return getattr(original("captum"), name)
    return attribute("captum", "", name)
