"""One forward pass of whatever captum explains, and the way back from its scores to a layer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from diffcam_fast.compat.captum.recording import Recording
from diffcam_fast.compat.captum.refusals import InvalidType, NoGradient
from diffcam_fast.compat.captum.targets import Targets
from diffcam_fast.explain.capture import ordinary
from diffcam_fast.explain.evaluation import autocast_off
from diffcam_fast.explain.layers import unwrapped
from diffcam_fast.explain.pooling import FasterPooling, max_poolings


@dataclass(frozen=True)
class Found:
    """What one pass found of each tensor of the layer.

    Attributes:
        values: ``(N, C, *S)``.
        gradients: ``(N, C, *S)``, or ``(N, T, C, *S)`` for T targets an example.
    """

    values: list[Tensor]
    gradients: list[Tensor]


@dataclass(frozen=True)
class Pass:
    """How a pass is done.

    Attributes:
        function: what is explained: a model, or a function around one.
        layer: a module of it.
        of_input: what the layer is given is explained, not what it puts out.
        poolings: from `poolings_of` the function.
        history: see `Recording`.
        attached: what is found keeps its history.
        as_captum: see `Recording`.
    """

    function: Callable[..., Any]
    layer: nn.Module
    of_input: bool = False
    poolings: Sequence[nn.MaxPool2d] = ()
    history: bool = False
    attached: bool = False
    as_captum: bool = False

    def __call__(self, arguments: tuple[Any, ...], targets: Targets, grad_kwargs: Mapping[str, Any]) -> Found:
        """Do it.

        Raises:
            InvalidType, InvalidValue: see `Recording` and `Targets`.
            NoGradient: the scores do not depend on the layer.
        """
        if not self.attached:
            arguments = tuple(ordinary(value) if isinstance(value, Tensor) else value for value in arguments)
        recording = Recording(self.layer, of_input=self.of_input, history=self.history, as_captum=self.as_captum)
        try:
            with FasterPooling(self.poolings), recording:
                torch.set_grad_enabled(self.history)
                output = _called(self.function, arguments)
            return self._pulled_back(output, recording, targets, grad_kwargs)
        finally:
            if not self.as_captum:
                recording.put_back_flags()

    def _pulled_back(
        self, output: Any, recording: Recording, targets: Targets, grad_kwargs: Mapping[str, Any]
    ) -> Found:
        noted = recording.outcome()
        if not isinstance(output, Tensor):
            raise InvalidType(f"forward_func: expected it to return a tensor; got {type(output).__name__}")
        torch.set_grad_enabled(True)
        scores = targets.scores(output)
        if not scores.requires_grad:
            raise NoGradient(
                "forward_func: its output does not depend differentiably on the layer (it detaches, switches "
                "gradients off, leaves PyTorch, or does not use the layer)"
            )
        where = [recorded.where for recorded in noted]
        with autocast_off(scores.device.type):
            if targets.several:
                gradients = _of_several(scores, where, grad_kwargs)
            else:
                gradients = _of_each(scores, where, grad_kwargs)
        values = [recorded.values if self.attached else recorded.values.detach() for recorded in noted]
        found = [_present(gradient, value, grad_kwargs) for gradient, value in zip(gradients, values, strict=True)]
        return Found(values, found)


@contextmanager
def undisturbed(function: Callable[..., Any], *, moving: bool) -> Iterator[None]:
    """Within, passes can be recorded and need not be; afterwards all modes are as they were.

    Models stay in the mode that they are in, as in captum.

    Args:
        function: what is explained.
        moving: buffers of modules in training mode, such as running statistics, keep what a pass makes of them.
            Otherwise they are put back, where the function is a model or a method of one.
    """
    cached = torch.is_autocast_cache_enabled()
    # Leaving puts grad mode back, too. Entering inference mode's counterpart takes time, and is seldom needed.
    ordinarily = torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()
    with ordinarily, torch.set_grad_enabled(False):
        kept = [] if moving else _buffers_in_training(_model_of(function))
        try:
            # A weight that autocast keeps without gradients cannot serve a recorded pass.
            torch.set_autocast_cache_enabled(False)
            yield
        finally:
            torch.set_autocast_cache_enabled(cached)
            torch.set_grad_enabled(False)
            for owner, name, buffer, values in kept:
                # Normalisations do not count what they do to their statistics as a change; nor does this.
                buffer.data.copy_(values)
                owner._buffers[name] = buffer


def on_one_device(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """The network inside wrappers that compile it or spread it over devices, and arguments where it is."""
    if not isinstance(function, nn.Module):
        return function, arguments
    if isinstance(function, nn.DataParallel) and function.device_ids:
        device = torch.device(function.src_device_obj)
        arguments = tuple(value.to(device) if isinstance(value, Tensor) else value for value in arguments)
    return unwrapped(function), arguments


def poolings_of(function: Callable[..., Any]) -> list[nn.MaxPool2d]:
    """Layers for `FasterPooling`, where the function is a model or a method of one."""
    model = _model_of(function)
    return [] if model is None else max_poolings(model)


def _called(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    if isinstance(function, nn.Module):
        # A model compiled in place (`model.compile()`) would skip hooks.
        run = function if function._compiled_call_impl is None else function._call_impl
        return run(*arguments)
    return function(*arguments) if _takes_arguments(function) else function()


def _takes_arguments(function: Callable[..., Any]) -> bool:
    if isinstance(function, FunctionType) and function.__code__.co_argcount:
        return True
    try:
        return bool(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # functions of compiled modules do not tell
        return True


def _of_each(scores: Tensor, where: list[Any], grad_kwargs: Mapping[str, Any]) -> list[Tensor | None]:
    if grad_kwargs:
        # As captum calls it, for the sake of grad_outputs.
        outputs: Any = scores.unbind() if scores.dim() > 0 else scores
        return list(torch.autograd.grad(outputs, where, **grad_kwargs))
    # Of the sum, whatever it is: a gradient for each score would be checked against it at some cost.
    total = scores if scores.numel() == 1 else scores.sum()
    return list(torch.autograd.grad(total, where, allow_unused=True))


def _of_several(scores: Tensor, where: list[Any], grad_kwargs: Mapping[str, Any]) -> list[Tensor | None]:
    """(N, T, *)."""
    count = scores.shape[1]
    options = {"allow_unused": True, **grad_kwargs}
    keep = options.pop("retain_graph", None) or options.get("create_graph", False)
    each = []
    for number in range(count):
        options["retain_graph"] = keep or number + 1 < count
        each.append(torch.autograd.grad(scores[:, number].sum(), where, **options))
    return [
        None if any(gradient is None for gradient in gradients) else torch.stack(gradients, 1)
        for gradients in zip(*each, strict=True)
    ]


def _present(gradient: Tensor | None, values: Tensor, grad_kwargs: Mapping[str, Any]) -> Tensor:
    if gradient is not None:
        return gradient
    if grad_kwargs.get("allow_unused"):
        return torch.zeros_like(values)
    raise NoGradient("layer: the scores do not depend on it")


def _model_of(function: Any) -> nn.Module | None:
    while isinstance(function, partial):
        function = function.func
    owner = getattr(function, "__self__", function)
    return owner if isinstance(owner, nn.Module) else None


def _buffers_in_training(model: nn.Module | None) -> list[tuple[nn.Module, str, Tensor, Tensor]]:
    return [
        (module, name, buffer, buffer.clone())
        for module in _in_training(model)
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]


def _in_training(model: nn.Module | None) -> list[nn.Module]:
    # `model.modules()` takes several times as long, and small networks wait for this.
    waiting = [model]
    seen = {id(model)}
    for module in waiting:
        if module is not None:
            for child in module._modules.values():
                if id(child) not in seen:
                    seen.add(id(child))
                    waiting.append(child)
    return [module for module in waiting if module is not None and module.training]
