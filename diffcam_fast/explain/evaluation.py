"""Running a user's model as in evaluation, and leaving it exactly as it was."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
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
    try:
        with torch.inference_mode(False), torch.no_grad(), _autocast_cache_off():
            yield
    finally:
        _restore_training_flags(leased)


@contextmanager
def autocast_off(device_type: str) -> Iterator[None]:
    """Within, operators run in their inputs' dtype: gradients and maps are not for autocast to round."""
    if not (torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)):
        yield
        return
    with torch.autocast(device_type, enabled=False):
        yield


@contextmanager
def _autocast_cache_off() -> Iterator[None]:
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)


def _lower_training_flags(model: nn.Module) -> list[_Lease]:
    leased = []
    with _lock:
        for module in _modules(model):
            lease = _leases.get(id(module))
            if lease is None:
                if not module.training:
                    continue
                lease = _leases[id(module)] = _Lease(module, module.training, 0)
                module.training = False
            lease.users += 1
            leased.append(lease)
    return leased


def _modules(model: nn.Module) -> list[nn.Module]:
    # What `model.modules()` goes through, three times as fast: on a GPU a small network waits for this.
    found = {id(model): model}
    waiting = [model]
    while waiting:
        for module in waiting.pop()._modules.values():
            if module is not None and id(module) not in found:
                found[id(module)] = module
                waiting.append(module)
    return list(found.values())


def _restore_training_flags(leased: list[_Lease]) -> None:
    if not leased:
        return
    with _lock:
        for lease in leased:
            lease.users -= 1
            if lease.users == 0:
                del _leases[id(lease.module)]
                lease.module.training = lease.training
