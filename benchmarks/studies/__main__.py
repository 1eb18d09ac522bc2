"""Run studies and write one page to read them all: `python -m benchmarks.studies [NAME ...] [--quick]`."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import environment
from benchmarks.studies import STUDIES, report, study
from benchmarks.studies.networks import NetworkError
from diffcam_fast.models.registry import FetchRefusedError
from diffcam_fast.models.samples import HashMismatchError

RESULTS = environment.RESULTS / "studies"
QUICK_RESULTS = environment.ROOT / "studies"
CACHE = environment.ROOT / ".cache" / "studies"

REFUSED = 75
"""Exit code where nothing was wrong but that no registry served what a study needs (EX_TEMPFAIL of sysexits.h)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the studies that the arguments name, all without any.

    Returns:
        The exit code: 0 when each has results, `REFUSED` when all that is missing could not be fetched, else 1.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(STUDIES)}; default: all")
    parser.add_argument("--quick", action="store_true", help="a small size of less than three minutes a study")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn at random; default: 0")
    parser.add_argument("--network", help="in place of the study's own, such as torchvision:resnet50 (downloaded)")
    parser.add_argument("--device", default="cpu", help="such as cuda; default: cpu")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: benchmarks/results/studies, or studies")
    parser.add_argument("--cache", type=Path, default=CACHE, metavar="FOLDER", help="default: .cache/studies")
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parser.parse_args(given)
    unknown = [name for name in options.names if name not in STUDIES]
    if unknown:
        parser.error(f"unknown study {', '.join(unknown)}: expected {', '.join(STUDIES)}")
    try:
        device = torch.device(options.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device: {options.device} cannot be used: {error}")
    folder = options.output or (QUICK_RESULTS if options.quick else RESULTS)
    settings = study.Settings(options.quick, options.seed, device, options.network, options.cache)
    origin = environment.describe(" ".join(["python -m benchmarks.studies", *given]))
    status = 0
    for name in options.names or STUDIES:
        module = importlib.import_module(f"benchmarks.studies.{name}")
        print(f"\n{module.TITLE}", flush=True)
        started = time.monotonic()
        try:
            with torch.random.fork_rng():
                torch.manual_seed(options.seed)
                findings = module.run(settings)
        except (FetchRefusedError, HashMismatchError, NetworkError, ImportError) as error:
            print(f"{name}: no results: {error}", file=sys.stderr)
            status = REFUSED if isinstance(error, FetchRefusedError) and status in (0, REFUSED) else 1
            continue
        duration = time.monotonic() - started
        study.write(module, findings, settings, origin, duration, folder)
        for claim in findings.claims:
            print(f"- {report.VERDICTS[claim.holds]}: {claim.says} {claim.found}")
        print(f"{duration:.0f} s; written: {folder / name}*")
    page = report.write(folder)
    print(f"\nall of it on one page: {page}")
    return status


if __name__ == "__main__":
    sys.exit(main())
