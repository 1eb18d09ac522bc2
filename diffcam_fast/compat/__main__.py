"""``python -m diffcam_fast.compat pytorch_grad_cam script.py args...``: a script, unchanged, on our engine."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Sequence

from diffcam_fast.compat.aliases import installed
from diffcam_fast.compat.originals import REQUIREMENTS


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a script with a library's name standing for ours; arguments as on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m diffcam_fast.compat", description="Run a script written for another library on our engine."
    )
    parser.add_argument("package", choices=sorted(REQUIREMENTS), help="the library that the script imports")
    parser.add_argument("--strict", action="store_true", help="the original's results where they are known to be wrong")
    parser.add_argument("script", help="path of the script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the script")
    given = parser.parse_args(arguments)
    if not os.path.exists(given.script):
        parser.error(f"script: no such file: {given.script}")
    argv, path = sys.argv, list(sys.path)
    sys.argv = [given.script, *given.arguments]
    sys.path.insert(0, os.path.dirname(os.path.abspath(given.script)))
    try:
        with installed(given.package, strict=given.strict):
            runpy.run_path(given.script, run_name="__main__")
    finally:
        sys.argv, sys.path[:] = argv, path


if __name__ == "__main__":
    main()
