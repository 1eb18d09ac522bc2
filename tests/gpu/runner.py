"""Runs the tests of one module of this folder and writes what happens, line by line, as it happens."""

from __future__ import annotations

import importlib
import json
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO
from unittest import SkipTest

import torch

from tests.gpu.cases import DEVICE, case_name

FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Case:
    """One call of one test."""

    name: str
    test: Callable[..., None]
    arguments: dict[str, Any]


def modules() -> list[str]:
    """The stems of the test files."""
    return sorted(path.stem for path in FOLDER.glob("test_*.py"))


def cases(module: str, backend: str | None = None) -> Iterator[Case]:
    """The cases of a module: those of one backend, or those that name none."""
    tests = vars(importlib.import_module(f"tests.gpu.{module}"))
    for name, test in tests.items():
        if not name.startswith("test_") or not callable(test):
            continue
        for arguments in getattr(test, "cases", [{}]):
            if arguments.get("backend") == backend:
                yield Case(f"{module}::{name}" + (f"[{case_name(arguments)}]" if arguments else ""), test, arguments)


def backends(module: str) -> list[str | None]:
    """The backends that a module's cases name, and None where some name none."""
    tests = vars(importlib.import_module(f"tests.gpu.{module}"))
    found = [
        arguments.get("backend")
        for name, test in tests.items()
        if name.startswith("test_") and callable(test)
        for arguments in getattr(test, "cases", [{}])
    ]
    return list(dict.fromkeys(found))


def run(chosen: list[Case], start: int, output: TextIO) -> bool:
    """Run the cases from number `start` on; whether the device was lost.

    Each case writes a line with its number when it starts and another with its outcome, so that a reader knows which
    one took the process down. Ends after an error that leaves the device unusable, which later cases would only repeat.
    """
    for index, case in enumerate(chosen[start:], start):
        _write(output, {"started": index, "name": case.name})
        began = time.perf_counter()
        outcome, message = _outcome(case)
        lost = False
        if DEVICE == "cuda":
            try:
                # What a kernel did wrong may come to light only now.
                torch.cuda.synchronize()
            except RuntimeError as error:
                lost = True
                message = message if outcome == "failed" else f"the device reported: {error}"
                outcome = "failed"
        seconds = round(time.perf_counter() - began, 3)
        _write(output, {"index": index, "name": case.name, "outcome": outcome, "message": message, "seconds": seconds})
        if lost:
            return True
    return False


def _outcome(case: Case) -> tuple[str, str]:
    try:
        case.test(**case.arguments)
    except SkipTest as skip:
        return "skipped", str(skip)
    except Exception as error:  # whatever a test raises is its outcome
        frames = traceback.extract_tb(error.__traceback__)
        where = next(
            (f"{frame.name}, line {frame.lineno}" for frame in reversed(frames) if "gpu" in frame.filename), ""
        )
        return "failed", f"{type(error).__name__}: {str(error)[:2000]} ({where})"
    return "passed", ""


def _write(output: TextIO, record: dict[str, Any]) -> None:
    output.write(json.dumps(record) + "\n")
    output.flush()
