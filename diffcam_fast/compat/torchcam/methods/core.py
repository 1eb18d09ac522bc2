"""What all classes of torchcam share: hooks that wait for the user's forward pass, on our engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from diffcam_fast.compat.aliases import strict_by_default
from diffcam_fast.compat.originals import attribute
from diffcam_fast.compat.torchcam.methods._utils import locate_candidate_layer
from diffcam_fast.compat.torchcam.scoring import Classes, OutputTarget, Targets
from diffcam_fast.explain.finishing import unchecked_cam
from diffcam_fast.explain.pooling import FasterPooling, max_poolings

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["_CAM", "OutputTarget"]

_logger = logging.getLogger(__name__)

_EPS = 1e-8

_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


class _CAM:
    """Maps of a model's layers, as torchcam has them.

    From its construction to `remove_hooks`, or to the end of a ``with`` block, every forward pass of the model leaves
    here what the layers put out; calling the object makes maps of the last pass. Subclasses have `_get_weights`, as
    there; the classes of this package do without, and do not leave the device.

    Args:
        model: any model.
        target_layer: a module that puts out ``(N, C, *positions)``, its name, or a list of either. None: the last one
            that puts out something with the dimensions of the input.
        input_shape: of one input, ``(C, *positions)``, to find that layer with.
        enable_hooks: whether forward passes are taken note of; see `enable_hooks`.
        reshape_transform: makes the layers' outputs ``(N, C, *positions)``; applied to gradients, too.
        strict: do as torchcam does where it is known to be wrong; see the page on migration. None: what
            `diffcam_fast.compat.install` was told, otherwise False.

    Raises:
        TypeError: a layer is neither a module nor a name, or the transform is no function.
        ValueError: a layer is not part of the model, or none was found.
    """

    _relu = False
    _score_used = False
    _targets_supported = False

    def __init__(
        self,
        model: nn.Module,
        target_layer: nn.Module | str | list[nn.Module | str] | None = None,
        input_shape: tuple[int, ...] = (3, 224, 224),
        enable_hooks: bool = True,
        reshape_transform: Callable[[Tensor], Tensor] | None = None,
        *,
        strict: bool | None = None,
    ) -> None:
        if reshape_transform is not None and not callable(reshape_transform):
            raise TypeError(f"reshape_transform: expected a function; got {type(reshape_transform).__name__}")
        if reshape_transform is not None and target_layer is None:
            raise ValueError("target_layer: expected a layer to go with reshape_transform; got None")
        self.model = model
        self.submodule_dict = dict(model.named_modules())
        self.target_names = self._names(target_layer, input_shape)
        self.strict = strict_by_default("torchcam") if strict is None else strict
        self._reshape_transform = reshape_transform
        self._hooks_enabled = enable_hooks
        self.hook_handles: list[RemovableHandle] = []
        self.reset_hooks()
        for idx, name in enumerate(self.target_names):
            hook = partial(self._on_output, idx=idx)
            self.hook_handles.append(self.submodule_dict[name].register_forward_hook(hook))
        self._poolings = max_poolings(model)
        # Of passes that are under way, by thread.
        self._pooling: dict[int, FasterPooling] = {}
        if self._poolings:
            self.hook_handles.append(model.register_forward_pre_hook(self._start_pooling))
            self.hook_handles.append(model.register_forward_hook(self._end_pooling, always_call=True))

    def enable_hooks(self) -> None:
        """Take note of forward passes."""
        self._hooks_enabled = True

    def disable_hooks(self) -> None:
        """Let forward passes go by, and keep what the last one left."""
        self._hooks_enabled = False

    def reset_hooks(self) -> None:
        """Let go of what the last forward pass left."""
        self.hook_a: list[Tensor | None] = [None] * len(self.target_names)
        self.hook_g: list[Tensor | None] = [None] * len(self.target_names)

    def remove_hooks(self) -> None:
        """Take the hooks from the model."""
        for handle in self.hook_handles:
            handle.remove()
        self.hook_handles.clear()

    def _start_pooling(self, *_: Any) -> None:
        self._end_pooling()
        if self._hooks_enabled and not torch.compiler.is_compiling():
            pooling = self._pooling[get_ident()] = FasterPooling(self._poolings, recorded=True)
            pooling.__enter__()

    def _end_pooling(self, *_: Any) -> None:
        pooling = self._pooling.pop(get_ident(), None)
        if pooling is not None:
            pooling.__exit__()

    @contextmanager
    def _hooks_off(self) -> Iterator[None]:
        before = self._hooks_enabled
        self._hooks_enabled = False
        try:
            yield
        finally:
            self._hooks_enabled = before

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove_hooks()
        self.reset_hooks()

    def __call__(
        self,
        class_idx: int | list[int] | None = None,
        scores: Any = None,
        normalized: bool = True,
        *,
        targets: OutputTarget | list[OutputTarget] | None = None,
        **kwargs: Any,
    ) -> list[Tensor]:
        """Maps of the last forward pass.

        Args:
            class_idx: the class that is explained, in all images; a list with a class for each image; or integers
                ``(N, T)``, as a list of lists, a tensor or an array.
            scores: what the model put out, or what was computed from it, ``(N, K)``.
            normalized: whether the maps are scaled to 0 to 1.
            targets: instead of classes, a function of an image's output that returns a scalar tensor, a list with one
                for each image, or a list with a list of T for each.
            kwargs: ``retain_graph=True`` for another call after this one; ``eps`` of the method's weights.

        Returns:
            A tensor ``(N, *positions)`` for each layer, or ``(N, T, *positions)`` for T classes an image, in the dtype
            of what the layer put out and at its size.

        Raises:
            AssertionError: there was no forward pass.
            IndexError: a class that the scores do not have.
            RuntimeError: the scores do not depend on every layer, or their graph has been used up.
            TypeError: scores or targets of another kind.
            ValueError: both or neither of classes and targets; not as many as images; scores are missing.
        """
        self._precheck(class_idx, scores, targets)
        return self.compute_cams(class_idx, scores, normalized, targets=targets, **kwargs)

    def compute_cams(
        self,
        class_idx: int | list[int] | None = None,
        scores: Any = None,
        normalized: bool = True,
        *,
        targets: OutputTarget | list[OutputTarget] | None = None,
        **kwargs: Any,
    ) -> list[Tensor]:
        """The same, without the checks that come first."""
        if targets is not None:
            kwargs["targets"] = targets
        weights = self._get_weights(class_idx, scores, **kwargs)
        found = []
        with torch.no_grad():
            for weight, activations in zip(weights, self.hook_a, strict=True):
                assert activations is not None
                weight = weight.reshape(*weight.shape, *(1 for _ in range(activations.dim() - weight.dim())))
                maps = torch.nansum(weight * activations, dim=1)
                if self._relu:
                    maps = maps.relu_()
                found.append(self._normalize(maps) if normalized else maps)
        return found

    @classmethod
    def fuse_cams(cls, cams: list[Tensor], target_shape: tuple[int, ...] | None = None) -> Tensor:
        """One map of several layers': the largest value at each position.

        Args:
            cams: maps ``(N, *positions)`` of each layer.
            target_shape: of the result; None: the largest of the maps' lengths in each dimension.

        Raises:
            TypeError: not a list of tensors.
            ValueError: an empty list.
        """
        shape = fused_shape(cams, target_shape)
        if len(cams) == 1:
            return cams[0]
        fused, *others = (resized(maps, shape) for maps in cls._scale_cams(cams))
        for maps in others:
            if fused.requires_grad or maps.requires_grad:
                # Where two are as large, the first has the gradient.
                fused = torch.where(fused.isnan() | (fused >= maps), fused, maps)
            else:
                fused = torch.maximum(fused, maps)
        return fused

    @staticmethod
    def _scale_cams(cams: list[Tensor]) -> list[Tensor]:
        return cams

    @staticmethod
    def _normalize(cams: Tensor, spatial_dims: int | None = None, eps: float = _EPS) -> Tensor:
        """Scale maps to 0 to 1 in place, each by itself."""
        dims = tuple(range(cams.dim() - (cams.dim() - 1 if spatial_dims is None else spatial_dims), cams.dim()))
        with torch.no_grad():
            cams.sub_(cams.amin(dims, keepdim=True))
            return cams.div_(cams.amax(dims, keepdim=True) + eps)

    def _get_weights(self, class_idx: Any, scores: Any = None, **kwargs: Any) -> list[Tensor]:
        """Weights of channels, ``(N, C)``, or of channels and positions, for each layer; for subclasses."""
        raise TypeError(f"{type(self).__name__}: expected _get_weights to be overridden")

    def _precheck(self, class_idx: Any, scores: Any = None, targets: Any = None) -> None:
        if (class_idx is None) == (targets is None):
            raise ValueError("class_idx, targets: expected one of them")
        if targets is not None and not self._targets_supported:
            raise ValueError(f"targets: not for {type(self).__name__}, which explains classes")
        for activations in self.hook_a:
            if activations is None:
                raise AssertionError("expected a forward pass of the model, with hooks enabled, before maps are made")
        images = len(self._activations(0))
        if targets is not None:
            Targets(targets, images)
        elif type(class_idx) is not int or class_idx < 0:
            given = Classes(class_idx).images
            if given is not None and given != images:
                raise ValueError(f"class_idx: expected a class for each of {images} images; got {given}")
        if self._score_used and scores is None:
            raise ValueError("scores: expected what the model put out; got None")
        if self._score_used and targets is None and not isinstance(scores, Tensor):
            raise TypeError(f"scores: expected a tensor to go with class_idx; got {type(scores).__name__}")

    def _activations(self, idx: int) -> Tensor:
        found = self.hook_a[idx]
        assert found is not None
        return found

    def _maps(self, idx: int, weights: Tensor, method: str, normalized: bool, *, several: bool) -> Tensor:
        """Maps of one layer from gradients, which may be given once, or from weights: one set an image, or several."""
        activations = self._activations(idx)
        if not 3 <= activations.dim() <= 5:
            raise ValueError(
                f"target_layer: expected {self.target_names[idx]!r} to put out (N, C, *positions); got "
                f"{tuple(activations.shape)}; pass reshape_transform"
            )
        if several and weights.dim() == activations.dim() == 3:
            # (N, T, C) could be taken for one gradient (N, C, S) where T = C = S.
            weights = weights.unsqueeze(3).expand(*weights.shape, activations.shape[2])
        dtype = activations.dtype
        if weights.dtype != dtype:
            dtype = torch.promote_types(dtype, weights.dtype)
            activations, weights = activations.to(dtype), weights.to(dtype)
        normalize = "minmax" if normalized else None
        each = weights if several else weights.unsqueeze(1)
        maps = unchecked_cam(activations, each, method, self._relu, normalize, _EPS)
        maps = maps if several else maps.squeeze(1)
        return maps if maps.dtype == dtype else maps.to(dtype)

    def _on_output(self, module: nn.Module, inputs: Any, output: Any, idx: int = 0) -> Tensor | None:
        if self._hooks_enabled:
            # A copy, because the rest of the model may work in place.
            self._take(idx, output, copy=not self.strict)
        return None

    def _take(self, idx: int, output: Any, *, copy: bool = False) -> None:
        """Keep a layer's output, as the layer put it out."""
        shaped = output if self._reshape_transform is None else self._reshape_transform(output)
        if not isinstance(shaped, Tensor):
            raise TypeError(
                f"target_layer: expected {self.target_names[idx]!r} to put out a tensor; got {type(shaped).__name__}"
            )
        self.hook_a[idx] = shaped.detach().clone() if copy else shaped.detach()

    def _names(self, target_layer: Any, input_shape: tuple[int, ...]) -> list[str]:
        if target_layer is None:
            name = locate_candidate_layer(self.model, input_shape)
            if name is None:
                raise ValueError(
                    f"target_layer: found none for inputs {tuple(input_shape)}; name it, or the input_shape"
                )
            _logger.warning("target_layer: none was given; explaining %r", name)
            return [name]
        layers = target_layer if isinstance(target_layer, list) else [target_layer]
        if not layers:
            raise ValueError("target_layer: expected at least one layer; got an empty list")
        return [self._resolve_layer_name(layer) for layer in layers]

    def _resolve_layer_name(self, layer: Any) -> str:
        if isinstance(layer, nn.Module):
            for name, module in self.submodule_dict.items():
                if module is layer:
                    return name
            raise ValueError(f"target_layer: expected a module of the model; got another {type(layer).__name__}")
        if not isinstance(layer, str):
            raise TypeError(f"target_layer: expected a module, a name or a list of them; got {type(layer).__name__}")
        if layer not in self.submodule_dict:
            close = get_close_matches(layer, self.submodule_dict, n=4)
            hint = f"; close names: {', '.join(map(repr, close))}" if close else ""
            raise ValueError(f"target_layer: the model has no layer {layer!r}{hint}")
        return layer

    def _extra_repr(self) -> str:
        return f"target_layer={self.target_names}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._extra_repr()})"


def fused_shape(cams: Any, target_shape: tuple[int, ...] | None) -> tuple[int, ...]:
    """The size of a map made of several.

    Raises:
        TypeError: not a list of tensors.
        ValueError: an empty list.
    """
    if not isinstance(cams, list) or not all(isinstance(maps, Tensor) for maps in cams):
        raise TypeError(f"cams: expected a list of tensors; got {type(cams).__name__}")
    if not cams:
        raise ValueError("cams: expected at least one map; got an empty list")
    if target_shape is not None:
        return tuple(target_shape)
    return tuple(max(lengths) for lengths in zip(*(maps.shape[1:] for maps in cams), strict=True))


def resized(maps: Tensor, shape: tuple[int, ...], mode: str | None = None) -> Tensor:
    """Maps ``(N, *positions)`` at another size: linear unless told otherwise, corners not aligned."""
    mode = mode or _MODES[maps.dim() - 1]
    align = None if mode == "nearest" else False
    return functional.interpolate(maps.unsqueeze(1), shape, mode=mode, align_corners=align).squeeze(1)


def __getattr__(name: str) -> Any:
    return attribute("torchcam", "methods.core", name)
