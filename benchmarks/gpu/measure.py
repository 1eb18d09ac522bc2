"""One benchmark in a process of its own: `python -m benchmarks.gpu.measure NAME --rows FILE`.

Every row is written the moment it is measured, so that what comes later cannot take it away.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.gpu.case import Case
from benchmarks.gpu.timing import Settings, synchronize

#: Name to module and function. A module is imported only by the process that runs it.
BENCHMARKS = {
    "cam": ("bench_cam", "cases"),
    "one_image": ("bench_one_image", "cases"),
    "logit_difference": ("bench_logit_difference", "cases"),
    "compile": ("bench_cam", "compile_cases"),
    "compile_one_image": ("bench_one_image", "compile_cases"),
    "end_to_end": ("bench_end_to_end", "cases"),
    "overlay": ("bench_overlay", "cases"),
    "saliency_contrast": ("bench_saliency_contrast", "cases"),
}


def cases(name: str, settings: Settings) -> list[Case]:
    """What a benchmark consists of."""
    module, function = BENCHMARKS[name]
    found: Callable[[Settings], list[Case]] = getattr(import_module(f"benchmarks.gpu.{module}"), function)
    return found(settings)


def run(name: str, chosen: Sequence[Case], settings: Settings, write: Callable[[dict[str, Any]], None]) -> int:
    """Measure cases one after another while there is time; how many failed.

    A case that fails is recorded with its reason, and the next one is measured, unless the device itself is lost.
    """
    failed = 0
    for index, case in enumerate(chosen):
        if settings.left < case.seconds:
            for late in chosen[index:]:
                write({"benchmark": name, "left_out": late.label, "reason": "no time left"})
            break
        try:
            write({"benchmark": name, **_finite(case.measure())})
        except Exception as error:  # whatever stops one case shall not stop the others
            failed += 1
            write({"benchmark": name, "failed": case.label, "reason": f"{type(error).__name__}: {str(error)[:500]}"})
            try:
                synchronize(settings)
            except RuntimeError as lost:
                for late in chosen[index + 1 :]:
                    write({"benchmark": name, "left_out": late.label, "reason": f"the device was lost: {lost}"})
                break
    return failed


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    wrong = [key for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
    if wrong:
        raise ValueError(f"{', '.join(wrong)}: not a finite number")
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0 when no case failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.measure", description=__doc__)
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("--rows", type=Path, required=True, help="where rows are added, one JSON object a line")
    parser.add_argument("--seconds", type=float, default=math.inf, help="nothing is begun that does not fit")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="smallest inputs, three rounds")
    options = parser.parse_args(arguments)
    settings = Settings(options.device, options.quick, time.monotonic() + options.seconds)
    with options.rows.open("a", encoding="utf-8") as file:

        def write(record: dict[str, Any]) -> None:
            file.write(json.dumps(record, allow_nan=False) + "\n")
            file.flush()

        return 1 if run(options.name, cases(options.name, settings), settings, write) else 0


if __name__ == "__main__":
    sys.exit(main())
