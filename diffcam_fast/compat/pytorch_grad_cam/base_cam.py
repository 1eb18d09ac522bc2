"""What all classes of pytorch-grad-cam share, on our engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffcam_fast.compat.aliases import strict_by_default
from diffcam_fast.compat.eigen import first_component
from diffcam_fast.compat.engine import Engine, Record, Reshape, full_gradient
from diffcam_fast.compat.formulas import WEIGHTING, channel_weights, weighted_activations
from diffcam_fast.compat.pytorch_grad_cam.recorded import Recorded
from diffcam_fast.compat.pytorch_grad_cam.scoring import Targets, Wanted
from diffcam_fast.compat.pytorch_grad_cam.smoothing import FlipsTimesFactors
from diffcam_fast.compat.pytorch_grad_cam.utils.image import scale_cam_image
from diffcam_fast.compat.resizing import resize
from diffcam_fast.explain.evaluation import evaluating
from diffcam_fast.explain.finishing import finished, resized, unchecked_cam

# What subclasses may replace; where one does, NumPy arrays are handed through all of them.
_STEPS = (
    "get_cam_weights",
    "get_cam_image",
    "get_target_width_height",
    "compute_cam_per_layer",
    "aggregate_multi_layers",
)


class BaseCAM:
    """Maps of a model's layers, as pytorch-grad-cam has them.

    Subclasses that replace `get_cam_weights` or `get_cam_image` work on NumPy arrays, as there; the classes of this
    package do not leave the device before the maps are finished.

    Args:
        model: any model whose outputs the targets understand.
        target_layers: modules whose output is ``(N, C, *positions)``, called once by the model.
        reshape_transform: makes the layers' outputs so, and is applied to their gradients, too.
        compute_input_gradient: the input's gradient is computed, too; subclasses find it in ``input_tensor.grad``.
        uses_gradients: False: the method looks at activations alone.
        tta_transforms: augmentations for ``aug_smooth``, as a ttach `Compose`; None: the image and its mirror image,
            times 0.9, 1 and 1.1.
        detach: False: subclasses get tensors with their history; needs ``compute_input_gradient``.
        strict: do as pytorch-grad-cam does where it is known to be wrong: the model stays in evaluation mode,
            activations are what an in-place operation left of them, images without a target get maps of zeros,
            volumes lose faces to rounding, and an IndexError ends a ``with`` block silently. None: what
            `diffcam_fast.compat.install` was told, otherwise False.

    Raises:
        TypeError: the layers are not a list of modules.
        ValueError: the list is empty.
    """

    _method: str | None = None
    _projected = False

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module],
        reshape_transform: Reshape | None = None,
        compute_input_gradient: bool = False,
        uses_gradients: bool = True,
        tta_transforms: Iterable[Any] | None = None,
        detach: bool = True,
        *,
        strict: bool | None = None,
    ) -> None:
        self.model = model
        self.target_layers = target_layers
        first = next(chain(model.parameters(), model.buffers()), None)
        self.device = torch.device("cpu") if first is None else first.device
        self.reshape_transform = reshape_transform
        self.compute_input_gradient = compute_input_gradient
        self.uses_gradients = uses_gradients
        self.tta_transforms = FlipsTimesFactors() if tta_transforms is None else tta_transforms
        self.detach = detach
        self.outputs: Any = None
        self.activations_and_grads = Recorded(model, target_layers, reshape_transform, detach)
        self.strict = strict_by_default("pytorch_grad_cam") if strict is None else strict
        self._engine = Engine(model, target_layers, reshape_transform, as_changed=self.strict)
        if self.strict:
            model.eval()

    def __call__(
        self,
        input_tensor: Tensor,
        targets: Any = None,
        aug_smooth: bool = False,
        eigen_smooth: bool = False,
        *,
        as_tensor: bool = False,
    ) -> np.ndarray | Tensor:
        """`forward`, or with ``aug_smooth`` the mean of the maps of augmented images."""
        # A subclass's own `forward` need not know of tensors.
        extra = {"as_tensor": True} if as_tensor else {}
        if aug_smooth:
            return self.forward_augmentation_smoothing(input_tensor, targets, eigen_smooth, **extra)
        return self.forward(input_tensor, targets, eigen_smooth, **extra)

    def forward(
        self, input_tensor: Tensor, targets: Any, eigen_smooth: bool = False, *, as_tensor: bool = False
    ) -> np.ndarray | Tensor:
        """Explain images.

        Args:
            input_tensor: ``(N, C, H, W)``, ``(N, C, D, H, W)`` or ``(N, C, L)``; moved to the model's device.
            targets: what is explained: None (the predicted class of each image), a list with a target for each image
                or with one for all, or a list with a list of T targets for each image. Integers ``(N,)`` or
                ``(N, T)`` as a tensor or an array stand for classes.
            eigen_smooth: the first principal component of the weighted activations instead of their sum.
            as_tensor: return a tensor on the model's device, which has not been waited for.

        Returns:
            Maps from 0 to 1 at the size of the images, float32: ``(N, H, W)``, or ``(N, T, H, W)`` for lists of T.

        Raises:
            TypeError: targets that are no functions.
            ValueError: targets for some of the images; a layer that is not called once, or on which nothing depends.
            IndexError: a class that the model does not have.
        """
        if not self.uses_gradients and isinstance(targets, list) and not targets:
            targets = None
        wanted = Targets(targets, len(input_tensor), zeros=self.strict)
        return self._explain(input_tensor, wanted, eigen_smooth, as_tensor=as_tensor)

    def _explain(
        self, input_tensor: Tensor, wanted: Wanted, eigen_smooth: bool, *, as_tensor: bool = False
    ) -> np.ndarray | Tensor:
        """`forward`, with targets that are understood already."""
        images = input_tensor.to(self.device)
        if self.compute_input_gradient or not self.detach:
            return self._returned(self._explain_with_history(images, wanted, eigen_smooth), as_tensor)
        record = (
            self._engine.gradients(images, wanted.score) if self.uses_gradients else self._engine.activations(images)
        )
        self.outputs = record.outputs
        self.activations_and_grads.take(record)
        if self._is_replaced():
            maps = self._explain_in_numpy(images, record, wanted, eigen_smooth)
        else:
            maps = self._explain_on_device(images, record, eigen_smooth)
        several = self.uses_gradients and wanted.several
        return self._returned(maps if several else maps[:, 0], as_tensor)

    def get_cam_weights(
        self, input_tensor: Tensor, target_layers: Any, targets: Any, activations: Any, grads: Any
    ) -> np.ndarray:
        """Weights of channels, ``(N, C)``; for subclasses to use or to replace.

        Raises:
            TypeError: the method has none.
        """
        if self._method not in WEIGHTING:
            raise TypeError(f"{type(self).__name__}: expected get_cam_weights or get_cam_image to be overridden")
        weights = channel_weights(torch.as_tensor(activations), torch.as_tensor(grads), self._method)
        return weights.numpy(force=True)

    def get_cam_image(
        self,
        input_tensor: Tensor,
        target_layer: nn.Module,
        targets: Any,
        activations: Any,
        grads: Any,
        eigen_smooth: bool = False,
    ) -> np.ndarray:
        """Maps of a layer at its own size, ``(N, *positions)``, before ReLU; for subclasses to use or to replace."""
        a = torch.as_tensor(activations).detach().cpu()
        if self._method is None and self._projected:
            return first_component(a).numpy()
        if self._method in WEIGHTING or self._method is None:
            given = self.get_cam_weights(input_tensor, target_layer, targets, activations, grads)
            weights = torch.as_tensor(given)
            weighted = weights.reshape(*weights.shape, *(1 for _ in a.shape[2:])) * a
        else:
            weighted = weighted_activations(a, torch.as_tensor(grads).detach().cpu(), self._method)
        return (first_component(weighted) if eigen_smooth or self._projected else weighted.sum(1)).numpy()

    def get_target_width_height(self, input_tensor: Tensor) -> tuple[int, ...]:
        """Size of the maps, in reverse order."""
        return tuple(reversed(input_tensor.shape[2:]))

    def compute_cam_per_layer(self, input_tensor: Tensor, targets: Any, eigen_smooth: bool) -> list[np.ndarray]:
        """Maps of each layer, ``(N, 1, *size)``, from `activations_and_grads`."""
        recorded = self.activations_and_grads
        size = self.get_target_width_height(input_tensor)
        activations: list[Any] = recorded.activations
        gradients: list[Any] = recorded.gradients or [None] * len(activations)
        if self.detach:
            activations = [_array(tensor) for tensor in activations]
            gradients = [tensor if tensor is None else _array(tensor) for tensor in gradients]
        found = []
        for layer, a, g in zip(self.target_layers, activations, gradients, strict=False):
            image = self.get_cam_image(input_tensor, layer, targets, a, g, eigen_smooth)
            found.append(scale_cam_image(np.maximum(image, 0), size)[:, None])
        return found

    def aggregate_multi_layers(self, cam_per_target_layer: Sequence[np.ndarray]) -> np.ndarray:
        """The layers' mean, scaled to 0 to 1: ``(N, *size)``."""
        return scale_cam_image(np.maximum(np.concatenate(cam_per_target_layer, 1), 0).mean(1))

    def forward_augmentation_smoothing(
        self, input_tensor: Tensor, targets: Any, eigen_smooth: bool = False, *, as_tensor: bool = False
    ) -> np.ndarray | Tensor:
        """The mean of the maps of augmented images, each turned back."""
        extra = {"as_tensor": True} if as_tensor else {}
        found = []
        for transform in self.tta_transforms:
            maps = self.forward(transform.augment_image(input_tensor), targets, eigen_smooth, **extra)
            maps = torch.as_tensor(maps)
            single = maps.dim() == input_tensor.dim() - 1
            maps = transform.deaugment_mask(maps.unsqueeze(1) if single else maps)
            found.append(maps.squeeze(1) if single else maps)
        return self._returned(torch.stack(found).mean(0), as_tensor)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, exc_type: Any, exc_value: Any, exc_tb: Any) -> bool | None:
        return leave_block(self, exc_type, exc_value)

    def _is_replaced(self) -> bool:
        if self._method is None and not self._projected:
            return True
        return any(getattr(getattr(self, step), "__module__", None) != __name__ for step in _STEPS)

    def _explain_on_device(self, images: Tensor, record: Record, eigen_smooth: bool) -> Tensor:
        """(N, T, *size)."""
        layers = []
        size = images.shape[2:]
        for number, activations in enumerate(record.activations):
            gradients = None if record.gradients is None else record.gradients[number]
            if activations.dim() != images.dim() or activations.dim() < 3:
                raise ValueError(
                    f"target_layers: expected outputs (N, C, *positions) with the dimensions of the images, "
                    f"{tuple(images.shape)}; got {tuple(activations.shape)}; pass reshape_transform"
                )
            if self._projected or eigen_smooth:
                maps = finished(_components(activations, gradients, self._method), True, "minmax")
            else:
                assert gradients is not None and self._method is not None
                maps = unchecked_cam(activations, gradients, self._method, True, "minmax")
            layers.append(maps.float())
        if len(layers) == 1 and len(size) < 3:
            return resized(layers[0], tuple(size), "minmax")
        # Cubic splines go below zero; linear interpolation finds nothing that is not between its neighbours.
        maps = torch.stack([resize(maps, size, zero_beyond=self.strict).relu() for maps in layers]).mean(0)
        return finished(maps, False, "minmax")

    def _explain_in_numpy(self, images: Tensor, record: Record, wanted: Wanted, eigen_smooth: bool) -> Tensor:
        """(N, T, *size), by way of the methods that subclasses replace."""
        functions: list[Any] = wanted.functions(record.outputs) if self.uses_gradients or wanted.known else [None]
        found = []
        for number, targets in enumerate(functions):
            self.activations_and_grads.take(record, number if record.gradients else None)
            maps = self.aggregate_multi_layers(self.compute_cam_per_layer(images, targets, eigen_smooth))
            found.append(torch.from_numpy(np.ascontiguousarray(maps, dtype=np.float32)))
        return torch.stack(found, 1).to(self.device)

    def _explain_with_history(self, images: Tensor, wanted: Wanted, eigen_smooth: bool) -> Tensor:
        """(N, *size): the whole model recorded, for subclasses that look at more than the layers."""
        with evaluating(self.model), torch.enable_grad():
            images = images.detach().requires_grad_()
            try:
                outputs = self.activations_and_grads(images)
                self.outputs = outputs if not self.detach else outputs.detach()
                (targets,) = wanted.functions(outputs)
                scores = [target(output) for target, output in zip(targets, outputs, strict=False)]
                loss = torch.stack(scores).sum()
                (images.grad,) = torch.autograd.grad(loss, images, retain_graph=True, create_graph=not self.detach)
                maps = self.aggregate_multi_layers(self.compute_cam_per_layer(images, targets, eigen_smooth))
            finally:
                self.activations_and_grads.release_hooks()
        return torch.from_numpy(np.ascontiguousarray(maps, dtype=np.float32)).to(self.device)

    def _returned(self, maps: Tensor, as_tensor: bool) -> np.ndarray | Tensor:
        if as_tensor:
            return maps
        array: np.ndarray = maps.float().numpy(force=True)
        return array


def leave_block(base: BaseCAM, exc_type: Any, exc_value: Any) -> bool | None:
    """The end of a ``with`` block; True ends it silently, which only ``strict`` does."""
    base.activations_and_grads.release()
    if base.strict and isinstance(exc_value, IndexError):
        print(f"The with block was left by {exc_type.__name__}: {exc_value}")
        return True
    return None


def _components(activations: Tensor, gradients: Tensor | None, method: str | None) -> Tensor:
    """(N, T, *positions)."""
    if gradients is None or method is None:
        return first_component(activations).unsqueeze(1)
    wide = torch.float64 if activations.dtype == torch.float64 else torch.float32
    a, g = activations.to(wide), full_gradient(gradients, activations).to(wide)
    each = [first_component(weighted_activations(a, one, method)) for one in g.unbind(1)]
    return torch.stack(each, 1)


def _array(tensor: Tensor) -> np.ndarray:
    # NumPy has no bfloat16, and sums half precision in half precision.
    wide = tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
    return wide.numpy()
