"""What the GPU is and what is installed beside it: `python -m benchmarks.gpu.device` prints it as JSON."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib import metadata
from typing import Any

#: What nvidia-smi is asked, by the name that it goes by in the results.
QUESTIONS = {
    "driver": "driver_version",
    "sm_clock_mhz": "clocks.sm",
    "memory_clock_mhz": "clocks.mem",
    "most_sm_clock_mhz": "clocks.max.sm",
    "most_memory_clock_mhz": "clocks.max.mem",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
    "ecc": "ecc.mode.current",
}

#: Packages that a result depends on, or that are compared with.
PACKAGES = ("triton", "torchvision", "grad-cam", "torchcam", "captum")


def ask_driver() -> dict[str, str]:
    """What nvidia-smi says of the first GPU now; empty where it is not there or says nothing."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    command = [tool, "--id=0", f"--query-gpu={','.join(QUESTIONS.values())}", "--format=csv,noheader,nounits"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return parse_answers(found.stdout) if found.returncode == 0 else {}


def parse_answers(text: str) -> dict[str, str]:
    """The line that nvidia-smi prints, by name; what it does not know is left out."""
    lines = text.strip().splitlines()
    if not lines:
        return {}
    answers = (answer.strip() for answer in lines[0].split(","))
    known = zip(QUESTIONS, answers, strict=False)
    return {name: answer for name, answer in known if answer and not answer.startswith("[")}


def busy_clocks() -> dict[str, str]:
    """Clocks while the GPU has been copying for a while."""
    import torch

    source = torch.rand(1 << 28, device="cuda")
    target = torch.empty_like(source)
    for _ in range(1000):
        # Queued, half a second and more of it, while the driver is asked.
        target.copy_(source)
    found = ask_driver()
    torch.cuda.synchronize()
    return {name: value for name, value in found.items() if name.endswith("_clock_mhz") and not name.startswith("most")}


def describe() -> dict[str, Any]:
    """The first GPU, versions, and what the library says of itself."""
    import torch

    from diffcam_fast import info

    found: dict[str, Any] = {
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}
    }
    for package in PACKAGES:
        try:
            found["versions"][package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found["versions"][package] = None
    found["library"] = info.report()
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "count": torch.cuda.device_count(),
            "driver": ask_driver(),
            "busy": busy_clocks(),
        }
    return found


def file_stem(name: str | None) -> str:
    """A device's name as part of a file's: "NVIDIA H200" gives "gpu-nvidia-h200"."""
    return "gpu-" + (re.sub(r"[^a-z0-9]+", "-", (name or "none").lower()).strip("-") or "none")


def lines(found: dict[str, Any]) -> list[str]:
    """The device and versions for the head of a table, without the versions that are there already."""
    if "name" not in found:
        return ["- device: none; nothing was measured on a GPU"]
    driver, busy = found["driver"], found["busy"]
    clocks = ", ".join(
        f"{label} {busy.get(key, '?')} MHz while copying (at most {driver.get('most_' + key, '?')})"
        for label, key in (("multiprocessors", "sm_clock_mhz"), ("memory", "memory_clock_mhz"))
    )
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    return [
        f"- device: {found['name']}, capability {found['capability']}, {found['multiprocessors']} multiprocessors, "
        f"L2 {found['l2_bytes'] >> 20} MiB, {found['memory_bytes'] / 2**30:.0f} GiB",
        f"- driver {driver.get('driver', 'unknown')}; {clocks}; ECC {driver.get('ecc', 'unknown')}, "
        f"power limit {driver.get('power_limit_w', '?')} W, {driver.get('temperature_c', '?')} degrees C at the start",
        f"- {versions}",
    ]


if __name__ == "__main__":
    json.dump(describe(), sys.stdout, indent=1)
