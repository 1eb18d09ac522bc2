"""Methods that are made of another: FinerCAM and RefineCAM."""

from __future__ import annotations

from contextlib import AbstractContextManager
from math import isfinite
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffcam_fast.compat.torchcam.gradients import GradCAM, GradCAMpp, LayerCAM, _GradCAM
from diffcam_fast.compat.torchcam.methods.core import _CAM, OutputTarget, fused_shape, resized
from diffcam_fast.compat.torchcam.recording import ordinary_mode, with_history
from diffcam_fast.compat.torchcam.scoring import Classes, Scores, contrast, explicit, nearest

if TYPE_CHECKING:
    from typing_extensions import Self

_CONTRASTED = (GradCAM, GradCAMpp, LayerCAM)


class _CAMWrapper:
    """Stands for another object of this package, `base_cam`."""

    def __init__(self, base_cam: _CAM) -> None:
        self.base_cam = base_cam

    @property
    def model(self) -> nn.Module:
        """The model that is explained."""
        return self.base_cam.model

    @property
    def target_names(self) -> list[str]:
        """The layers' names."""
        return self.base_cam.target_names

    def enable_hooks(self) -> None:
        """See `_CAM.enable_hooks`."""
        self.base_cam.enable_hooks()

    def disable_hooks(self) -> None:
        """See `_CAM.disable_hooks`."""
        self.base_cam.disable_hooks()

    def reset_hooks(self) -> None:
        """See `_CAM.reset_hooks`."""
        self.base_cam.reset_hooks()

    def remove_hooks(self) -> None:
        """See `_CAM.remove_hooks`."""
        self.base_cam.remove_hooks()

    def _hooks_off(self) -> AbstractContextManager[None]:
        return self.base_cam._hooks_off()

    def __enter__(self) -> Self:
        self.base_cam.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self.base_cam.__exit__(*exception)


class FinerCAM(_CAMWrapper):
    """A class against those that are scored nearest to it (Zhang et al. 2025).

    What is explained is its score less `gamma` times their mean score.

    Args:
        model: see `_CAM`.
        target_layer: see `_CAM`.
        input_shape: see `_CAM`.
        base_method: GradCAM, GradCAMpp or LayerCAM.
        gamma: see above; not negative.
        num_references: how many classes to compare with, where none are named; at least one.
        base_kwargs: for `base_method`.

    Raises:
        TypeError, ValueError: see `_CAM`; another method, or a number that is none or out of range.
    """

    base_cam: _GradCAM

    def __init__(
        self,
        model: nn.Module,
        target_layer: nn.Module | str | list[nn.Module | str] | None = None,
        input_shape: tuple[int, ...] = (3, 224, 224),
        *,
        base_method: type[GradCAM] | type[GradCAMpp] | type[LayerCAM] = GradCAM,
        gamma: float = 0.6,
        num_references: int = 3,
        **base_kwargs: Any,
    ) -> None:
        if base_method not in _CONTRASTED:
            raise TypeError(f"base_method: expected GradCAM, GradCAMpp or LayerCAM; got {base_method!r}")
        if isinstance(gamma, bool) or not isinstance(gamma, int | float):
            raise TypeError(f"gamma: expected a number; got {gamma!r}")
        if not isfinite(gamma) or gamma < 0:
            raise ValueError(f"gamma: expected a finite number that is not negative; got {gamma}")
        if isinstance(num_references, bool) or not isinstance(num_references, int):
            raise TypeError(f"num_references: expected an integer; got {num_references!r}")
        if num_references < 1:
            raise ValueError(f"num_references: expected at least 1; got {num_references}")
        self.gamma = float(gamma)
        self.num_references = num_references
        super().__init__(base_method(model, target_layer, input_shape=input_shape, **base_kwargs))

    def __call__(
        self,
        class_idx: int | list[int],
        scores: Tensor | None = None,
        comparison_idx: int | list[int] | list[list[int]] | None = None,
        normalized: bool = True,
        **kwargs: Any,
    ) -> list[Tensor]:
        """Maps of the last forward pass; see `_CAM`.

        Args:
            class_idx: see `_CAM`.
            scores: what the model put out, ``(N, K)``.
            comparison_idx: the classes compared with: one, a list for all images, or a list with a list for each.
                None: those that are scored nearest.
            normalized: see `_CAM`.
            kwargs: see `_CAM`.

        Raises:
            TypeError, ValueError: see `_CAM`; comparisons that are no classes, or are the class itself.
        """
        with ordinary_mode():
            return self._explain(class_idx, scores, comparison_idx, normalized, kwargs, check=True)

    def compute_cams(
        self,
        class_idx: int | list[int],
        scores: Tensor | None = None,
        comparison_idx: int | list[int] | list[list[int]] | None = None,
        normalized: bool = True,
        **kwargs: Any,
    ) -> list[Tensor]:
        """The same, without the checks that come first."""
        with ordinary_mode():
            return self._explain(class_idx, scores, comparison_idx, normalized, kwargs, check=False)

    def fuse_cams(self, cams: list[Tensor], target_shape: tuple[int, ...] | None = None) -> Tensor:
        """See `_CAM.fuse_cams`; as `base_cam` has it."""
        return self.base_cam.fuse_cams(cams, target_shape)

    def _explain(
        self, class_idx: Any, scores: Any, comparison_idx: Any, normalized: bool, kwargs: dict[str, Any], *, check: bool
    ) -> list[Tensor]:
        if kwargs.pop("targets", None) is not None:
            raise ValueError("targets: not for FinerCAM, which explains classes")
        wanted = self._contrast(class_idx, scores, comparison_idx)
        base = self.base_cam
        if check:
            base._precheck([0] * len(scores), scores)
        if not base.strict:
            return base._explain(wanted, normalized, **kwargs)
        if wanted.several:
            raise ValueError("class_idx: expected one for each image; strict has no more")
        # One score an image, as torchcam has it.
        (difference,) = wanted.values
        return base.compute_cams([0] * len(difference), difference, normalized, **kwargs)

    def _contrast(self, class_idx: Any, scores: Any, comparison_idx: Any) -> Scores:
        if scores is None:
            raise ValueError("scores: expected what the model put out; got None")
        if not isinstance(scores, Tensor):
            raise TypeError(f"scores: expected a tensor; got {type(scores).__name__}")
        if scores.dim() != 2 or scores.shape[0] < 1 or scores.shape[1] < 2:
            raise ValueError(
                f"scores: expected (N, K) with at least one image and two classes; got {tuple(scores.shape)}"
            )
        given = class_idx if isinstance(class_idx, list) else [class_idx]
        if any(isinstance(index, bool | float | str) or index is None for index in given):
            raise TypeError(f"class_idx: expected an integer or a list of integers; got {class_idx!r}")
        classes = Classes(class_idx)
        images, count = scores.shape
        if classes.images not in (None, images):
            raise ValueError(f"class_idx: expected classes for {images} images; got them for {classes.images}")
        try:
            indices = classes.indices(images, count, scores.device)
        except IndexError as error:
            raise ValueError(str(error)) from None
        if comparison_idx is None:
            references = nearest(scores.detach(), indices, self.num_references)
        else:
            rows = torch.tensor(explicit(comparison_idx, indices.tolist(), count))
            references = rows.to(scores.device).unsqueeze(1).expand(-1, indices.shape[1], -1)
        return contrast(with_history(scores), indices, references, self.gamma, several=classes.several)

    def __repr__(self) -> str:
        base = type(self.base_cam).__name__
        return (
            f"FinerCAM(base_method={base}, target_layer={self.target_names}, gamma={self.gamma}, "
            f"num_references={self.num_references})"
        )


