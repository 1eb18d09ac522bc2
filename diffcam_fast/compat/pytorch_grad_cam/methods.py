"""One class a method; the formulas are those of `diffcam_fast.cam`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from diffcam_fast.compat.engine import Reshape
from diffcam_fast.compat.pytorch_grad_cam.base_cam import BaseCAM


class _Method(BaseCAM):
    """A method by name.

    Args:
        model: see `BaseCAM`.
        target_layers: see `BaseCAM`.
        reshape_transform: see `BaseCAM`.
        strict: see `BaseCAM`.
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module],
        reshape_transform: Reshape | None = None,
        *,
        strict: bool | None = None,
    ) -> None:
        super().__init__(
            model, target_layers, reshape_transform, uses_gradients=self._method is not None, strict=strict
        )


class GradCAM(_Method):
    """Channels weighted by the mean of their gradients (Selvaraju et al. 2017)."""

    _method = "gradcam"


class GradCAMPlusPlus(_Method):
    """Channels weighted by their positive gradients, each with a weight of its own (Chattopadhay et al. 2018)."""

    _method = "gradcam++"


class XGradCAM(_Method):
    """Channels weighted by gradients, weighted by the activations (Fu et al. 2020)."""

    _method = "xgradcam"


class HiResCAM(_Method):
    """Gradients times activations (Draelos and Carin 2020)."""

    _method = "hirescam"


class LayerCAM(_Method):
    """Positive gradients times activations (Jiang et al. 2021)."""

    _method = "layercam"


class GradCAMElementWise(_Method):
    """The positive ones among gradients times activations (Pillai and Pirsiavash 2021)."""

    _method = "elementwise"


class EigenCAM(_Method):
    """The first principal component of the activations (Muhammad and Yeasin 2020): no gradients, no classes."""

    _method = None
    _projected = True


class EigenGradCAM(_Method):
    """The first principal component of gradients times activations."""

    _method = "hirescam"
    _projected = True
