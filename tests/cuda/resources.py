"""What ptxas says of each kernel: registers, stack frame, spills."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from typing import NamedTuple

_ENTRY = re.compile(r"Compiling entry function '(?P<name>\S+)' for 'sm_(?P<architecture>\w+)'")
_MEMORY = re.compile(
    r"(?P<frame>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill"
)
_REGISTERS = re.compile(r"Used (?P<registers>\d+) registers")


class Resources(NamedTuple):
    """Of one kernel on one architecture; bytes a thread."""

    kernel: str
    architecture: str
    registers: int
    stack_frame: int
    spill_stores: int
    spill_loads: int

    @property
    def uses_local_memory(self) -> bool:
        """Whether a thread has memory of its own beside its registers, which is as slow as global memory."""
        return bool(self.stack_frame or self.spill_stores or self.spill_loads)


def parse(log: str) -> list[Resources]:
    """The kernels in the output of nvcc -Xptxas -v, names demangled where c++filt is there.

    Raises:
        ValueError: an entry without its properties: the format is not the one known here.
    """
    found: list[Resources] = []
    parts = re.split(r"(?=Compiling entry function)", log)[1:]
    for part in parts:
        entry, memory, registers = _ENTRY.match(part), _MEMORY.search(part), _REGISTERS.search(part)
        if entry is None or memory is None or registers is None:
            raise ValueError(f"expected an entry of ptxas with its properties, got {part!r}")
        name, architecture = entry["name"], entry["architecture"]
        found.append(
            Resources(
                name,
                architecture,
                int(registers["registers"]),
                int(memory["frame"]),
                int(memory["stores"]),
                int(memory["loads"]),
            )
        )
    names = _readable([resources.kernel for resources in found])
    return [resources._replace(kernel=name) for resources, name in zip(found, names, strict=True)]


def _readable(names: list[str]) -> list[str]:
    filter_ = shutil.which("c++filt")
    if filter_ is None or not names:
        return names
    done = subprocess.run([filter_], input="\n".join(names), capture_output=True, text=True, check=True)
    # Without namespaces, the return type and the parameters.
    plain = [re.sub(r"\(anonymous namespace\)::|\bdiffcam::|^void ", "", line) for line in done.stdout.splitlines()]
    return [re.sub(r"\([^()]*\)$", "", line) for line in plain]


def table(kernels: Iterable[Resources]) -> str:
    """A line a kernel: registers on each architecture, marked where it uses local memory."""
    by_name: dict[str, dict[str, Resources]] = {}
    for resources in kernels:
        by_name.setdefault(resources.kernel, {})[resources.architecture] = resources
    architectures = sorted({a for row in by_name.values() for a in row}, key=int)
    lines = ["".join(f"{'sm_' + a:>8}" for a in architectures) + "  registers (stack frame, spill stores, spill loads)"]
    for name, row in sorted(by_name.items()):
        cells, marks = "", []
        for architecture in architectures:
            resources = row.get(architecture)
            cells += f"{resources.registers if resources else '-':>8}"
            if resources and resources.uses_local_memory:
                marks.append(f"sm_{architecture}: {resources[3:]}")
        lines.append(f"{cells}  {name}{'  SPILLS ' + ', '.join(marks) if marks else ''}")
    return "\n".join(lines)
