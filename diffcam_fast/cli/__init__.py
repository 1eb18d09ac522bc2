"""The command `diffcam`. Needs `pip install 'diffcam_fast[cli]'`; this module itself needs nothing, to say so."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

_PACKAGES = {"typer": "typer", "tqdm": "tqdm", "PIL": "pillow", "matplotlib": "matplotlib"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: those after the program's name; None: the process's own.

    Returns:
        The exit code: 0 when everything was done, 1 when some photos could not be explained, 2 when what was asked for
        makes no sense or a package is missing.
    """
    missing = [name for module, name in _PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        print(f"diffcam: the command line needs {', '.join(missing)}: pip install 'diffcam_fast[cli]'", file=sys.stderr)
        return 2
    from diffcam_fast.cli.app import run

    return run(list(sys.argv[1:] if arguments is None else arguments))
