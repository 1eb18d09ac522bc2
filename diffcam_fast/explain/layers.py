"""Which layers are explained: found by name or module, or chosen."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from diffcam_fast.explain.capture import LayerHooks

LayerSpec = str | nn.Module
"""A layer as callers give it: its dotted name or the module itself."""

_POOLING = (
    *(
        getattr(nn, f"{kind}Pool{dimensions}d")
        for kind in ("Max", "Avg", "AdaptiveMax", "AdaptiveAvg", "LP")
        for dimensions in (1, 2, 3)
    ),
    nn.FractionalMaxPool2d,
    nn.FractionalMaxPool3d,
)

_PASSING_ON = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
    nn.Flatten,
    nn.Unflatten,
)

_SHOWN_NAMES = 8

ALL = "all"
"""As `layers`: every layer with positions."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside wrappers that compile it or spread it over devices, where hooks would not fire."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(compiled := model._modules.get("_orig_mod"), nn.Module):
            model = compiled
        else:
            return model


def resolve_layers(model: nn.Module, layers: LayerSpec | Sequence[LayerSpec]) -> dict[str, nn.Module]:
    """Layers by their names in the model, in the order given.

    Raises:
        TypeError: not a name, a module or a list of either.
        ValueError: a layer is not part of the model, or is given twice; or there is none.
    """
    given: list[Any] = [layers] if isinstance(layers, str | nn.Module) else _as_list(layers)
    if not given:
        raise ValueError("layers: expected at least one layer; got an empty list (None lets the library choose)")
    by_name = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, nn.Module] = {}
    for layer in given:
        name = _name_of(by_name, layer)
        if any(by_name[name] is module for module in found.values()):
            raise ValueError(f"layers: expected each layer once; got {name!r} twice")
        found[name] = by_name[name]
    return found


def resolve_layer(model: nn.Module, layer: LayerSpec) -> str:
    """One layer's name in the model.

    Raises:
        TypeError: not a name or a module.
        ValueError: the layer is not part of the model.
    """
    return _name_of(dict(model.named_modules(remove_duplicate=False)), layer, "layer")


def _as_list(layers: Any) -> list[Any]:
    # nn.Sequential and nn.ModuleList are modules, hence layers themselves and not lists of layers.
    if not isinstance(layers, Sequence):
        raise TypeError(
            f"layers: expected a module, a dotted name, a list of either, or None; got {type(layers).__name__}"
        )
    return list(layers)


def _name_of(by_name: dict[str, nn.Module], layer: Any, argument: str = "layers") -> str:
    if isinstance(layer, nn.Module):
        layer = unwrapped(layer)
        for name, module in by_name.items():
            if module is layer:
                return name
        kind = type(layer).__name__
        raise ValueError(f"{argument}: expected a module of the model; got a {kind} that is not part of it")
    if not isinstance(layer, str):
        raise TypeError(f"{argument}: expected a module or a dotted name; got {type(layer).__name__}")
    plain = layer
    for prefix in ("module.", "_orig_mod."):
        if plain not in by_name:
            plain = plain.removeprefix(prefix)
    if plain in by_name:
        return plain
    close = difflib.get_close_matches(layer, [name for name in by_name if name], n=4, cutoff=0.5)
    top = [name for name in by_name if name and "." not in name]
    known = ", ".join(repr(name) for name in close or top[:_SHOWN_NAMES])
    more = ", ..." if not close and len(top) > _SHOWN_NAMES else ""
    which = "close names" if close else "it has"
    raise ValueError(f"{argument}: the model has no layer {layer!r}; {which}: {known}{more}")


@dataclass
class _Call:
    """One module's only output in the probing pass, without its memory."""

    name: str
    module: nn.Module
    shape: tuple[int, ...]
    pooled: bool
    channels_last: bool
    state: tuple[int, int]
    """The same for two outputs that are one tensor, not changed in between."""

    @property
    def positions(self) -> int:
        return torch.Size(self.shape[2:]).numel()


