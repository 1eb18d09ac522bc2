"""Other libraries' names for our modules, so that code written for them runs unchanged on our engine."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from diffcam_fast.compat.originals import REQUIREMENTS, attribute, exchange_modules, lock, original, set_aside

_HERE = __name__.rpartition(".")[0]

_strict: dict[str, bool] = {}


def install(package: str, *, strict: bool = False) -> None:
    """Let ``import pytorch_grad_cam`` and the like mean ours, until `uninstall`.

    What was imported before keeps what it has. Installing once more only sets ``strict`` anew.

    Args:
        package: name of the library, as it is imported.
        strict: the default of ``strict`` for all its classes: see their documentation.

    Raises:
        ValueError: the library has no counterpart here.
    """
    _check(package)
    with lock:
        if package not in set_aside:
            ours = {name.removeprefix(f"{_HERE}."): module for name, module in _our_modules(package).items()}
            set_aside[package] = exchange_modules(package, ours)
            sys.meta_path.insert(0, _finder)
        _strict[package] = bool(strict)


def uninstall(package: str) -> None:
    """Give the names back to the library itself.

    Raises:
        ValueError: the library has no counterpart here, or is not installed.
    """
    _check(package)
    with lock:
        if package not in set_aside:
            raise ValueError(f"package: expected one that install() was called for; got {package!r}")
        exchange_modules(package, set_aside.pop(package))
        sys.meta_path.remove(_finder)
        del _strict[package]


@contextmanager
def installed(package: str, *, strict: bool = False) -> Iterator[None]:
    """`install` within the ``with`` block; afterwards all is as it was before.

    Args:
        package: see `install`.
        strict: see `install`.
    """
    before = _strict.get(package)
    install(package, strict=strict)
    try:
        yield
    finally:
        if before is None:
            uninstall(package)
        else:
            install(package, strict=before)


def strict_by_default(package: str) -> bool:
    """What `install` was told; False where it was not called."""
    return _strict.get(package, False)


def _check(package: str) -> None:
    if package not in REQUIREMENTS:
        raise ValueError(f"package: expected one of {', '.join(sorted(REQUIREMENTS))}; got {package!r}")


def _our_modules(package: str) -> dict[str, ModuleType]:
    root = importlib.import_module(f"{_HERE}.{package}")
    for name in root.MODULES:
        importlib.import_module(f"{root.__name__}.{name}")
    return {name: sys.modules[name] for name in (root.__name__, *(f"{root.__name__}.{name}" for name in root.MODULES))}


class _Finder(MetaPathFinder):
    """Finds modules of an original that have no file of their own here, under our name and under its own."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(self._prefix):
            return None
        package, _, submodule = fullname.removeprefix(self._prefix).partition(".")
        if package not in REQUIREMENTS or not submodule or (not self._prefix and package not in set_aside):
            return None
        ours = importlib.import_module(f"{_HERE}.{package}")
        names = ours.ELSEWHERE.get(submodule)
        is_package = names is None and hasattr(original(package, submodule), "__path__")
        return ModuleSpec(fullname, _Loader(ours, package, submodule, names), is_package=is_package)


class _Loader(Loader):
    def __init__(self, ours: ModuleType, package: str, submodule: str, names: Sequence[str] | None) -> None:
        self._ours = ours
        self._package = package
        self._submodule = submodule
        self._names = names

    def exec_module(self, module: ModuleType) -> None:
        if self._names is None:
            for name, value in vars(original(self._package, self._submodule)).items():
                if not name.startswith("__") and not isinstance(value, ModuleType):
                    setattr(module, name, value)
        else:
            for name in self._names:
                setattr(module, name, getattr(self._ours, name))

        def rest(name: str) -> Any:
            return attribute(self._package, self._submodule, name)

        module.__getattr__ = rest  # type: ignore[method-assign]


_finder = _Finder("")

# Names below ours are found whether or not anything is installed; it is asked last, and for those alone.
sys.meta_path.append(_Finder(f"{_HERE}."))
