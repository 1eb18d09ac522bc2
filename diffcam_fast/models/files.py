"""Writing files that are either as they were or complete, never half written."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write a file under a temporary name beside its place, then rename it there.

    Where the place is a symbolic link, the link is replaced, not what it points to. The permissions are the process's
    defaults.

    Raises:
        OSError: the folder is missing or cannot be written; then nothing is left behind.
    """
    path = Path(path)
    temporary = path.with_name(f".{secrets.token_hex(8)}.partial")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
