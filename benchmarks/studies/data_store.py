"""Arrays that are made once and kept: what was read out of packages, and what was fitted."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffcam_fast.models.files import write_atomically

_MAX_BYTES = 2**30


def arrays(
    cache: Path, stem: str, recipe: Mapping[str, Any], make: Callable[[], Mapping[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The arrays of a recipe: as they were kept, or made and kept now.

    Beside `<stem>-<hash of the recipe>.npz` lies a file with its SHA-256. Where one of the two is missing, or they do
    not belong together, the arrays are made again.

    Args:
        cache: folder, created where it is missing.
        stem: what the arrays are, as the beginning of the files' names.
        recipe: all that decides what the arrays are, JSON-ready; another recipe is another pair of files.
        make: makes them; not called where they were kept.

    Returns:
        The arrays by name. None holds Python objects.
    """
    text = json.dumps(recipe, sort_keys=True)
    name = f"{stem}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    path, record = cache / f"{name}.npz", cache / f"{name}.sha256"
    content = _kept(path, record)
    if content is None:
        buffer = io.BytesIO()
        np.savez(buffer, **{key: _plain(key, array) for key, array in make().items()})
        content = buffer.getvalue()
        cache.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
        write_atomically(record, hashlib.sha256(content).hexdigest().encode())
    with np.load(io.BytesIO(content), allow_pickle=False) as kept:
        return {key: kept[key] for key in kept.files}


def _kept(path: Path, record: Path) -> bytes | None:
    if not path.is_file() or not record.is_file() or path.stat().st_size > _MAX_BYTES:
        return None
    content = path.read_bytes()
    return content if hashlib.sha256(content).hexdigest() == record.read_text("utf-8", "replace") else None


def _plain(key: str, array: np.ndarray) -> np.ndarray:
    array = np.asarray(array)
    if array.dtype.hasobject:
        raise TypeError(f"{key}: got an array of Python objects, expected numbers")
    return array