class _Probe(LayerHooks):
    """Notes what every module puts out, in the order in which the modules finish."""

    def __init__(self, model: nn.Module) -> None:
        named = [(name, module) for name, module in model.named_modules() if name]
        super().__init__(module for _, module in named)
        self._named = named
        self._counts: dict[int, int] = {}
        self._calls: list[tuple[int, _Call]] = []
        # Kept until the pass is over: an address would be used again.
        self._pooled: list[Tensor] = []
        # By identity, and without keeping anything in memory.
        self._numbers = WeakIdKeyDictionary()

    def on_output(self, index: int, inputs: tuple[Any, ...], output: Any) -> None:
        self._counts[index] = self._counts.get(index, 0) + 1
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return
        name, module = self._named[index]
        # A container that ends in a pooling layer puts out the same tensor.
        pooled = isinstance(module, _POOLING) or any(output is tensor for tensor in self._pooled)
        if pooled:
            self._pooled.append(output)
        number = self._numbers.setdefault(output, len(self._calls))
        state = (number, 0 if output.is_inference() else output._version)
        call = _Call(name, module, tuple(output.shape), pooled, _works_on_last_dimension(module, output), state)
        self._calls.append((index, call))

    def calls(self) -> list[_Call]:
        """Outputs of the modules that were called once."""
        return [call for index, call in self._calls if self._counts[index] == 1]


def _works_on_last_dimension(module: nn.Module, output: Tensor) -> bool:
    if isinstance(module, nn.Linear):
        return True
    if not isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return False
    normalized = tuple(module.normalized_shape)
    return len(normalized) == 1 and normalized == tuple(output.shape[-1:])


def choose_layer(model: nn.Module, images: Tensor) -> str:
    """The last module whose output is laid out like the images: channels, then more than one position.

    Modules that were called more than once, and pooling, dropout and identity modules do not count. The
    forward pass leaves the random number generators as they were.

    Args:
        model: in evaluation mode, gradients off.
        images: ``(N, C, *S)``; a single image is enough.

    Returns:
        The module's name.

    Raises:
        ValueError: there is no such module, or what follows it are tokens, which have positions of their own.
    """
    calls = _probe(model, images)
    chosen = next((call for call in reversed(calls) if _has_positions(call, images)), None)
    if chosen is None:
        raise ValueError(
            "layers: found no layer to explain by itself (none is called once and puts out (N, C, *positions) "
            f"like the images of shape {tuple(images.shape)}); pass layers=, and reshape= for transformers"
        )
    after = calls[calls.index(chosen) :]
    if any(_is_token_layer(call) for call in after) or any(
        _is_token_layer(call) and call.shape == chosen.shape for call in calls
    ):
        raise ValueError(
            "layers: cannot choose a layer by itself: the last one laid out like an image is "
            f"{chosen.name!r}, but the model goes on with tokens or with channels last, as transformers do; "
            "pass layers= and reshape=diffcam_fast.tokens_to_positions() (for channels last: "
            "reshape=lambda x: x.movedim(-1, 1))"
        )
    return chosen.name


def spatial_layers(model: nn.Module, images: Tensor) -> list[str]:
    """Every module that is called once and puts out something laid out like the images, in the order of the calls.

    Leaf modules, blocks and stages alike, pooling too while it leaves more than one position. A module that hands on
    what another one put out (a container its last module's output, dropout in evaluation its input) does not count
    again. The forward pass leaves the random number generators as they were.

    Args:
        model: in evaluation mode, gradients off.
        images: ``(N, C, *S)``; a single image is enough.

    Returns:
        The modules' names.

    Raises:
        ValueError: there is no such module.
    """
    found: dict[tuple[int, int], str] = {}
    for call in _probe(model, images):
        if len(call.shape) == images.dim() and call.shape[0] == len(images) and call.positions > 1:
            found.setdefault(call.state, call.name)
    if not found:
        raise ValueError(
            "layers: found no layer to explain (none is called once and puts out (N, C, *positions) like the images "
            f"of shape {tuple(images.shape)}); pass the layers, and reshape= for transformers"
        )
    return list(found.values())


def _probe(model: nn.Module, images: Tensor) -> list[_Call]:
    devices = [images.device] if images.device.type == "cuda" else []
    with torch.random.fork_rng(devices), _Probe(model) as probe:
        run_eagerly(model, images)
    return probe.calls()


def _has_positions(call: _Call, images: Tensor) -> bool:
    return (
        len(call.shape) == images.dim()
        and call.shape[0] == images.shape[0]
        and call.positions > 1
        and not call.pooled
        and not isinstance(call.module, _PASSING_ON)
    )


def _is_token_layer(call: _Call) -> bool:
    # More than one position between the batch and the last dimension.
    return call.channels_last and torch.Size(call.shape[1:-1]).numel() > 1


def run_eagerly(model: nn.Module, images: Tensor) -> Any:
    """The model's output, with hooks: a model compiled in place (`model.compile()`) would skip them."""
    call: Callable[[Tensor], Any] = model if model._compiled_call_impl is None else model._call_impl
    return call(images)
