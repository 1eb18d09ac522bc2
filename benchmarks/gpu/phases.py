"""Phases of a run, each a few commands with a limit to their time, within one limit for all of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

#: The name of the present interpreter in a command.
PYTHON = sys.executable

#: What a command that is given its time stops short of it, to end by itself.
MARGIN = 6.0


@dataclass(frozen=True)
class Command:
    """One process."""

    name: str
    arguments: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    told_seconds: bool = False
    """Whether `--seconds` is added, the time that it has."""


@dataclass(frozen=True)
class Phase:
    """Commands that run side by side."""

    commands: tuple[Command, ...]
    limit: float
    """The most seconds that it gets."""

    least: float = 5.0
    """With less it is not begun, and no earlier phase may take these."""


@dataclass
class Outcome:
    """How a command ended."""

    name: str
    state: str
    """"passed", "failed", "out of time" or "not run"."""

    seconds: float = 0.0
    detail: str = ""
    status: int | None = None
    log: Path | None = None

    @property
    def bad(self) -> bool:
        """Whether it makes the run a failure."""
        return self.state in ("failed", "out of time")

    def last_lines(self, count: int) -> list[str]:
        """The end of what it printed."""
        text = self.log.read_text(errors="replace") if self.log is not None and self.log.is_file() else ""
        return [line for line in text.splitlines() if line.strip()][-count:]

    def line(self) -> str:
        """For a person."""
        text = f"{self.name}: {'**' + self.state + '**' if self.bad else self.state}"
        text += f" in {self.seconds:.0f} s" if self.seconds else ""
        return text + (f": {self.detail}" if self.detail else "")

    def record(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "name": self.name,
            "state": self.state,
            "seconds": round(self.seconds, 1),
            "detail": self.detail,
            "status": self.status,
        }


def allowance(phases: Sequence[Phase], index: int, left: float) -> float:
    """Seconds for a phase: its limit, or what is left once every later phase can have its least; 0 for too few."""
    free = left - sum(phase.least for phase in phases[index + 1 :])
    if free < phases[index].least:
        # What comes now is worth more than what comes later.
        free = left
    allowed = min(phases[index].limit, free)
    return allowed if allowed >= phases[index].least else 0.0


def run(phases: Sequence[Phase], seconds: float, folder: Path, say: Callable[[str], None]) -> list[Outcome]:
    """Run phases one after another; outcomes of all their commands. Ends within the time, whatever the commands do.

    Args:
        phases: in the order of their worth.
        seconds: for all of them.
        folder: where each command's output goes, to NAME.log.
        say: is told what is going on.
    """
    end = time.monotonic() + seconds
    outcomes = []
    for index, phase in enumerate(phases):
        allowed = allowance(phases, index, end - time.monotonic())
        names = ", ".join(command.name for command in phase.commands)
        if not allowed:
            say(f"{names}: no time left")
            outcomes += [Outcome(command.name, "not run", detail="no time left") for command in phase.commands]
            continue
        say(f"{names}: at most {allowed:.0f} s")
        for outcome in _side_by_side(phase.commands, allowed, folder):
            say("  " + outcome.line())
            outcomes.append(outcome)
    return outcomes


def _side_by_side(commands: Sequence[Command], seconds: float, folder: Path) -> list[Outcome]:
    began = time.monotonic()
    outcomes = []
    running: list[tuple[subprocess.Popen[bytes], Outcome]] = []
    for command in commands:
        arguments = [*command.arguments]
        if command.told_seconds:
            arguments += ["--seconds", f"{max(seconds - MARGIN, 1):.1f}"]
        log = folder / f"{command.name.replace(' ', '_')}.log"
        outcome = Outcome(command.name, "failed", log=log)
        outcomes.append(outcome)
        with log.open("wb") as output:
            try:
                process = subprocess.Popen(
                    arguments,
                    cwd=ROOT,
                    env={**os.environ, **command.environment},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            except OSError as error:
                outcome.detail = str(error)
                continue
        running.append((process, outcome))
    try:
        while running:
            spent = time.monotonic() - began
            for process, outcome in list(running):
                status = process.poll()
                if status is None and spent < seconds:
                    continue
                outcome.seconds, outcome.status = spent, status
                if status is None:
                    outcome.state = "out of time"
                    _end(process)
                else:
                    outcome.state = "failed" if status else "passed"
                    outcome.detail = " ".join(outcome.last_lines(1))[:300] if status else ""
                running.remove((process, outcome))
            time.sleep(0.05)
    finally:
        for process, _ in running:
            _end(process)
    return outcomes


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started."""
    os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        # One that a device holds goes when the device lets it; nobody waits for that.
        process.wait(timeout=5)
