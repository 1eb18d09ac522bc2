"""captum's LayerGradCam on our kernel, without recording what lies before the layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cached_property, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffcam_fast.compat.aliases import strict_by_default
from diffcam_fast.compat.captum.attributions import fused, stepwise
from diffcam_fast.compat.captum.passes import Found, Pass, on_one_device, poolings_of, undisturbed
from diffcam_fast.compat.captum.refusals import InvalidType
from diffcam_fast.compat.captum.targets import Targets, parse_targets
from diffcam_fast.compat.originals import original

# Arguments of `torch.autograd.grad` that leave the shapes of gradients alone.
_KEEPING_SHAPES = {"retain_graph", "create_graph", "allow_unused", "materialize_grads", "grad_outputs"}


def _kind() -> Any:
    """What captum's class derives from, so that captum's own code recognises ours; a plain class without captum."""
    try:
        theirs = original("captum", "attr")
    except ImportError:
        return object
    return type("LayerGradientAttribution", (theirs.LayerAttribution, theirs.GradientAttribution), {})


_Attribution: Any = _kind()


def _wrapping(function: Any) -> Any:
    # captum's own classes call what `attribute` wraps.
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return call


class LayerGradCam(_Attribution):  # type: ignore[misc]
    """Grad-CAM of one layer (Selvaraju et al. 2017), as captum has it: no ReLU and no normalisation unless asked for.

    What lies before the layer is not recorded for autograd, and the result has no history. Works under
    `torch.no_grad`, `torch.inference_mode` and autocast, and with frozen parameters. The model runs in the mode that
    it is in; statistics that move in training mode are put back where ``forward_func`` is a model or a method of one.

    Args:
        forward_func: a model, or a function around one.
        layer: a module that it calls; of several calls, the last is explained.
        device_ids: devices of a `DataParallel` inside ``forward_func``. With more than one, captum itself does the
            work. Where ``forward_func`` is the `DataParallel` model, the network in it runs on its first device.
        strict: do as captum does where it is known to be wrong: the result keeps the history of all that lies before
            the layer, half precision adds up in half precision, statistics of training mode move, inputs of the layer
            stay marked as requiring gradients, and what a layer is given or hands on of it is what the model makes of
            it later. None: what `diffcam_fast.compat.install` was told, otherwise False.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module,
        device_ids: list[int] | None = None,
        *,
        strict: bool | None = None,
    ) -> None:
        self.forward_func = forward_func
        self.layer = layer
        self.device_ids = device_ids
        self.strict = strict_by_default("captum") if strict is None else strict
        self._needs_history: tuple[Any, Any] | None = None
        self._poolings: tuple[Any, list[nn.MaxPool2d]] | None = None

    @_wrapping
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        relu_attributions: bool = False,
        attr_dim_summation: bool = True,
        grad_kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Attributions of the layer's positions.

        Args:
            inputs: the tensor or the tuple of tensors that ``forward_func`` takes.
            target: which of its outputs is explained: None (each example's only one), an integer or a tuple of indices
                for all examples, a list of integers or tuples or integers ``(N,)`` for each. Integers ``(N, T)``, as
                a tensor, an array or lists, are T targets for each.
            additional_forward_args: one or a tuple of further arguments.
            attribute_to_layer_input: explain what the layer is given, not what it puts out.
            relu_attributions: set negative evidence to zero.
            attr_dim_summation: add up channels.
            grad_kwargs: of `torch.autograd.grad`. With ``create_graph`` the result has a history.

        Returns:
            ``(N, 1, *S)`` for a layer's output ``(N, C, *S)``, in its dtype; ``(N, C, *S)`` without summation. For T
            targets ``(N, T, *S)`` and ``(N, T, C, *S)``. A tuple for layers of several tensors.

        Raises:
            InvalidType: inputs, targets, a layer or tensors of it that are of the wrong type: a TypeError, and an
                AssertionError as in captum.
            InvalidValue: the layer is not called, or targets do not fit: a ValueError, and an AssertionError.
            IndexError: a target that the output does not have.
            NoGradient: the output does not depend on the layer: a ValueError, and a RuntimeError.
        """
        if not isinstance(self.layer, nn.Module):
            raise InvalidType(f"layer: expected a torch.nn.Module; got {type(self.layer).__name__}")
        if self._is_spread():
            theirs = original("captum", "attr").LayerGradCam(self.forward_func, self.layer, self.device_ids)
            return theirs.attribute(
                inputs,
                target,
                additional_forward_args,
                attribute_to_layer_input,
                relu_attributions,
                attr_dim_summation,
                grad_kwargs,
            )
        targets = parse_targets(target)
        options = dict(grad_kwargs or {})
        attached = self.strict or bool(options.get("create_graph"))
        recording = torch.is_grad_enabled()
        function, arguments = on_one_device(self.forward_func, _arguments(inputs, additional_forward_args))
        with undisturbed(function, moving=self.strict):
            found = self._found(function, arguments, targets, options, attribute_to_layer_input, attached)
            torch.set_grad_enabled(recording and attached)
            by_kernel = attr_dim_summation and not attached and options.keys() <= _KEEPING_SHAPES
            result = tuple(
                fused(values, gradients, several=targets.several, relu=relu_attributions)
                if by_kernel
                else stepwise(
                    values,
                    gradients,
                    several=targets.several,
                    relu=relu_attributions,
                    summed=attr_dim_summation,
                    narrow=self.strict,
                )
                for values, gradients in zip(found.values, found.gradients, strict=True)
            )
        return result if len(result) > 1 else result[0]

    @staticmethod
    def interpolate(
        layer_attribution: Tensor, interpolate_dims: int | tuple[int, ...], interpolate_mode: str = "nearest"
    ) -> Tensor:
        """Attributions at another size.

        Args:
            layer_attribution: ``(N, C, *S)``, one to three dimensions of positions.
            interpolate_dims: as many lengths, or one for all.
            interpolate_mode: a mode of `torch.nn.functional.interpolate`.

        Returns:
            ``(N, C, *interpolate_dims)``.
        """
        return functional.interpolate(layer_attribution, interpolate_dims, mode=interpolate_mode)

    @property
    def multiplies_by_inputs(self) -> bool:
        """False."""
        return False

    def has_convergence_delta(self) -> bool:
        """False."""
        return False

    def compute_convergence_delta(self, *args: Any, **kwargs: Any) -> Tensor:
        """As captum has it.

        Raises:
            ImportError: captum is not installed.
        """
        return original("captum", "attr").GradientAttribution.compute_convergence_delta(self, *args, **kwargs)

    @cached_property
    def gradient_func(self) -> Any:
        """As captum has it; unused, here as there."""
        return original("captum", "_utils.gradient").compute_gradients

    @classmethod
    def get_name(cls) -> str:
        """The class's name, in words."""
        return re.sub("(?<!^)(?=[^a-z])", " ", cls.__name__)

    def _is_spread(self) -> bool:
        """Whether hooks would see several devices, each in a thread of its own."""
        if len(self.device_ids or ()) < 2 or isinstance(self.forward_func, nn.DataParallel):
            return False
        if not isinstance(self.forward_func, nn.Module):
            return True
        return any(isinstance(module, nn.DataParallel) for module in self.forward_func.modules())

    def _found(
        self,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        targets: Targets,
        options: Mapping[str, Any],
        of_input: bool,
        attached: bool,
    ) -> Found:
        known = self._needs_history is not None and all(
            one is other for one, other in zip(self._needs_history, (function, self.layer), strict=True)
        )
        # An input may have been used elsewhere before the layer gets it, which counts as well.
        if not (of_input or attached or known):
            state = _random_state(arguments)
            try:
                plain = Pass(function, self.layer, poolings=self._poolings_of(function))
                return plain(arguments, targets, options)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                # Some models need the history of what lies before the layer. All else that is wrong shows again.
                _restore_random_state(arguments, state)
        careful = Pass(function, self.layer, of_input, history=True, attached=attached, as_captum=self.strict)
        found = careful(arguments, targets, options)
        if not (of_input or attached):
            self._needs_history = function, self.layer
        return found

    def _poolings_of(self, function: Callable[..., Any]) -> list[nn.MaxPool2d]:
        if self._poolings is None or self._poolings[0] is not function:
            self._poolings = function, poolings_of(function)
        return self._poolings[1]


def _arguments(inputs: Any, further: Any) -> tuple[Any, ...]:
    if not isinstance(inputs, tuple):
        if inputs is not None and not isinstance(inputs, Tensor):
            raise InvalidType(f"inputs: expected a tensor or a tuple of tensors; got {type(inputs).__name__}")
        inputs = (inputs,)
    if further is None:
        return inputs
    return inputs + (further if isinstance(further, tuple) else (further,))


def _random_state(arguments: tuple[Any, ...]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in _cuda_devices(arguments))]


def _restore_random_state(arguments: tuple[Any, ...], state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    for device, one in zip(_cuda_devices(arguments), state[1:], strict=True):
        torch.cuda.set_rng_state(one, device)


def _cuda_devices(arguments: tuple[Any, ...]) -> list[torch.device]:
    devices = {value.device for value in arguments if isinstance(value, Tensor) and value.is_cuda}
    if not devices or torch.cuda.is_current_stream_capturing():
        return []  # a graph's random numbers are not for its capture to look at
    return sorted(devices, key=str)
