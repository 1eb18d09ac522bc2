"""A smaller sweep over the compiled ops on a GPU, each result compared: what compute-sanitizer is run on.

`python -m tests.gpu.sweep`; the last line says how many calls were made.
"""

from __future__ import annotations

import os
import sys

import torch

from diffcam_fast.backends import absent_because, use_backend
from diffcam_fast.reference.cam import METHODS
from diffcam_fast.reference.cam import cam_backward as reference_backward
from tests.gpu.cases import DEVICE, Failures, generator, largest
from tests.gpu.ops import CALLS
from tests.gpu.problems import FINISHES, compare_maps, problem

OP = torch.ops.diffcam_fast.cam.default
BACKWARD = torch.ops.diffcam_fast.cam_backward.default

#: Smallest sizes that reach every way through the kernels: odd, aligned, one block and several for a map.
SHAPES = ((1, 2048, 7, 7), (3, 67, 7, 7), (2, 40, 14, 14), (1, 19, 57, 61), (2, 33, 50))
LAYOUTS = (
    ("contiguous", "contiguous"),
    ("channels-last", "channels-last"),
    ("strided", "tokens"),
    ("contiguous", "constant"),
)
DTYPES = (torch.float32, torch.bfloat16)


def sweep(failures: Failures) -> int:
    """Make the calls; how many."""
    calls = 0
    for method in METHODS:
        for index, shape in enumerate(SHAPES):
            for turn, (layout, gradient_layout) in enumerate(LAYOUTS):
                dtype = DTYPES[(index + turn) % len(DTYPES)]
                given = problem(shape, 1 + turn % 2, dtype, layout, gradient_layout)
                finish = FINISHES[(index + turn) % len(FINISHES)]
                compare_maps(failures, OP(given.activations, given.gradients, method, *finish), given, method, finish)
                calls += 1
        given = problem((2, 67, 7, 7), 2, torch.float32, "channels-last", "contiguous")
        grad_raw = torch.randn(2, 2, 7, 7, generator=generator(0))
        found = BACKWARD(grad_raw.to(DEVICE), given.activations, given.gradients, method, True, True)
        expected = reference_backward(grad_raw, given.plain_activations, given.plain_gradients, method, True, True)
        for got, want in zip(found, expected, strict=True):
            failures.at_most(largest(got.cpu() - want) / largest(want), 1e-4, f"backward of {method}")
        calls += 1
    for name, call in CALLS.items():
        if name.startswith(("logit_difference", "overlay", "saliency_contrast")):
            call.compare(failures, call(call.on()), call(call.inputs), name)
            calls += 1
    return calls


def main() -> int:
    """The command; 0 when every result was right."""
    backend = os.environ.get("DIFFCAM_BACKEND", "cuda" if DEVICE == "cuda" else "cpu")
    reason = absent_because(backend)
    if reason is not None:
        print(f"nothing to sweep: no {backend} backend: {reason}")
        return 2
    failures = Failures()
    with use_backend(backend), torch.no_grad():
        calls = sweep(failures)
    failures.report()
    print(f"swept {calls} calls")
    return 0


if __name__ == "__main__":
    sys.exit(main())
