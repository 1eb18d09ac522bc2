"""The names of torchcam (https://github.com/frgfm/torch-cam), version 0.5.0.

`methods` and `utils` are ours but for what their documentation leaves to the installed original; so is `explain`, which
runs the original's code on our classes. `metrics` is the original's, and takes our classes.
"""

from __future__ import annotations

import importlib
from typing import Any

from diffcam_fast.compat.originals import attribute
from diffcam_fast.compat.torchcam import methods, utils

__all__ = ["methods", "utils"]

__version__ = "0.5.0"

MODULES = (
    "explain",
    "methods",
    "methods._utils",
    "methods.activation",
    "methods.core",
    "methods.gradient",
    "utils",
)
"""Modules of the original that have a file here."""

ELSEWHERE: dict[str, tuple[str, ...]] = {}
"""Modules of the original whose classes are in another file here."""


def __getattr__(name: str) -> Any:
    if name in ("explain", "metrics"):
        return importlib.import_module(f"{__name__}.{name}")
    return attribute("torchcam", "", name)
