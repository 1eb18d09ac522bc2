"""Which photos the arguments stand for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffcam_fast.models.photos import SUFFIXES


@dataclass(frozen=True)
class Failure:
    """A photo, or a folder, that nothing could be made of, and why."""

    photo: str
    reason: str


def find_photos(arguments: Sequence[Path], output: Path) -> tuple[list[Path], list[Failure]]:
    """The photos that files and folders stand for, each once, in order.

    Folders are searched to any depth for files with a photo's ending. The results' own folder is left out, so that a
    second run does not explain the pictures of the first. Links to folders are not followed.

    Args:
        arguments: files and folders.
        output: the results' folder.

    Returns:
        The photos, and the folders that could not be searched or that hold none. That a file exists is not checked.
    """
    photos: dict[Path, Path] = {}  # by what the path stands for, so that a photo named twice is explained once
    failures: list[Failure] = []
    for argument in arguments:
        if not argument.is_dir():
            photos.setdefault(argument.resolve(), argument)
            continue
        found = _search(argument, output.resolve(), failures)
        if not found:
            failures.append(Failure(str(argument), f"no photo ({', '.join(SUFFIXES)}) in this folder"))
        for photo in found:
            photos.setdefault(photo.resolve(), photo)
    return list(photos.values()), failures


def _search(folder: Path, excluded: Path, failures: list[Failure]) -> list[Path]:
    def note(error: OSError) -> None:
        failures.append(Failure(str(error.filename), (error.strerror or str(error)).lower()))

    found = []
    for parent, folders, files in os.walk(folder, onerror=note):
        folders[:] = sorted(name for name in folders if Path(parent, name).resolve() != excluded)
        found += [Path(parent, name) for name in sorted(files) if Path(name).suffix.lower() in SUFFIXES]
    return found
