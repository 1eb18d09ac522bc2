"""Running a user's model as in evaluation, and leaving it exactly as it was."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass
class _Lease:
    """A module whose `training` flag is down for as long as somebody explains its model."""

    module: nn.Module
    training: Any
    users: int


def _compiled_walk() -> Callable[[nn.Module], list[nn.Module] | None] | None:
    try:
        found: Callable[[nn.Module], list[nn.Module] | None] = importlib.import_module(
            "diffcam_fast._C"
        ).modules_in_training
    except ImportError:
        return None
    return found


_modules_in_training = _compiled_walk()

# By id: modules may define their own equality. Shared by all explainers, since several may explain one model
# at a time: the flag goes back up only when the last of them is done.
_leases: dict[int, _Lease] = {}
_lock = threading.Lock()


class evaluating:
    """Within, nothing the model does is recorded by autograd, and every module is in evaluation mode.

    Only the flag `training` is touched, not the method `eval`, which models override with work of their own.
    Grad mode, inference mode, autocast's weight cache and each module's flag are put back on the way out. The
    cache is off within: not in every supported PyTorch can a weight that was cast without gradients serve a pass
    that is recorded, be it the caller's cast and our pass or the other way round.
    """

    # A class and not a generator: a small network waits for the difference.
    __slots__ = ("_cached", "_inference", "_leased", "_model", "_recorded")

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __enter__(self) -> None:
        self._leased = _lower_training_flags(self._model)
        self._cached = torch.is_autocast_cache_enabled()
        self._recorded = torch.is_grad_enabled()
        self._inference = None
        if torch.is_inference_mode_enabled():
            self._inference = torch.inference_mode(False)
            self._inference.__enter__()
        torch._C._set_grad_enabled(False)
        torch.set_autocast_cache_enabled(False)

    def __exit__(self, *exception: object) -> None:
        if self._inference is not None:
            self._inference.__exit__(None, None, None)
        torch._C._set_grad_enabled(self._recorded)
        torch.set_autocast_cache_enabled(self._cached)
        _restore_training_flags(self._leased)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast casts to on a kind of device; None where it is off, or not known there."""
    available = device_type in ("cpu", "cuda") or torch.amp.is_autocast_available(device_type)
    if available and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def autocast_off(device_type: str) -> AbstractContextManager[Any]:
    """Within, operators run in their inputs' dtype: gradients and maps are not for autocast to round."""
    if autocast_dtype(device_type) is None:
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def _lower_training_flags(model: nn.Module) -> list[_Lease]:
    leased = []
    with _lock:
        concerned = _concerned(model)
        for module in concerned:
            lease = _leases.get(id(module))
            if lease is None:
                lease = _leases[id(module)] = _Lease(module, module.training, 0)
                module.training = False
            lease.users += 1
            leased.append(lease)
    return leased


def _concerned(model: nn.Module) -> list[nn.Module]:
    """The modules whose flag is up, or would be but for a lease."""
    # What `model.modules()` goes through, several times as fast: a small network waits for this. A leaf that is in
    # several places is met in each, which does no harm. By id: modules may define their own equality.
    if _modules_in_training is not None and not _leases:
        raised = _modules_in_training(model)
        if raised is not None:
            return raised
    found = [model]
    parents = set()
    concerned = []
    for module in found:
        children = module._modules
        if children:
            if id(module) in parents:
                continue
            parents.add(id(module))
            for child in children.values():
                if child is not None:
                    found.append(child)
        if module.training or (_leases and id(module) in _leases):
            concerned.append(module)
    return concerned


def _restore_training_flags(leased: list[_Lease]) -> None:
    if not leased:
        return
    with _lock:
        for lease in leased:
            lease.users -= 1
            if lease.users == 0:
                del _leases[id(lease.module)]
                lease.module.training = lease.training
