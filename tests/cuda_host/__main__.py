"""Runs the sweeps of ops: `python -m tests.cuda_host cam`.

Ends with 1 where a case fails. With --mutants, every barrier and wait of the kernels is left out in turn,
each in a process of its own, and what the sweep notices is printed as JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from .build import KERNELS, build_op, dependencies
from .cam_cases import cam_backward_cases, cam_cases
from .cases import Case
from .device import KernelError, load
from .logit_difference_cases import logit_difference_cases
from .overlay_cases import overlay_cases
from .saliency_contrast_cases import saliency_contrast_cases

SWEEPS = {
    "cam": cam_cases,
    "cam_backward": cam_backward_cases,
    "logit_difference": logit_difference_cases,
    "overlay": overlay_cases,
    "saliency_contrast": saliency_contrast_cases,
}

BARRIER = re.compile(r"\b(__syncthreads|__syncwarp|cluster_sync|copy_async_wait<[^>]*>)\(")


FUNCTION = re.compile(r"^\s*(?:.*\b__device__|__global__)\b.*?\b(?!__launch_bounds__)(\w+)\s*\((?!\()")


def barriers(op: str) -> dict[str, str]:
    """Every "file:line" of the op's kernels with a barrier or wait, and a name for it that outlives other edits.

    The name says the function, the call, and which of such calls in it. runtime.h is left out, which defines them.
    """
    found: dict[str, str] = {}
    for path in dependencies(KERNELS / f"{op}.cu"):
        if path.parent != KERNELS or path.name == "runtime.h":
            continue
        function, seen = "", 0
        for number, line in enumerate(path.read_text().splitlines(), 1):
            code = line.split("//")[0]
            if begins := FUNCTION.match(re.sub(r"__launch_bounds__\(.*?\)+ ", "", code)):
                function, seen = begins[1], 0
            if call := BARRIER.search(code):
                seen += 1
                found[f"{path.name}:{number}"] = f"{path.name} {function} {call[1]} #{seen}"
    return found


def sweep(library: ctypes.CDLL, cases: Sequence[Case], seeds: Sequence[int]) -> list[str]:
    """What goes wrong."""
    failures = []
    for case in cases:
        try:
            case.examine(library, seeds)
        except (AssertionError, KernelError) as error:
            failures.append(f"{case}: {error}")
    return failures


def notices(library: ctypes.CDLL, cases: Sequence[Case], site: str, limit_s: int) -> str:
    """How the sweep notices that a barrier is left out: "" when it does not."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        signal.alarm(limit_s)
        file, line = site.rsplit(":", 1)
        library.shim_leave_out(file.encode(), int(line))
        verdict = ""
        for case in cases:
            try:
                case.examine(library, (0, 1, 2))
            except (AssertionError, KernelError) as error:
                verdict = f"{type(error).__name__}: {error}"
                break
        os.write(writer, (verdict or "nothing").encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        verdict = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return f"signal {signal.Signals(os.WTERMSIG(status)).name}"
    return "" if verdict == "nothing" else verdict


def main() -> int:
    """Run from the repository's root."""
    parser = argparse.ArgumentParser(prog="python -m tests.cuda_host", description=__doc__)
    parser.add_argument("ops", nargs="+", choices=SWEEPS, metavar="op", help=", ".join(SWEEPS))
    parser.add_argument("--seeds", type=int, default=2, help="orders of threads to try")
    parser.add_argument("--every", type=int, default=1, help="take every so many cases only")
    parser.add_argument("--matching", default="", help="take only cases whose description contains this")
    parser.add_argument("--library", type=Path, help="made by build_op before, of the one op")
    parser.add_argument("--mutants", action="store_true")
    parser.add_argument("--kernels", type=Path, default=KERNELS, help="a folder with other kernels")
    parser.add_argument("--verbose", action="store_true")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    failed = 0
    for op in arguments.ops:
        library = load(arguments.library or build_op(op, kernels=arguments.kernels))
        cases = [case for case in SWEEPS[op]() if arguments.matching in str(case)][:: arguments.every]
        if arguments.mutants:
            cases = [case for case in cases if not case.is_large]
            verdicts = {f"{name} ({site})": notices(library, cases, site, 60) for site, name in barriers(op).items()}
            print(json.dumps(verdicts, indent=1))
            continue
        began = time.perf_counter()
        failures = []
        for case in cases:
            case_began = time.perf_counter()
            failures += sweep(library, [case], range(arguments.seeds))
            if arguments.verbose:
                print(f"{time.perf_counter() - case_began:.3f} s  {case}", flush=True)
        print("\n".join(failures))
        print(f"{op}: {len(cases)} cases, {len(failures)} failed, {time.perf_counter() - began:.1f} s")
        failed += len(failures)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
