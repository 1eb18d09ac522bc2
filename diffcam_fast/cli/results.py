"""Where a photo's results go: one folder for each photo, replaced file by file, never outside the output folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffcam_fast.cli.text import safe_name
from diffcam_fast.models.files import write_atomically

RECORD = "explanation.json"
PANEL = "panel.png"
_MAX_RECORD_BYTES = 2**24


def overlay_filename(index: int, name: str) -> str:
    """File name of the overlay of a class."""
    return f"overlay-{index}-{safe_name(name.replace(' ', '_'), 'class')}.png"


class Results:
    """The output folder. A photo keeps its folder from run to run, and no other photo gets it.

    Args:
        output: created where it is missing.

    Raises:
        OSError: it cannot be created, or is not a folder.
    """

    def __init__(self, output: Path) -> None:
        output.mkdir(parents=True, exist_ok=True)
        self.output = output
        self._taken: dict[str, str] = {}

    def write(self, photo: Path, pictures: Mapping[str, bytes], record: dict[str, Any]) -> Path:
        """Write a photo's pictures and its record, each file complete or not at all, the record last.

        Overlays that an earlier run left for classes no longer asked for are removed.

        Args:
            photo: whose results these are.
            pictures: file name to PNG.
            record: what becomes the JSON file. Its "source" is set here: it tells whose folder this is.

        Returns:
            The photo's folder.

        Raises:
            OSError: the files cannot be written, or something else is in their place.
        """
        source = os.path.abspath(photo)
        folder = self._folder(photo, source)
        record["source"] = source
        folder.mkdir(exist_ok=True)
        for name, content in pictures.items():
            write_atomically(folder / name, content)
        write_atomically(folder / RECORD, (json.dumps(record, indent=2) + "\n").encode("ascii"))
        for old in folder.glob("overlay-*.png"):
            if old.name not in pictures:
                old.unlink()
        return folder

    def _folder(self, photo: Path, source: str) -> Path:
        """The photo's folder: called like the photo, or where that is another's, with a digest of the photo's path."""
        stem = safe_name(photo.stem, "photo")
        digest = hashlib.sha256(os.fsencode(source)).hexdigest()[:8]
        for name in (stem, f"{stem}-{digest}"):
            folder = self.output / name
            # Some file systems take names apart that others take for the same.
            owner = self._taken.get(name.casefold(), source)
            if owner == source and not folder.is_symlink() and _is_free(folder, source):
                self._taken[name.casefold()] = source
                return folder
        raise OSError(f"{folder} is not a folder of this photo's results; move it away")


def _is_free(folder: Path, source: str) -> bool:
    """Whether a folder is missing, holds this photo's results, or what an interrupted run left of some."""
    if not folder.exists():
        return True
    if not folder.is_dir():
        return False
    record = folder / RECORD
    if record.is_file() and record.stat().st_size <= _MAX_RECORD_BYTES:
        try:
            content = json.loads(record.read_bytes())
        except ValueError:
            return False
        return isinstance(content, dict) and content.get("source") == source
    ours = ("overlay-", PANEL, ".")
    return all(entry.name.startswith(ours) for entry in folder.iterdir())
