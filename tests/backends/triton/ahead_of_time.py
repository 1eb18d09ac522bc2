"""Compiles the Triton kernels for GPUs that are not here, and reports what each uses. Run in a process of its own.

The launches are those that the host code makes: it runs on tensors without memory, and what it would launch is
recorded, specialised as Triton would, and compiled for every target.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from diffcam_fast.backends.triton import cam, cam_backward, logit_difference, overlay, saliency_contrast

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.uint8: "u8",
}


class Launch(NamedTuple):
    kernel: str
    label: str
    aligned_input: bool
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[tuple[int, ...], Any], ...]
    aligned: tuple[int, ...]
    num_warps: int


class Recorder:
    """Takes the place of `JITFunction.run`."""

    def __init__(self) -> None:
        self.kernels: dict[str, JITFunction] = {}
        self.launches: dict[tuple[Any, ...], Launch] = {}
        self.label = ""
        self.aligned_input = False

    def run(self, kernel: JITFunction, *values: Any, grid: Any, warmup: bool, num_warps: int, **named: Any) -> None:
        arguments = dict(zip(kernel.arg_names, values, strict=False)) | named
        signature, constants, aligned = [], [], []
        for index, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
            value = arguments[name]
            kind = "constexpr"
            if isinstance(value, torch.Tensor):
                kind = f"*{TYPES[value.dtype]}"
                aligned.append(index)
            elif parameter.is_constexpr or value == 1:
                constants.append(((index,), value))
            else:
                kind = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0:
                    aligned.append(index)
            signature.append((name, kind))
        name = kernel.fn.__name__
        self.kernels[name] = kernel
        launch = Launch(
            name, self.label, self.aligned_input, tuple(signature), tuple(constants), tuple(aligned), num_warps
        )
        # The same launch made by several calls is compiled once.
        self.launches.setdefault(launch[:1] + launch[3:], launch)


RECORDER = Recorder()


def record() -> None:
    """Run the host code over the layouts, dtypes and options that compile into different kernels."""
    JITFunction.run = lambda kernel, *values, **named: RECORDER.run(kernel, *values, **named)  # type: ignore[method-assign]
    for label, aligned, call in calls():
        RECORDER.label, RECORDER.aligned_input = label, aligned
        call()


# Method, shape of activations, targets, dtype, layout: the formulas with the most registers, each kernel in few and
# many of everything. The first are aligned: their loads are of 16 bytes.
CAM_ALIGNED = (
    ("gradcam++", (512, 1024, 14, 14), 1, torch.bfloat16, "channels-last"),
    ("xgradcam", (2, 256, 56, 56), 1, torch.float32, "contiguous"),
    ("hirescam", (512, 1024, 14, 14), 1, torch.float32, "contiguous"),
)
CAM = (
    *CAM_ALIGNED,
    ("gradcam++", (512, 2048, 7, 7), 1, torch.float32, "contiguous"),
    ("gradcam++", (512, 1024, 14, 14), 4, torch.float16, "contiguous"),
    ("xgradcam", (2, 60, 8, 30, 30), 3, torch.float64, "strided"),
    ("layercam", (2, 64, 15, 15), 4, torch.float64, "channels-last"),
    ("gradcam++", (512, 1000, 7, 7), 2, torch.float32, "constant"),
)
CAM_BACKWARD = (
    ("gradcam++", (64, 1024, 14, 14), 1, torch.bfloat16, "channels-last"),
    ("gradcam++", (2, 100, 14, 14), 3, torch.float64, "channels-last"),
    ("xgradcam", (2, 60, 8, 30, 30), 3, torch.float32, "strided"),
    ("elementwise", (64, 1000, 7, 7), 2, torch.float32, "constant"),
)
# Classes, dtype, baseline, top_k.
LOGIT_DIFFERENCE_ALIGNED = (
    (1000, torch.float32, "logsumexp", 0),
    (262144, torch.float32, "expected", 15),
)
LOGIT_DIFFERENCE = (
    *LOGIT_DIFFERENCE_ALIGNED,
    (5000, torch.float64, "expected", 5),
    (1000, torch.bfloat16, "max", 1),
    (21841, torch.float16, "mean", 5000),
    (1000, torch.float64, "finer", 0),
)
# Size of the map, dtypes of maps and images, layout of the images, blend.
OVERLAY = (
    ((7, 7), torch.float32, torch.float32, "contiguous", "uniform"),
    ((7, 7), torch.float64, torch.float64, "channels-last", "uniform"),
    ((7, 7), torch.bfloat16, torch.uint8, "channels-last", "proportional"),
    ((224, 224), torch.float16, torch.float16, "strided", "proportional"),
)

# Shape, rivals, dtype, layout, whether each channel has an energy of its own.
SALIENCY_CONTRAST_ALIGNED = (((32, 3, 224, 224), 5, torch.float32, "contiguous", True),)
SALIENCY_CONTRAST = (
    *SALIENCY_CONTRAST_ALIGNED,
    ((32, 3, 224, 224), 5, torch.bfloat16, "contiguous", False),
    ((32, 3, 224, 224), 5, torch.float32, "channels-last", True),
    ((2, 3, 15, 15), 2, torch.float64, "strided", False),
    ((2, 60, 8, 30, 30), 3, torch.float64, "contiguous", True),
)


def calls() -> Iterator[tuple[str, bool, Any]]:
    """Calls of the host code, each with a name, and whether the inputs are aligned."""
    for op, cases in (("cam", CAM), ("cam_backward", CAM_BACKWARD)):
        for case in cases:
            method, shape, targets, dtype, layout = case
            a = laid_out(shape, dtype, layout)
            g = laid_out((shape[0] * targets, *shape[1:]), dtype, layout).unflatten(0, (shape[0], targets))
            g = g.flatten(3)[..., 0].contiguous() if layout == "constant" else g
            label = f"{op} {method} {'x'.join(map(str, shape))} T={targets} {TYPES[dtype]} {layout}"
            if op == "cam":
                yield label, case in CAM_ALIGNED, partial(cam.cam, a, g, method, True, "minmax", 1e-7)
            else:
                maps_dtype = torch.float64 if dtype == torch.float64 else torch.float32
                grad_raw = a.new_empty((shape[0], targets, *shape[2:]), dtype=maps_dtype)
                yield label, False, partial(cam_backward.cam_backward, grad_raw, a, g, method, True, True)
    for case in LOGIT_DIFFERENCE:
        count, dtype, baseline, top_k = case
        logits = torch.empty(256, count, dtype=dtype, device="meta")
        classes = torch.empty(256, 1, dtype=torch.int64, device="meta")
        ranks = [1, 2, 3] if baseline == "finer" else []
        label = f"logit_difference {baseline} K={count} top_k={top_k} {TYPES[dtype]}"
        call = partial(logit_difference.logit_difference, logits, classes, baseline, top_k, 1.0, 1.0, ranks)
        yield label, case in LOGIT_DIFFERENCE_ALIGNED, call
    for size, dtype, image_dtype, layout, blend in OVERLAY:
        maps = torch.empty(32, 5, *size, dtype=dtype, device="meta")
        images = laid_out((32, 3, 224, 224), image_dtype, layout)
        table = torch.empty(256, 3, device="meta")
        label = f"overlay {blend} {'x'.join(map(str, size))} {TYPES[dtype]} on {TYPES[image_dtype]} {layout}"
        yield label, False, partial(overlay.overlay, maps, images, table, 0.5, "minmax", blend, 1e-7)
    for case in SALIENCY_CONTRAST:
        shape, targets, dtype, layout, per_channel = case
        own = laid_out(shape, dtype, layout)
        others = laid_out((shape[0] * targets, *shape[1:]), dtype, layout).unflatten(0, (shape[0], targets))
        label = f"saliency_contrast {'x'.join(map(str, shape))} T={targets} {TYPES[dtype]} {layout} {per_channel}"
        call = partial(saliency_contrast.saliency_contrast, own, others, per_channel)
        yield label, case in SALIENCY_CONTRAST_ALIGNED, call


def laid_out(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> torch.Tensor:
    if layout == "channels-last":
        return torch.empty(shape[0], *shape[2:], shape[1], dtype=dtype, device="meta").movedim(-1, 1)
    if layout == "strided":
        return torch.empty([2 * size for size in shape], dtype=dtype, device="meta")[
            tuple(slice(None, None, 2) for _ in shape)
        ]
    return torch.empty(shape, dtype=dtype, device="meta")


#: What leaves a kernel fewer registers than it needs.
SQUEEZED = {"cuda": {"maxnreg": 32}, "hip": {"waves_per_eu": 8}}


def build(launch: Launch, target: str, squeezed: bool) -> dict[str, Any]:
    """Compile for one target. Spills: bytes of stack and local memory, or spilled registers, whichever is told."""
    source = ASTSource(
        fn=RECORDER.kernels[launch.kernel],
        signature=dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={(index,): [["tt.divisibility", 16]] for index in launch.aligned},
    )
    options = {"num_warps": launch.num_warps} | (SQUEEZED[TARGETS[target].backend] if squeezed else {})
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    result: dict[str, Any] = {"kernel": launch.kernel, "label": launch.label, "target": target}
    result["aligned"] = launch.aligned_input
    result["warps"], result["shared"] = launch.num_warps, compiled.metadata.shared
    if target.startswith("gfx"):
        code = compiled.asm["amdgcn"]
        result["registers"] = int(re.search(r"\.vgpr_count:\s*(\d+)", code)[1])
        # Scalar registers spill into vector registers, not into memory.
        result["spills"] = sum(map(int, re.findall(r"\.vgpr_spill_count:\s*(\d+)", code)))
        result["wide"] = len(re.findall(r"(?:global|buffer)_load_dwordx4", code))
        result["loads"] = len(re.findall(r"(?:global|buffer)_load_", code))
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = tool("cuobjdump", "-res-usage", file.name)
            code = tool("nvdisasm", "-c", file.name)
        result["registers"] = int(re.search(r"REG:(\d+)", usage)[1])
        result["spills"] = sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage)))
        result["wide"] = len(re.findall(r"LDG\.\S*128", code))
        result["loads"] = len(re.findall(r"LDG\.", code))
    return result


def tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def main() -> None:
    record()
    squeezed = "--squeezed" in sys.argv[1:]
    launches = list(RECORDER.launches.values())[: 1 if squeezed else None]
    jobs = [(launch, target, squeezed) for launch in launches for target in TARGETS]
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        json.dump(list(pool.map(build, *zip(*jobs, strict=True), chunksize=4)), sys.stdout)


if __name__ == "__main__":
    main()
