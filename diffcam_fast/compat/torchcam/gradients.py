"""Methods that weight with the gradients of one forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffcam_fast.compat.formulas import channel_weights
from diffcam_fast.compat.torchcam.methods.core import _CAM, OutputTarget
from diffcam_fast.compat.torchcam.pulling import NEEDS_RETAIN_GRAPH, LinearHead, pull_back
from diffcam_fast.compat.torchcam.recording import Pass, Recorded, edge_of, ordinary_mode, record, with_history
from diffcam_fast.compat.torchcam.scoring import Classes, Scores, Targets
from diffcam_fast.reference.cam import accumulation_dtype

EPS = 1e-8

_HERE = f"{__name__.rpartition('.')[0]}."


class _GradCAM(_CAM):
    """What the methods share that take gradients of scores; see `_CAM`.

    The pass may run in any mode. Under `torch.no_grad` or `torch.inference_mode` nothing is recorded before the first
    target layer; the scores are then the model's output as it is, because what the caller computes from it has no
    history.
    """

    _relu = True
    _score_used = True
    _targets_supported = True

    _method: ClassVar[str | None] = None
    """What `diffcam_fast.cam` calls it; None: the weights are computed here."""

    def __init__(
        self,
        model: nn.Module,
        target_layer: nn.Module | str | list[nn.Module | str] | None = None,
        input_shape: tuple[int, ...] = (3, 224, 224),
        **kwargs: Any,
    ) -> None:
        self._pass: Pass | None = None
        self._keep_history = False
        self._head = LinearHead()
        self._replaced = self._is_replaced()
        super().__init__(model, target_layer, input_shape, **kwargs)
        self.hook_handles.append(model.register_forward_pre_hook(self._on_start, with_kwargs=True))
        self.hook_handles.append(model.register_forward_hook(self._on_end, with_kwargs=True, always_call=True))

    def reset_hooks(self) -> None:
        """See `_CAM.reset_hooks`."""
        super().reset_hooks()
        self._recorded: list[Recorded | None] = [None] * len(self.target_names)
        self._used_up = False

    def compute_cams(
        self,
        class_idx: int | list[int] | None = None,
        scores: Any = None,
        normalized: bool = True,
        *,
        targets: OutputTarget | list[OutputTarget] | None = None,
        **kwargs: Any,
    ) -> list[Tensor]:
        """See `_CAM.compute_cams`."""
        with ordinary_mode():
            if self.strict or self._replaced:
                return super().compute_cams(class_idx, scores, normalized, targets=targets, **kwargs)
            wanted = Classes(class_idx) if targets is None else Targets(targets, len(self._activations(0)))
            return self._explain_wanted(wanted, scores, normalized, **kwargs)

    def _explain_wanted(self, wanted: Classes | Targets, scores: Any, normalized: bool, **kwargs: Any) -> list[Tensor]:
        return self._explain(wanted.scores(with_history(scores)), normalized, **kwargs)

    def _explain(
        self, scores: Scores, normalized: bool, *, retain_graph: bool = False, eps: float = EPS
    ) -> list[Tensor]:
        """(N, *positions) of each layer, or (N, T, *positions) for several scores."""
        found = self._gradients(scores, retain_graph)
        method, several = self._method, scores.several
        if method is None:
            found = [self._wide_weights(idx, each, eps, several) for idx, each in enumerate(found)]
        return [
            self._maps(idx, each, method or "gradcam", normalized, several=several).to(self._activations(idx).dtype)
            for idx, each in enumerate(found)
        ]

    def _gradients(self, scores: Scores, retain_graph: bool) -> list[Tensor]:
        """(N, C, *positions) or (N, C) of each layer, or the same with (N, T, C) for several scores."""
        layers = self._recorded
        if self._used_up:
            raise RuntimeError(f"scores: their graph has been used up; {NEEDS_RETAIN_GRAPH}")
        if self.strict:
            layers = [layer and layer._replace(edge=edge_of(layer.output)) for layer in layers]
        reshape = self._reshape_transform
        enabled = self._hooks_enabled
        # Checkpoints run layers once more on the way back.
        self._hooks_enabled = False
        try:
            pooled = reshape is None and not self.strict
            rows = self._head.gradients(scores, layers[0]) if pooled and len(layers) == 1 and layers[0] else None
            found = pull_back(scores, layers, pooled=pooled, retain_graph=retain_graph) if rows is None else [rows]
        finally:
            self._hooks_enabled = enabled
        if not retain_graph:
            # Whoever holds a node holds all that the pass has recorded, which may be the largest thing in memory.
            self._recorded, self._used_up = [None] * len(layers), True
        if reshape is not None:
            with torch.no_grad():
                found = [_by_image(reshape, each) if scores.several else reshape(each) for each in found]
        self.hook_g = [self._at_positions(idx, each, scores.several) for idx, each in enumerate(found)]
        return found

    def _at_positions(self, idx: int, gradients: Tensor, several: bool) -> Tensor:
        """Gradients with positions where they were given once, by a view."""
        activations = self._activations(idx)
        if gradients.dim() == activations.dim() + several:
            return gradients
        positions = activations.shape[2:]
        shape = gradients.shape
        return gradients.reshape(*shape, *(1 for _ in positions)).expand(*shape, *positions)

    def _wide_weights(self, idx: int, gradients: Tensor, eps: float, several: bool) -> Tensor:
        """(N, C) or (N, T, C), float32 or float64."""
        activations = self._activations(idx)
        wide = accumulation_dtype(activations.dtype)
        activations = activations.to(wide)
        if gradients.dim() == 2 + several:
            # Gradients that are the same at every position were given once.
            gradients = gradients.reshape(*gradients.shape, *(1,) * (activations.dim() - 2))
        if not several:
            return self._weights(activations, gradients.to(wide), eps)
        return torch.stack([self._weights(activations, each.to(wide), eps) for each in gradients.unbind(1)], 1)

    def _weights(self, activations: Tensor, gradients: Tensor, eps: float) -> Tensor:
        """Weights of channels, ``(N, C)``, or of channels and positions, of the method.

        Gradients have one position where they are the same at all.
        """
        raise TypeError("expected _get_weights to be overridden")

    def _get_weights(self, class_idx: Any, scores: Any = None, eps: float = EPS, **kwargs: Any) -> list[Tensor]:
        """See `_CAM._get_weights`; in the dtype of the layers' outputs."""
        self._backprop(scores, class_idx, **kwargs)
        found = []
        with torch.no_grad():
            for idx, gradients in enumerate(self.hook_g):
                activations = self._activations(idx)
                assert gradients is not None
                if self.strict:
                    found.append(self._weights(activations, gradients, eps))
                else:
                    wide = accumulation_dtype(activations.dtype)
                    weights = self._weights(activations.to(wide), gradients.to(wide), eps)
                    found.append(weights.to(activations.dtype))
        return found

    def _backprop(
        self, scores: Any, class_idx: int | list[int] | None, retain_graph: bool = False, targets: Any = None
    ) -> None:
        """Leave the gradients of one score an image in `hook_g`."""
        wanted = Classes(class_idx) if targets is None else Targets(targets, len(self._activations(0)))
        self._refuse_several(wanted)
        self._gradients(wanted.scores(with_history(scores)), retain_graph)

    def _refuse_several(self, wanted: Classes | Targets) -> None:
        if wanted.several:
            raise ValueError("class_idx, targets: expected one for each image; neither subclasses nor strict have more")

    def _is_replaced(self) -> bool:
        return any(not getattr(type(self), step).__module__.startswith(_HERE) for step in ("_get_weights", "_backprop"))

    def _on_output(self, module: nn.Module, inputs: Any, output: Any, idx: int = 0) -> Tensor | None:
        if not self._hooks_enabled:
            return None
        self._used_up = False
        self._recorded[idx], handed_on = record(output, self._pass, self.target_names[idx], as_changed=self.strict)
        if self.strict:
            self._take(idx, output if handed_on is None else handed_on)
        else:
            # What the model got a copy of it can only change by the name of something that it had before.
            mine = handed_on is not None and not _share_memory(inputs, output)
            self._take(idx, output, copy=not mine)
        return handed_on

    def _on_start(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._pass = Pass(keep_history=self._keep_history) if self._hooks_enabled else None

    def _on_end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        current, self._pass = self._pass, None
        return None if current is None else current.end(module, (*args, *kwargs.values()), output)


def _share_memory(inputs: Any, output: Tensor) -> bool:
    memory = output.untyped_storage().data_ptr()
    return any(isinstance(each, Tensor) and each.untyped_storage().data_ptr() == memory for each in inputs)


def _by_image(reshape: Callable[[Tensor], Tensor], gradients: Tensor) -> Tensor:
    """(N, T, ...) of a layer as (N, T, C, *positions)."""
    flat = reshape(gradients.flatten(0, 1))
    return flat.reshape(*gradients.shape[:2], *flat.shape[1:])


class GradCAM(_GradCAM):
    """Gradients' means over positions as weights (Selvaraju et al. 2017); see `_CAM` for arguments."""

    _method = "gradcam"

    def _weights(self, activations: Tensor, gradients: Tensor, eps: float) -> Tensor:
        return gradients.flatten(2).mean(2)


class LayerCAM(_GradCAM):
    """Positive gradients as weights of each position (Jiang et al. 2021); see `_CAM` for arguments."""

    _method = "layercam"

    def _weights(self, activations: Tensor, gradients: Tensor, eps: float) -> Tensor:
        return gradients.relu()

    @staticmethod
    def _scale_cams(cams: list[Tensor], gamma: float = 2.0) -> list[Tensor]:
        # Equation 9: layers far from the logits have weak maps.
        return [torch.tanh(gamma * maps) for maps in cams]


class GradCAMpp(_GradCAM):
    """Positive gradients, weighted by their powers (Chattopadhay et al. 2018); see `_CAM` for arguments.

    The weights are ``sum_s G^2 relu(G) / (2 G^2 + sum_s(A G^3) + eps)``, as torchcam describes them. What it computes
    is ``sum_s G^2 relu(G)``: its division is done on a copy. ``strict=True`` leaves it out, too.
    """

    def _weights(self, activations: Tensor, gradients: Tensor, eps: float) -> Tensor:
        if self.strict:
            return (gradients * gradients * gradients.relu()).flatten(2).sum(2)
        found = channel_weights(
            activations, gradients, "gradcam++", eps=eps, activations_outside=False, positive_only=True
        )
        return found * (activations.shape[2:].numel() // max(gradients.shape[2:].numel(), 1))


class XGradCAM(_GradCAM):
    """Gradients' means weighted by the activations (Fu et al. 2020); see `_CAM` for arguments."""

    def _weights(self, activations: Tensor, gradients: Tensor, eps: float) -> Tensor:
        positions = tuple(range(2, activations.dim()))
        return (gradients * activations).sum(positions) / (activations.sum(positions) + eps)
