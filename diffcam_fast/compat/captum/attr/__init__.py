"""The names of captum's attribution methods: `LayerGradCam` is ours, every other is the installed original's."""

from __future__ import annotations

from typing import Any

from diffcam_fast.compat.captum.layer_grad_cam import LayerGradCam as LayerGradCam
from diffcam_fast.compat.originals import attribute, original


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return original("captum", "attr").__all__
    return attribute("captum", "attr", name)
