"""torchcam's `explain`: the original's code, run on our classes."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from types import ModuleType
from typing import Any

from diffcam_fast.compat.aliases import installed
from diffcam_fast.compat.originals import lock, original


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_on_our_classes(), name)


@cache
def _on_our_classes() -> ModuleType:
    # It checks that the class it is given is one of those it has imported: it must import ours.
    spec = original("torchcam", "explain").__spec__
    assert spec is not None and spec.loader is not None
    with lock, installed("torchcam"):
        module = importlib.util.module_from_spec(spec)
        before = sys.modules.get(spec.name)
        # Its dataclasses look their module up.
        sys.modules[spec.name] = module
        try:
            spec.loader.exec_module(module)
        finally:
            if before is None:
                del sys.modules[spec.name]
            else:
                sys.modules[spec.name] = before
    return module
