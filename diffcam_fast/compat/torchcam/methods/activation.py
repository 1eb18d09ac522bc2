"""CAM, which needs no gradients. The Score-CAM family is the original's."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor, nn

from diffcam_fast.compat.originals import attribute
from diffcam_fast.compat.torchcam.methods.core import _CAM, OutputTarget
from diffcam_fast.compat.torchcam.scoring import Classes

__all__ = ["CAM"]

_logger = logging.getLogger(__name__)


class CAM(_CAM):
    """The last linear layer's weights of a class, for models that take a mean before it (Zhou et al. 2016).

    Args:
        model: a model whose logits are one linear layer of the layer's mean over positions.
        target_layer: see `_CAM`; one alone.
        fc_layer: the linear layer, or a convolution with a kernel of one position; a module or its name. None: the
            only linear layer of the model.
        input_shape: see `_CAM`.
        kwargs: see `_CAM`.

    Raises:
        TypeError, ValueError: see `_CAM`; several layers, or no linear layer to be found.
    """

    def __init__(
        self,
        model: nn.Module,
        target_layer: nn.Module | str | list[nn.Module | str] | None = None,
        fc_layer: nn.Module | str | None = None,
        input_shape: tuple[int, ...] = (3, 224, 224),
        **kwargs: Any,
    ) -> None:
        if isinstance(target_layer, list) and len(target_layer) > 1:
            raise ValueError(f"target_layer: expected one layer; got {len(target_layer)}")
        if fc_layer is not None and not isinstance(fc_layer, nn.Module | str):
            raise TypeError(f"fc_layer: expected a module or a name; got {type(fc_layer).__name__}")
        if fc_layer is None:
            linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
            if len(linear) != 1:
                raise ValueError(f"fc_layer: expected one linear layer in the model; found {len(linear)}")
            fc_layer = linear[0]
            _logger.warning("fc_layer: none was given; taking %r", fc_layer)
        super().__init__(model, target_layer, input_shape, **kwargs)
        weight = self.submodule_dict[self._fc_name(fc_layer)].weight
        assert isinstance(weight, Tensor)
        self._fc_weights = weight.detach().flatten(1) if weight.dim() > 2 else weight.detach()

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
        if self.strict or type(self)._get_weights is not CAM._get_weights or kwargs or targets is not None:
            return super().compute_cams(class_idx, scores, normalized, targets=targets, **kwargs)
        classes = Classes(class_idx)
        return [self._maps(0, self._weights_of(classes), "gradcam", normalized, several=classes.several)]

    def _get_weights(self, class_idx: Any, scores: Any = None, **kwargs: Any) -> list[Tensor]:
        return [self._weights_of(Classes(class_idx))]

    def _weights_of(self, classes: Classes) -> Tensor:
        """(N, C), or (N, T, C) for T classes an image."""
        images = len(self._activations(0))
        weights = self._fc_weights
        if isinstance(classes.values, int) and classes.values < len(weights):
            return weights[classes.values].expand(images, -1)
        indices = classes.indices(images, len(weights), weights.device)
        return weights[indices] if classes.several else weights[indices[:, 0]]

    def _fc_name(self, layer: nn.Module | str) -> str:
        try:
            return self._resolve_layer_name(layer)
        except ValueError as error:
            self.remove_hooks()
            raise ValueError(str(error).replace("target_layer", "fc_layer", 1)) from None


def __getattr__(name: str) -> Any:
    return attribute("torchcam", "methods.activation", name)
