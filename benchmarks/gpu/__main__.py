"""Build, test, check and measure on a GPU, within nine minutes: `python -m benchmarks.gpu`, or `make gpu`.

It needs PyTorch and a CUDA compiler, and no package index. What a phase found is kept when a later one fails or runs
out of time. Exit status 0: the build, the tests and the sanitizer passed, and no measurement failed; limits that are
missed are shown, and do not make it fail.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import sanitizer
from benchmarks.gpu.phases import PYTHON, Command, Outcome, Phase, run

#: Seconds for everything; what is left to nine minutes is for the start and the writing of results.
SECONDS = 525.0

#: Names the commit where there is no Git, with "-dirty" after it where files differ from it.
COMMIT = "DIFFCAM_COMMIT"

ROWS = "rows.jsonl"


def plan(folder: Path, device: str, quick: bool) -> list[Phase]:
    """All phases, in the order of their worth.

    Args:
        folder: for what commands write.
        device: "cuda", or "cpu" for a smoke run.
        quick: smallest inputs.
    """
    build = Command(
        "build", [PYTHON, "setup.py", "-q", "build_ext", "--inplace"], {"DIFFCAM_NATIVE": "1", "DIFFCAM_CUDA": "1"}
    )
    checks = Phase((*tests(folder, device, quick), *sanitizers()), limit=150, least=40)
    if device == "cpu":
        return [
            checks,
            *(_measuring(name, folder, device, quick, 60) for name in ("cam", "one_image", "logit_difference")),
        ]
    # Compiling for every architecture takes minutes on few processors, and one on many.
    return [
        Phase((build,), limit=240, least=30),
        checks,
        _measuring("cam", folder, device, quick, 110, 15),
        _measuring("one_image", folder, device, quick, 25, 10),
        _measuring("logit_difference", folder, device, quick, 40, 10),
        _measuring("compile_one_image", folder, device, quick, 50, 15),
        _measuring("end_to_end", folder, device, quick, 100, 30),
        _measuring("overlay", folder, device, quick, 20, 8),
        _measuring("saliency_contrast", folder, device, quick, 15, 6),
        # As much as is left: it goes on for as long as it is let.
        _measuring("compile", folder, device, quick, 400, 20),
    ]


def tests(folder: Path, device: str, quick: bool) -> list[Command]:
    """What the device is, our own tests, and those of the explainer where pytest is."""
    found = [
        Command("device", [PYTHON, "-m", "benchmarks.gpu.device"]),
        Command(
            "tests",
            [
                *(PYTHON, "-m", "tests.gpu", "--device", device, "--report", str(folder / "tests.json")),
                *(["test_compile"] if quick else []),
            ],
            told_seconds=True,
        ),
    ]
    if importlib.util.find_spec("pytest") is not None and not quick:
        # The suite's own fixtures need Hypothesis, and these tests do not.
        options = ["-q", "--noconftest", "-p", "no:cacheprovider", "tests/explain/test_cuda.py"]
        found.append(Command("explainer tests", [PYTHON, "-m", "pytest", *options]))
    return found


def sanitizers() -> list[Command]:
    """compute-sanitizer's tools, where it is."""
    path = sanitizer.find()
    if path is None:
        return []
    return [Command(tool, sanitizer.command(path, tool, PYTHON), sanitizer.environment()) for tool in sanitizer.TOOLS]


def _measuring(name: str, folder: Path, device: str, quick: bool, limit: float, least: float = 5.0) -> Phase:
    arguments = [PYTHON, "-m", "benchmarks.gpu.measure", name, "--rows", str(folder / ROWS), "--device", device]
    return Phase((Command(name, [*arguments, *(["--quick"] if quick else [])], told_seconds=True),), limit, least)


def judge(outcomes: list[Outcome]) -> None:
    """Say of the sanitizer's tools what their logs say, and that they are absent where they are."""
    for tool in sanitizer.TOOLS:
        outcome = next((outcome for outcome in outcomes if outcome.name == tool), None)
        if outcome is None:
            outcomes.append(Outcome(tool, "not run", detail="compute-sanitizer is not installed"))
        elif outcome.state != "not run" and outcome.log is not None:
            status = None if outcome.state == "out of time" else outcome.status
            verdict = sanitizer.read(tool, status, outcome.log.read_text(errors="replace"))
            outcome.state, outcome.detail = verdict.state, verdict.detail