class RefineCAM(_CAMWrapper):
    """The product of several layers' maps, at the size of the largest.

    Args:
        model: see `_CAM`.
        target_layer: a list of at least two layers; see `_CAM`.
        input_shape: see `_CAM`.
        base_method: the class whose maps are multiplied.
        base_kwargs: for `base_method`.

    Raises:
        TypeError, ValueError: see `_CAM`; fewer than two layers, or another class.
    """

    def __init__(
        self,
        model: nn.Module,
        target_layer: list[nn.Module | str],
        input_shape: tuple[int, ...] = (3, 224, 224),
        *,
        base_method: type[_CAM] = GradCAMpp,
        **base_kwargs: Any,
    ) -> None:
        if not isinstance(target_layer, list) or len(target_layer) < 2:
            raise ValueError(f"target_layer: expected a list of at least two layers; got {target_layer!r}")
        if not isinstance(base_method, type) or not issubclass(base_method, _CAM):
            raise TypeError(f"base_method: expected a class of torchcam's names here; got {base_method!r}")
        super().__init__(base_method(model, target_layer, input_shape=input_shape, **base_kwargs))

    def __call__(
        self,
        class_idx: int | list[int] | None = None,
        scores: Any = None,
        normalized: bool = True,
        target_shape: tuple[int, ...] | None = None,
        *,
        targets: OutputTarget | list[OutputTarget] | None = None,
        **kwargs: Any,
    ) -> list[Tensor]:
        """One map, in a list; see `_CAM`, and `fuse_cams` for ``target_shape``."""
        maps = self.base_cam(class_idx, scores, normalized=True, targets=targets, **kwargs)
        return [self.fuse_cams(maps, target_shape, normalized)]

    def compute_cams(
        self,
        class_idx: int | list[int] | None = None,
        scores: Any = None,
        normalized: bool = True,
        target_shape: tuple[int, ...] | None = None,
        *,
        targets: OutputTarget | list[OutputTarget] | None = None,
        **kwargs: Any,
    ) -> list[Tensor]:
        """The same, without the checks that come first."""
        maps = self.base_cam.compute_cams(class_idx, scores, normalized=True, targets=targets, **kwargs)
        return [self.fuse_cams(maps, target_shape, normalized)]

    @staticmethod
    def fuse_cams(cams: list[Tensor], target_shape: tuple[int, ...] | None = None, normalized: bool = True) -> Tensor:
        """Maps of several layers scaled to 0 to 1, resized and multiplied.

        Args:
            cams: maps ``(N, *positions)`` of each layer.
            target_shape: of the result; None: the largest of the maps' lengths in each dimension.
            normalized: whether the result is scaled to 0 to 1.

        Raises:
            TypeError: not a list of tensors.
            ValueError: an empty list.
        """
        shape = fused_shape(cams, target_shape)
        with torch.no_grad():
            # In one dimension torchcam does not interpolate.
            mode = None if cams[0].dim() > 2 else "nearest"
            product = torch.stack([resized(_CAM._normalize(maps.clone()), shape, mode) for maps in cams]).prod(0)
            return _CAM._normalize(product) if normalized else product

    def __repr__(self) -> str:
        return f"RefineCAM(base_method={type(self.base_cam).__name__}, target_layer={self.target_names})"
