"""Smooth Grad-CAM++: the model once more, on noisy images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffcam_fast.compat.torchcam.gradients import EPS, _GradCAM
from diffcam_fast.compat.torchcam.scoring import Classes, Targets
from diffcam_fast.explain.evaluation import evaluating
from diffcam_fast.reference.cam import accumulation_dtype


class SmoothGradCAMpp(_GradCAM):
    """Grad-CAM++ with means of gradients' powers over noisy images (Omeiza et al. 2019).

    As in torchcam, the gradient's first power and the activations that are weighted are those of the last noisy
    image. The noise comes from PyTorch's global generator. The noisy images are seen in evaluation mode.

    Args:
        model: see `_CAM`.
        target_layer: see `_CAM`.
        num_samples: of noisy images, at least one.
        std: of the noise.
        input_shape: see `_CAM`.
        kwargs: see `_CAM`.

    Raises:
        TypeError, ValueError: see `_CAM`; no noisy image; a standard deviation that is not positive.
    """

    _score_used = False

    def __init__(
        self,
        model: nn.Module,
        target_layer: nn.Module | str | list[nn.Module | str] | None = None,
        num_samples: int = 4,
        std: float = 0.3,
        input_shape: tuple[int, ...] = (3, 224, 224),
        **kwargs: Any,
    ) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples: expected at least 1; got {num_samples}")
        self._distrib = torch.distributions.Normal(0, std)
        super().__init__(model, target_layer, input_shape, **kwargs)
        self.num_samples = num_samples
        self.std = std
        self._ihook_enabled = True

    def reset_hooks(self) -> None:
        """See `_CAM.reset_hooks`."""
        super().reset_hooks()
        self._input: Tensor | None = None

    def _explain_wanted(self, wanted: Classes | Targets, scores: Any, normalized: bool, **kwargs: Any) -> list[Tensor]:
        before = list(self.hook_a)
        try:
            weights = self._noisy_weights(wanted, **kwargs)
            return [
                self._maps(idx, each, "gradcam", normalized, several=wanted.several).to(self._activations(idx).dtype)
                for idx, each in enumerate(weights)
            ]
        finally:
            # For the next call, which begins with the same image, and records passes of its own.
            self.hook_a = before

    def _get_weights(self, class_idx: Any, scores: Any = None, eps: float = EPS, **kwargs: Any) -> list[Tensor]:
        targets = kwargs.pop("targets", None)
        wanted = Classes(class_idx) if targets is None else Targets(targets, len(self._activations(0)))
        self._refuse_several(wanted)
        weights = self._noisy_weights(wanted, eps=eps, **kwargs)
        return [each.to(self._activations(idx).dtype) for idx, each in enumerate(weights)]

    def _noisy_weights(self, wanted: Classes | Targets, retain_graph: bool = False, eps: float = EPS) -> list[Tensor]:
        """(N, C) or (N, T, C) of each layer; float32 or float64, or, if strict, in the dtype of the layer."""
        if self._input is None:
            raise AssertionError("expected a forward pass of the model, with hooks enabled, before maps are made")
        images = self._input
        # Passes over noisy images put others in their place.
        clean = [self._activations(idx) for idx in range(len(self.hook_a))]
        squares: list[Tensor] = []
        cubes: list[Tensor] = []
        last: list[Tensor] = []
        with self._seeing_noise():
            for number in range(self.num_samples):
                noise = self._distrib.sample(images.shape)
                outputs = self.model(images + noise.to(images.device, images.dtype))
                last = [self._wide(each) for each in self._gradients(wanted.scores(outputs), retain_graph)]
                if number == 0:
                    squares = [each * each for each in last]
                    cubes = [square * each for square, each in zip(squares, last, strict=True)]
                    continue
                for square, cube, each in zip(squares, cubes, last, strict=True):
                    power = each * each
                    square.add_(power)
                    cube.addcmul_(power, each)
        return [
            self._combined(self._wide(a), square, cube, first, wanted.several, eps)
            for a, square, cube, first in zip(clean, squares, cubes, last, strict=True)
        ]

    def _combined(self, a: Tensor, square: Tensor, cube: Tensor, first: Tensor, several: bool, eps: float) -> Tensor:
        """Weights, from sums of powers."""
        positions = a.dim() - 2
        a = a.unsqueeze(1) if several else a
        once = first.dim() < a.dim()
        if once:
            # Gradients that are the same at every position were given once.
            square, cube, first = (each.reshape(*each.shape, *(1,) * positions) for each in (square, cube, first))
        dims = tuple(range(-positions, 0))
        square = square / self.num_samples
        weighed = (cube / self.num_samples * a).sum(dims, keepdim=True)
        alpha = square / (2 * square + weighed + eps)
        weights = (alpha * first.relu()).sum(dims)
        return weights * a.shape[-positions:].numel() if once else weights

    def _wide(self, values: Tensor) -> Tensor:
        return values if self.strict else values.to(accumulation_dtype(values.dtype))

    @contextmanager
    def _seeing_noise(self) -> Iterator[None]:
        before = self._hooks_enabled, self._ihook_enabled, self._keep_history
        self._hooks_enabled, self._ihook_enabled, self._keep_history = True, False, True
        try:
            if self.strict:
                with torch.inference_mode(False), torch.enable_grad():
                    yield
            else:
                # Nothing is recorded before the first target layer.
                with evaluating(self.model):
                    yield
        finally:
            self._hooks_enabled, self._ihook_enabled, self._keep_history = before

    def _on_start(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        super()._on_start(module, args, kwargs)
        if self._ihook_enabled and self._hooks_enabled:
            images = next(iter((*args, *kwargs.values())))
            # A copy, because the model may work in place; and one that autograd can work with.
            with torch.inference_mode(False), torch.no_grad():
                self._input = images.clone()

    def _extra_repr(self) -> str:
        return f"{super()._extra_repr()}, num_samples={self.num_samples}, std={self.std}"