def require_backends(found: dict[str, Any], outcomes: list[Outcome]) -> None:
    """A GPU without our kernels on it is a failure, and not a reason to skip their tests."""
    backends = found.get("library", {}).get("backends", {})
    for name in ("cuda", "triton"):
        state = backends.get(name, {"available": False, "reason": "the library does not load"})
        if not state["available"]:
            outcomes.append(Outcome(f"{name} backend", "failed", detail=str(state["reason"])))


def read_json(path: Path | None) -> dict[str, Any]:
    """What a command wrote; empty where it was stopped before it did."""
    text = path.read_text(errors="replace") if path is not None and path.is_file() else ""
    start = text.find("{")
    if start < 0:
        return {}
    try:
        found: dict[str, Any] = json.loads(text[start:])
    except json.JSONDecodeError:
        return {}
    return found


def read_records(path: Path) -> list[dict[str, Any]]:
    """Rows that benchmarks wrote; a line that was cut off when one was stopped is left out."""
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def environment_of(command: str) -> dict[str, Any]:
    """Machine, versions and commit, from Git or as the caller says."""
    from benchmarks import environment

    found = environment.describe(command)
    given = os.environ.get(COMMIT)
    if found["commit"] is None and given:
        found |= {"commit": given.removesuffix("-dirty"), "clean": not given.endswith("-dirty")}
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything")
    parser.add_argument("--output", type=Path, help="where results go; default: benchmarks/results")
    parser.add_argument("--plan", action="store_true", help="say what would be run, and run nothing")
    parser.add_argument("--quick", action="store_true", help="smallest inputs; nothing written without --output")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: try this command itself")
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(given)
    if options.device == "cuda" and not options.plan and not torch.cuda.is_available():
        print(f"no CUDA device for torch {torch.__version__} in {PYTHON}; another Python: make gpu PYTHON=...")
        return 2
    load_average = round(os.getloadavg()[0], 2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        phases = plan(folder, options.device, options.quick)
        if options.plan:
            for phase in phases:
                for command in phase.commands:
                    print(f"at most {phase.limit:.0f} s, {command.name}: {' '.join(command.arguments)}")
            return 0
        outcomes = run(phases, options.seconds, folder, lambda text: print(text, flush=True))
        return finish(outcomes, folder, given, options, load_average)


def finish(
    outcomes: list[Outcome], folder: Path, given: list[str], options: argparse.Namespace, load_average: float
) -> int:
    """Write the results and say what matters, the worst last; the exit status."""
    # Only now: what they import was just built.
    from benchmarks import environment, report
    from benchmarks.gpu import results

    judge(outcomes)
    logs = {outcome.name: outcome.log for outcome in outcomes}
    found = read_json(logs.get("device"))
    if options.device == "cuda":
        require_backends(found, outcomes)
    tested = read_json(folder / "tests.json")
    for outcome in outcomes:
        if outcome.name == "tests" and tested:
            counts = (f"{tested[key]} {key.replace('_', ' ')}" for key in ("passed", "failed", "skipped", "not_run"))
            outcome.detail = ", ".join(counts)
    written = results.report(read_records(folder / ROWS), outcomes, found, {"tests": tested})
    origin = environment_of(" ".join(["python -m benchmarks.gpu", *given]))
    origin["machine"]["load_average_at_start"] = load_average
    target = options.output or (None if options.quick else environment.RESULTS)
    if target is not None:
        paths = [*report.write(written, origin, target), *keep_logs(outcomes, target / f"{written.name}-logs")]
        print(f"written: {', '.join(str(path) for path in paths)}")
    for table in written.tables:
        print("", table.title, *report.table_lines(table, written.bars), sep="\n")
    print("", *report.bar_lines(written), sep="\n")
    for outcome in outcomes:
        if outcome.bad:
            print("", f"{outcome.name}, the end of its output:", *outcome.last_lines(30), sep="\n")
    print("", *(outcome.line() for outcome in outcomes), sep="\n")
    failed = any(outcome.bad for outcome in outcomes) or any(
        "failed" in missing for missing in written.details["not_measured"]
    )
    print("failed" if failed else "passed")
    return 1 if failed else 0


def keep_logs(outcomes: Sequence[Outcome], folder: Path) -> list[Path]:
    """Copy the output of every command that did not pass to a folder, in place of an earlier run's."""
    if folder.is_dir():
        shutil.rmtree(folder)
    kept = []
    for outcome in outcomes:
        if outcome.bad and outcome.log is not None and outcome.log.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            kept.append(folder / outcome.log.name)
            shutil.copyfile(outcome.log, kept[-1])
    return kept


if __name__ == "__main__":
    sys.exit(main())
