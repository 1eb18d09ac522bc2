"""One call of every op, for tests that ask of each the same: capture, streams, waiting, launches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.gpu.cases import DEVICE, Failures, generator, largest

OPS = torch.ops.diffcam_fast


@dataclass(frozen=True)
class Call:
    """A call of an op."""

    inputs: tuple[Tensor, ...]
    """Tensors on the CPU."""

    run: Callable[..., Any]
    """Takes the inputs on a device."""

    launches: int
    """The most kernels that it may take on CUDA."""

    allowed: float = 1e-4
    """How far results on two devices may be apart, as a share of the largest number, or of 1."""

    def __call__(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """All results."""
        with torch.no_grad():
            found = self.run(*inputs)
        return found if isinstance(found, tuple) else (found,)

    def compare(self, failures: Failures, found: tuple[Tensor, ...], expected: tuple[Tensor, ...], what: str) -> None:
        """Compare results of two devices, coarsely: for what no rounding explains."""
        for index, (got, want) in enumerate(zip(found, expected, strict=True)):
            got, want = got.detach().cpu().double(), want.detach().cpu().double()
            failures.at_most(largest(got - want), self.allowed * max(largest(want), 1.0), f"{what}: result {index}")

    def on(self, device: str = DEVICE) -> tuple[Tensor, ...]:
        """The inputs on a device."""
        return tuple(value.to(device) for value in self.inputs)


def _cam(method: str, channels_last: bool = False) -> Call:
    activations = torch.rand(3, 130, 7, 7, generator=generator(0))
    gradients = torch.randn(3, 2, 130, 7, 7, generator=generator(1))
    if channels_last:
        activations = activations.to(memory_format=torch.channels_last)
    return Call((activations, gradients), lambda a, g: OPS.cam(a, g, method, True, "minmax", 1e-7), 2)


def _backward(method: str) -> Call:
    activations = torch.rand(3, 130, 7, 7, generator=generator(0))
    gradients = torch.randn(3, 2, 130, 7, 7, generator=generator(1))
    grad_raw = torch.randn(3, 2, 7, 7, generator=generator(2))
    return Call((grad_raw, activations, gradients), lambda r, a, g: OPS.cam_backward(r, a, g, method, True, True), 2)


def _logit_difference(baseline: str, top_k: int = 0, classes: int = 1000) -> Call:
    logits = 3 * torch.randn(4, classes, generator=generator(3))
    chosen = torch.randint(0, classes, (4, 2), generator=generator(4))
    ranks = [1, 2, 3] if baseline == "finer" else []
    return Call((logits, chosen), lambda z, c: OPS.logit_difference(z, c, baseline, top_k, 1.0, 1.0, ranks), 1)


def _overlay(blend: str) -> Call:
    maps = torch.rand(3, 2, 7, 7, generator=generator(5))
    images = torch.rand(3, 3, 50, 41, generator=generator(6))
    # A level between two colours may fall to either: a step of this table is 1 of 255.
    table = torch.linspace(0, 1, 256).unsqueeze(1).repeat(1, 3)
    return Call(
        (maps, images, table), lambda m, i, t: OPS.overlay(m, i, t, 0.5, "minmax", blend, 1e-7), 2, allowed=2 / 255
    )


def _saliency_contrast(per_channel: bool) -> Call:
    saliency = torch.randn(3, 3, 50, 41, generator=generator(7))
    rivals = torch.randn(3, 2, 3, 50, 41, generator=generator(8))
    return Call((saliency, rivals), lambda s, r: OPS.saliency_contrast(s, r, per_channel), 2, allowed=1e-5)


CALLS: dict[str, Call] = {
    **{f"cam {method}": _cam(method) for method in ("gradcam", "gradcam++", "xgradcam", "hirescam")},
    "cam gradcam channels-last": _cam("gradcam", channels_last=True),
    "cam gradcam++ channels-last": _cam("gradcam++", channels_last=True),
    **{f"cam_backward {method}": _backward(method) for method in ("gradcam", "gradcam++", "layercam")},
    **{f"logit_difference {name}": _logit_difference(name) for name in ("logsumexp", "max", "expected", "finer")},
    "logit_difference top 5": _logit_difference("logsumexp", 5),
    "logit_difference of 262144": _logit_difference("logsumexp", 5, 262144),
    **{f"overlay {blend}": _overlay(blend) for blend in ("proportional", "uniform")},
    "saliency_contrast": _saliency_contrast(True),
    "saliency_contrast of all channels": _saliency_contrast(False),
}
