"""compute-sanitizer over the op calls of `tests/gpu/sweep.py`: where it is, how it is run, what its log says."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

TOOLS = ("memcheck", "racecheck")

#: The status that it ends with where it found something.
FOUND = 86

_SUMMARIES = {
    "memcheck": re.compile(r"ERROR SUMMARY: (\d+) errors?"),
    "racecheck": re.compile(r"RACECHECK SUMMARY: (\d+) hazards?"),
}

#: The sweep's last line: without it, a clean summary may be that of a program that did nothing.
_SWEPT = re.compile(r"^swept (\d+) calls$", re.MULTILINE)

_UNSUPPORTED = re.compile(r"device not supported|not supported on this|unable to (find|load|attach)", re.IGNORECASE)


@dataclass(frozen=True)
class Verdict:
    """What a run of a tool says."""

    state: str
    """"passed", "failed", or "not run": the tool could not work here."""

    detail: str


def find() -> str | None:
    """Its path: on PATH, else beside the CUDA compiler."""
    found = shutil.which("compute-sanitizer")
    if found is not None:
        return found
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    compiler = shutil.which("nvcc")
    if compiler is not None:
        roots.append(str(Path(compiler).resolve().parent.parent))
    for root in filter(None, roots):
        for place in ("bin/compute-sanitizer", "compute-sanitizer/compute-sanitizer"):
            if os.access(Path(root) / place, os.X_OK):
                return str(Path(root) / place)
    return None


def command(sanitizer: str, tool: str, python: str) -> list[str]:
    """The command line. Errors of API calls are what the framework asks about, and answers, by itself."""
    options = ["--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20"]
    options += ["--report-api-errors", "no"] if tool == "memcheck" else []
    return [sanitizer, *options, python, "-m", "tests.gpu.sweep"]


def environment() -> dict[str, str]:
    """Every tensor in an allocation of its own, so that what lies past its end is nobody's."""
    return {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def read(tool: str, status: int | None, log: str) -> Verdict:
    """What a run means.

    Args:
        tool: of `TOOLS`.
        status: the exit status; None where it ran out of time.
        log: all that was printed.
    """
    summary = _SUMMARIES[tool].search(log)
    swept = _SWEPT.search(log)
    found = int(summary[1]) if summary else 0
    calls = f"{swept[1]} calls" if swept else "the calls were not finished"
    if found or (status == FOUND and not _UNSUPPORTED.search(log)):
        return Verdict("failed", f"{found} findings, {calls}: {_first_finding(log)}")
    if status is None:
        return Verdict("not run", "out of time")
    if _UNSUPPORTED.search(log):
        return Verdict("not run", _last_line(log))
    if status == 0 and summary and swept:
        return Verdict("passed", f"0 findings, {calls}")
    return Verdict("failed", f"ended with status {status}, {calls}: {_last_line(log)}")


def _first_finding(log: str) -> str:
    """The first finding, in a line."""
    lines = [line.removeprefix("=========").strip() for line in log.splitlines() if line.startswith("=========")]
    for index, line in enumerate(lines):
        if line and not line.startswith(("COMPUTE-SANITIZER", "ERROR SUMMARY", "RACECHECK SUMMARY")):
            return "; ".join(part for part in lines[index : index + 3] if part)
    return "no finding was printed"


def _last_line(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "nothing was printed"
