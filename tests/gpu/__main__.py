"""Run the tests of this folder without pytest: `python -m tests.gpu [MODULE ...]`.

Every module and backend gets processes of its own, several at a time, so that a kernel that crashes, hangs or leaves
the device unusable costs one case and not the rest. Exit status 0: nothing failed, and every case was run or skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

#: A child's exit status after an error that leaves the device unusable for its process.
DEVICE_LOST = 3


@dataclass
class Unit:
    """The cases of one module for one backend, run by one process after another."""

    module: str
    backend: str | None
    file: Path
    names: list[str]
    results: list[dict[str, Any]] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None
    running: str | None = None
    heard: float = 0.0
    spoke: bool = False
    _read: int = 0

    @property
    def done(self) -> bool:
        """Whether every case has an outcome."""
        return len(self.results) >= len(self.names)

    def command(self) -> list[str]:
        """The process that runs the cases without an outcome."""
        command = [sys.executable, "-m", "tests.gpu", self.module, "--child", str(self.file)]
        command += ["--start", str(len(self.results))]
        return command + ([] if self.backend is None else ["--backend", self.backend])

    def start(self) -> None:
        """Start a process at the first case without an outcome."""
        self.running = None
        self.spoke = False
        self.heard = time.monotonic()
        with self.file.with_suffix(".log").open("ab") as log:
            self.process = subprocess.Popen(self.command(), cwd=ROOT, stdout=log, stderr=log, start_new_session=True)

    def listen(self) -> None:
        """Take in what the process wrote."""
        if not self.file.exists():
            return
        with self.file.open("rb") as file:
            file.seek(self._read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            self.heard = time.monotonic()
            self.spoke = True
            record = json.loads(line)
            if "started" in record:
                self.running = record["name"]
            else:
                self.running = None
                self.results.append(record)

    def blame(self, message: str) -> None:
        """Give the case that was running, or the next, a failure that it could not report itself."""
        if self.done:
            return
        name = self.running or self.names[len(self.results)]
        self.results.append({"name": name, "outcome": "failed", "message": message, "seconds": 0.0})

    def stop(self) -> None:
        """End the process and what it started."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                # One that a device holds goes when the device lets it; nobody waits for that.
                self.process.wait(timeout=5)

    def last_words(self) -> str:
        """The end of what the process printed."""
        lines = self.file.with_suffix(".log").read_text(errors="replace").strip().splitlines()
        return " / ".join(lines[-3:])


def advance(units: list[Unit], case_seconds: float) -> None:
    """Take in news, start the next process of a unit whose last one ended early, stop one that is stuck."""
    for unit in units:
        process = unit.process
        assert process is not None
        status = process.poll()
        unit.listen()
        if unit.done:
            continue
        if status is None:
            if time.monotonic() - unit.heard > case_seconds:
                unit.stop()
                unit.listen()
                unit.blame(f"no answer within {case_seconds:g} s")
                if not unit.done:
                    unit.start()
            continue
        # A case that reported that the device was lost has its outcome; any other end is told nowhere else.
        if status != DEVICE_LOST or unit.running is not None:
            unit.blame(f"the process ended with status {status}: {unit.last_words()}")
        if unit.spoke:
            if not unit.done:
                unit.start()
            continue
        # It did not get as far as its first case, and would not with the next.
        while not unit.done:
            unit.blame("not run, for the same reason as the case before")


def run(units: list[Unit], jobs: int, seconds: float, case_seconds: float) -> None:
    """Run units, `jobs` at a time, until all have ended or the time is over."""
    end = time.monotonic() + seconds
    waiting, running = list(units), list[Unit]()
    try:
        while (waiting or running) and time.monotonic() < end:
            while waiting and len(running) < jobs:
                running.append(waiting.pop(0))
                running[-1].start()
            advance(running, case_seconds)
            running = [unit for unit in running if not unit.done or _alive(unit)]
            time.sleep(0.05)
    finally:
        for unit in running:
            unit.stop()
            unit.listen()


def _alive(unit: Unit) -> bool:
    return unit.process is not None and unit.process.poll() is None


def summary(units: list[Unit]) -> dict[str, Any]:
    """Counts, and every case that failed or was not reached, JSON-ready."""
    results = [result for unit in units for result in unit.results]
    counts = Counter(result["outcome"] for result in results)
    return {
        "passed": counts["passed"],
        "failed": counts["failed"],
        "skipped": counts["skipped"],
        "not_run": sum(len(unit.names) - len(unit.results) for unit in units),
        "failures": [result for result in results if result["outcome"] == "failed"],
        "skips": dict(Counter(result["message"] for result in results if result["outcome"] == "skipped")),
        "left_out": [name for unit in units for name in unit.names[len(unit.results) :]],
        "slowest": [
            {"name": result["name"], "seconds": result["seconds"]}
            for result in sorted(results, key=lambda result: -result["seconds"])[:5]
        ],
    }


def show(found: dict[str, Any]) -> str:
    """A summary for a person."""
    lines = [f"FAILED {failure['name']}\n  {failure['message']}" for failure in found["failures"]]
    lines += [f"skipped {count}: {reason}" for reason, count in found["skips"].items()]
    if found["not_run"]:
        lines.append(f"not reached in the time given: {found['left_out'][0]} and the {found['not_run'] - 1} after it")
    lines.append(
        f"{found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped, {found['not_run']} not run"
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="such as test_cam; default: all")
    parser.add_argument("--backend", help="only cases of this backend")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="cpu: try the tests where there is no GPU")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), help="processes at a time")
    parser.add_argument("--seconds", type=float, default=600, help="for everything")
    parser.add_argument("--case-seconds", type=float, default=90, help="for one case, start of its process included")
    parser.add_argument("--report", type=Path, help="where the summary goes, as JSON")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.device:
        os.environ["DIFFCAM_TEST_DEVICE"] = options.device
    # Only now: the device is read when the tests are imported.
    import torch

    from tests.gpu import runner

    unknown = [name for name in options.modules if name not in runner.modules()]
    if unknown:
        parser.error(f"unknown module {', '.join(unknown)}: expected {', '.join(runner.modules())}")
    if options.child:
        # Of the references, which run on the CPU on small tensors, in as many processes as there are jobs.
        torch.set_num_threads(1)
        with options.child.open("a", encoding="utf-8") as output:
            lost = runner.run(list(runner.cases(options.modules[0], options.backend)), options.start, output)
            return DEVICE_LOST if lost else 0

    with tempfile.TemporaryDirectory() as folder:
        units = []
        for module in options.modules or runner.modules():
            for backend in runner.backends(module):
                if options.backend in (None, backend):
                    file = Path(folder) / f"{len(units)}.jsonl"
                    names = [case.name for case in runner.cases(module, backend)]
                    units.append(Unit(module, backend, file, names))
        # The longest first.
        units.sort(key=lambda unit: -len(unit.names))
        run(units, options.jobs, options.seconds, options.case_seconds)
        found = summary(units)
    if options.report:
        options.report.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(show(found))
    return 1 if found["failed"] or found["not_run"] else 0


if __name__ == "__main__":
    sys.exit(main())
