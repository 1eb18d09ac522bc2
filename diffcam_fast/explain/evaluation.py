"""Running a user's model as in evaluation, and leaving it exactly as it was."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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


# By id: modules may define their own equality. Shared by all explainers, since several may explain one model
# at a time: the flag goes back up only when the last of them is done.
_leases: dict[int, _Lease] = {}
_lock = threading.Lock()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within, nothing the model does is recorded by autograd, and every module is in evaluation mode.

    Only the flag `training` is touched, not the method `eval`, which models override with work of their own.
    Grad mode, inference mode, autocast's weight cache and each module's flag are put back on the way out. The
    cache is off within: not in every supported PyTorch can a weight that was cast without gradients serve a pass
    that is recorded, be it the caller's cast and our pass or the other way round.
    """
    leased = _lower_training_flags(model)
    cached = torch.is_autocast_cache_enabled()
    try:
        # Leaving puts grad mode back, too.
        with torch.inference_mode(False):
            torch.set_grad_enabled(False)
            torch.set_autocast_cache_enabled(False)
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)
        _restore_training_flags(leased)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast casts to on a kind of device; None where it is off, or not known there."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def autocast_off(device_type: str) -> AbstractContextManager[Any]:
    """Within, operators run in their inputs' dtype: gradients and maps are not for autocast to round."""
    if autocast_dtype(device_type) is None:
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def _lower_training_flags(model: nn.Module) -> list[_Lease]:
    modules = _modules(model)
    leased = []
    with _lock:
        concerned = [m for m in modules if m.training or (_leases and id(m) in _leases)]
        for module in concerned:
            lease = _leases.get(id(module))
            if lease is None:
                lease = _leases[id(module)] = _Lease(module, module.training, 0)
                module.training = False
            lease.users += 1
            leased.append(lease)
    return leased


def _modules(model: nn.Module) -> list[nn.Module]:
    # What `model.modules()` goes through, several times as fast: a small network waits for this. By id: modules may
    # define their own equality.
    found = [model]
    seen = {id(model)}
    for module in found:
        children = module._modules
        if children:
            for child in children.values():
                if child is not None and id(child) not in seen:
                    seen.add(id(child))
                    found.append(child)
    return found


def _restore_training_flags(leased: list[_Lease]) -> None:
    if not leased:
        return
    with _lock:
        for lease in leased:
            lease.users -= 1
            if lease.users == 0:
                del _leases[id(lease.module)]
                lease.module.training = lease.training
