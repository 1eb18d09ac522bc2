"""The networks that explanations are timed on: torchvision's, with seeded weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import diffcam_fast as dcf
from diffcam_fast.benchmark.explanations import images

SIZE = 224


@dataclass(frozen=True)
class Network:
    """One of torchvision's, and the layer that is usually explained."""

    name: str
    layer: str
    tokens: bool = False

    @property
    def reshape(self) -> Callable[[Tensor], Tensor] | None:
        """From the layer's output to channels at positions."""
        return dcf.tokens_to_positions() if self.tokens else None

    def build(self) -> nn.Module:
        """The network in evaluation mode, with seeded weights and with statistics that keep its activations in range.

        Raises:
            ImportError: torchvision is missing.
        """
        # Imports a build for GPUs beside a PyTorch without them, too.
        from tests.helpers.torchvision_cpu import models

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: nn.Module = models.get_model(self.name, weights=None)
            if self.tokens:
                nn.init.normal_(model.heads.head.weight, std=0.1)  # torchvision starts from a head of zeros
            norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
            momenta = [module.momentum for module in norms]
            for module in norms:
                module.momentum = 1.0
            if norms:
                with torch.no_grad():
                    model.train()(images(4, (SIZE, SIZE)))
            for module, momentum in zip(norms, momenta, strict=True):
                module.momentum = momentum
        return model.eval()


#: Whose layer reaches the logits through a mean over positions.
POOLED = (
    Network("resnet50", "layer4"),
    Network("mobilenet_v2", "features"),
    Network("efficientnet_b0", "features"),
    Network("convnext_tiny", "features"),
)
#: Whose tail is more than that. Right after DenseNet's last batch norm a ReLU works in place, and two peers explain
#: what it leaves: all agree on the maps of the block before it.
OTHERS = (
    Network("vgg16", "features.29"),
    Network("densenet121", "features.denseblock4"),
    Network("vit_b_16", "encoder.layers.encoder_layer_11.ln_1", tokens=True),
)
