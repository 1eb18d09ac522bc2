"""torch.library's own checks and torch.compile on a GPU, whatever serves."""

from __future__ import annotations

import torch
from torch import Tensor

import diffcam_fast as dcf
from diffcam_fast.reference.cam import METHODS
from diffcam_fast.reference.logit_difference import BASELINES
from tests.gpu.cases import BACKENDS, DEVICE, each, forced, generator
from tests.gpu.test_logit_difference import canonical

OPS = torch.ops.diffcam_fast


@each(backend=BACKENDS, method=("gradcam", "gradcam++"))
def test_opcheck_of_cam(backend: str, method: str) -> None:
    activations = torch.rand(2, 5, 4, 3, generator=generator(7)).to(DEVICE)
    gradients = torch.randn(2, 2, 5, 4, 3, generator=generator(8)).to(DEVICE)
    weights = torch.randn(2, 2, 5, generator=generator(9)).to(DEVICE)
    channels_last = activations.to(memory_format=torch.channels_last)
    needing = activations.clone().requires_grad_(), gradients.clone().requires_grad_()
    with forced(backend):
        for arguments in (
            (*needing, method, True, "minmax", 1e-7),
            (activations, weights, method, False, "max", 1e-7),
            (channels_last, gradients, method, True, "none", 1e-7),
        ):
            torch.library.opcheck(OPS.cam.default, arguments)
        grad_raw = torch.randn(2, 2, 4, 3, generator=generator(10)).to(DEVICE)
        torch.library.opcheck(
            OPS.cam_backward.default,
            (grad_raw, channels_last, gradients, method, True, True),
            test_utils=("test_schema", "test_faketensor"),
        )


@each(backend=BACKENDS, baseline=("logsumexp", "finer"))
def test_opcheck_of_logit_difference(backend: str, baseline: str) -> None:
    logits = torch.randn(3, 5, generator=generator(0)).to(DEVICE).requires_grad_()
    classes = torch.tensor([[0, 1], [4, 2], [3, 3]], device=DEVICE)
    with forced(backend):
        torch.library.opcheck(OPS.logit_difference.default, (logits, classes, *canonical(baseline)))


@each(backend=BACKENDS)
def test_one_graph_and_the_same_maps(backend: str) -> None:
    def explain(activations: Tensor, gradients: Tensor, method: str) -> Tensor:
        return dcf.cam(activations * 2, gradients, method) + 1

    torch._dynamo.reset()
    compiled = torch.compile(explain, fullgraph=True, dynamic=True)
    with forced(backend), torch.no_grad():
        for shape in ((2, 5, 4, 3), (3, 70, 7, 7)):
            activations = torch.rand(shape, generator=generator(0)).to(DEVICE)
            gradients = torch.randn(shape, generator=generator(1)).to(DEVICE)
            for method in METHODS[:2]:
                expected = explain(activations, gradients, method)
                torch.testing.assert_close(compiled(activations, gradients, method), expected)


@each(backend=BACKENDS)
def test_one_graph_and_the_same_gradients(backend: str) -> None:
    def loss(activations: Tensor, gradients: Tensor) -> Tensor:
        return dcf.cam(activations, gradients, "layercam").square().sum()

    torch._dynamo.reset()
    results = []
    with forced(backend):
        for function in (loss, torch.compile(loss, fullgraph=True)):
            a = torch.rand(2, 5, 4, 3, generator=generator(0)).to(DEVICE).requires_grad_()
            g = torch.randn(2, 5, 4, 3, generator=generator(1)).to(DEVICE).requires_grad_()
            results.append(torch.autograd.grad(function(a, g), (a, g)))
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain)


@each(backend=BACKENDS, baseline=BASELINES[2:])
def test_one_graph_and_the_same_differences(backend: str, baseline: str) -> None:
    def explain(logits: Tensor, classes: Tensor) -> Tensor:
        found = dcf.logit_difference(logits * 2, classes, baseline=baseline)
        return found.delta.unsqueeze(-1) * found.cotangent.exp() + 1

    torch._dynamo.reset()
    compiled = torch.compile(explain, fullgraph=True)
    logits = torch.randn(3, 60, generator=generator(0)).to(DEVICE)
    classes = torch.tensor([[0, 1], [4, 2], [59, 3]], device=DEVICE)
    with forced(backend), torch.no_grad():
        torch.testing.assert_close(compiled(logits, classes), explain(logits, classes))
