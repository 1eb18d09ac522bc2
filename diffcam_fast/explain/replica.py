"""A copy of a module tree that shares all parameters and buffers, and may be given hooks of its own."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


def replica(model: nn.Module) -> nn.Module:
    """Modules of the same classes, with the same attributes, over the same parameters and buffers.

    The copy is in evaluation mode for good, and runs eagerly where the original was compiled in place. Tensors that
    are put into the original's place later (by `load_state_dict`, `to` or an optimizer) are the copy's, too.
    Hooks are the original's at the time; later ones are each their own.
    """
    return _replica(model, {})


def _replica(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    if id(module) in made:
        return made[id(module)]
    copied = made[id(module)] = module.__new__(type(module))
    copied.__dict__ = dict(module.__dict__)
    children = {name: None if child is None else _replica(child, made) for name, child in module._modules.items()}
    copied.__dict__["_modules"] = children
    copied.__dict__["_forward_hooks"] = OrderedDict(module._forward_hooks)
    copied.__dict__["_compiled_call_impl"] = None
    copied.__dict__["training"] = False
    return copied
