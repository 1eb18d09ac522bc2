"""`torch.compile` sees through the Triton ops: what it compiles holds their kernels, not opaque calls."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from torch._dynamo.backends.common import aot_autograd
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from diffcam_fast.backends.triton import cam, cam_backward, logit_difference, saliency_contrast

assert cam and cam_backward and logit_difference and saliency_contrast
OPS = torch.ops.diffcam_fast_triton
A, G, Z = torch.rand(3, 40, 6, 6), torch.randn(3, 2, 40, 6, 6), torch.randn(3, 40)
CLASSES = torch.zeros(3, 2, dtype=torch.int64)


class Driver:
    """As much of a GPU's driver as tracing asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.mark.parametrize(
    ("call", "tensors", "kernels"),
    [
        (lambda a, g: OPS.cam(a, g, "gradcam", True, "minmax", 1e-7), (A, G), 2),
        (lambda r, a, g: OPS.cam_backward(r, a, g, "gradcam++", True, True)[0], (A[:, :2], A, G), 2),
        (lambda z, c: OPS.logit_difference(z, c, "expected", 0, 1.0, 1.0, [])[1], (Z, CLASSES), 1),
        (lambda z, c: OPS.logit_difference(z, c, "max", 20, 1.0, 1.0, [])[0], (Z, CLASSES), 2),
        (lambda z, c: OPS.logit_difference(z, c, "finer", 0, 1.0, 0.6, [1, 2])[1], (Z, CLASSES), 1),
        (lambda a, g: OPS.saliency_contrast(a, g, True), (A, G), 3),
    ],
    ids=["cam", "cam_backward", "expected", "max of many", "finer", "saliency_contrast"],
)
def test_the_graph_holds_the_kernels(
    monkeypatch: pytest.MonkeyPatch, call: Callable[..., Any], tensors: tuple[Any, ...], kernels: int
) -> None:
    monkeypatch.setattr(driver, "_active", Driver())
    graphs = []

    class Traced(Exception):
        """There is a graph, and no GPU to run it."""

    def keep(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)

        def refuse(*_: Any) -> None:
            raise Traced

        return refuse

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *given: call(*given) + 1, backend=aot_autograd(fw_compiler=keep), fullgraph=True, dynamic=True
    )
    with pytest.raises(Traced):
        compiled(*tensors)
    (graph,) = graphs
    calls = [node for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    assert len(calls) == kernels
    assert not any("diffcam_fast" in str(node.target) for node in graph.graph.nodes)
    # Only what a kernel writes is seen as written: anything else would be copied first.
    written = {name for node in calls for name in node.kwargs.get("tensors_to_clone", ())}
    read = {"activations", "gradients", "logits", "classes", "order", "partials", "saliency"}
    assert written and not written & read
