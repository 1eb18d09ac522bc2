"""Regenerate benchmark results: `python -m benchmarks.run [NAME ...] [--quick] [--output FOLDER]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import environment, report
from benchmarks.speed import (
    bench_cam,
    bench_compat,
    bench_end_to_end,
    bench_fooling,
    bench_growth,
    bench_logit_difference,
    bench_memory,
    bench_memory_format,
    bench_overlay,
    bench_region_shift,
    bench_saliency_contrast,
    bench_same_bits,
)
from benchmarks.speed.measure import NotCompiled, WrongResult
from diffcam_fast.benchmark.machine import keep_freed_memory

BENCHMARKS: dict[str, Callable[[bool], report.Report]] = {
    "cam": bench_cam.run,
    "logit_difference": bench_logit_difference.run,
    "overlay": bench_overlay.run,
    "saliency_contrast": bench_saliency_contrast.run,
    "end_to_end": bench_end_to_end.run,
    "compat": bench_compat.run,
    "fooling": bench_fooling.run,
    "region_shift": bench_region_shift.run,
    "growth": bench_growth.run,
    "memory": bench_memory.run,
    "memory_format": bench_memory_format.run,
    "same_bits": bench_same_bits.run,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks that the arguments name, all without any; 0 when each has results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(BENCHMARKS)}; default: all")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke run: few rounds, little input, nothing written without --output"
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where results go; default: benchmarks/results")
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(given)
    unknown = [name for name in options.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"unknown benchmark {', '.join(unknown)}: expected {', '.join(BENCHMARKS)}")
    folder = options.output or (None if options.quick else environment.RESULTS)
    origin = environment.describe(" ".join(["python -m benchmarks.run", *given]))
    status = 0
    for name in options.names or BENCHMARKS:
        try:
            found = BENCHMARKS[name](options.quick)
        except (NotCompiled, WrongResult, ImportError) as error:
            print(f"{name}: no results: {error}", file=sys.stderr)
            status = 1
            continue
        print(f"\n{found.title}")
        print("\n".join(report.bar_lines(found)))
        if folder is not None:
            written = report.write(found, origin, folder)
            print(f"written: {', '.join(str(path) for path in written)}")
    return status


if __name__ == "__main__":
    # Not in `main`: it cannot be undone for who calls that.
    keep_freed_memory()
    sys.exit(main())
