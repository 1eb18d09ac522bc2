"""The installed originals: what is not done anew here comes from them."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

REQUIREMENTS = {"captum": "captum", "pytorch_grad_cam": "grad-cam", "torchcam": "torchcam"}
"""Packages that have a counterpart here, and what to install for the original."""

# Importing under one name or the other must not be done by two threads at a time.
lock = threading.RLock()

# The modules of originals whose names stand for ours at the moment.
set_aside: dict[str, dict[str, ModuleType]] = {}


def modules_of(package: str) -> dict[str, ModuleType]:
    """What is imported of a package, by name."""
    return {
        name: module for name, module in list(sys.modules.items()) if name == package or name.startswith(package + ".")
    }


def exchange_modules(package: str, modules: dict[str, ModuleType]) -> dict[str, ModuleType]:
    """Let the package's names stand for these modules; returns those that they stood for."""
    before = modules_of(package)
    for name in before:
        del sys.modules[name]
    sys.modules.update(modules)
    return before


def original(package: str, submodule: str = "") -> ModuleType:
    """A module of the installed original, whatever its name stands for at the moment.

    Raises:
        ImportError: it is not installed, or something that it needs is not.
    """
    name = f"{package}.{submodule}" if submodule else package
    with lock, _originals_in_place(package):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and error.name.startswith(package + "."):
                raise
            what = "it" if error.name == package else f"{error.name}, which it needs,"
            raise ImportError(
                f"{name} is not part of diffcam_fast.compat and comes from the original; {what} is not installed: "
                f"pip install {REQUIREMENTS[package]}",
                name=name,
            ) from error


def attribute(package: str, submodule: str, name: str) -> Any:
    """What the original calls by this name; for `__getattr__` of modules.

    Raises:
        AttributeError: it has no such name.
        ImportError: it is not installed.
    """
    if name.startswith("_"):
        raise AttributeError(f"module 'diffcam_fast.compat.{package}' has no attribute {name!r}")
    return getattr(original(package, submodule), name)


@contextmanager
def _originals_in_place(package: str) -> Iterator[None]:
    if package not in set_aside:
        yield
        return
    # While they are in place, a nested call finds them there.
    ours = exchange_modules(package, set_aside.pop(package))
    try:
        yield
    finally:
        set_aside[package] = exchange_modules(package, ours)
