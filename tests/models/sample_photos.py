"""The real photos that tests look at. They are fetched once into the ignored cache folder at the repository's root."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffcam_fast.models.registry import FetchRefusedError
from diffcam_fast.models.samples import fetch_samples

FOLDER = Path(__file__).parents[2] / ".cache" / "samples"


def sample(name: str) -> Path:
    """The path of a sample photo; skips the test where no index serves it."""
    path = FOLDER / name
    if not path.is_file():
        try:
            fetch_samples(FOLDER, progress=False)
        except FetchRefusedError as error:
            if not path.is_file():
                pytest.skip(f"{name} could not be fetched: {error}")
    return path


def imagenet_photos() -> list[tuple[Path, int]]:
    """The labelled ImageNet photos, each with its class."""
    sample("imagenet_00_243.jpg")
    photos = sorted(FOLDER.glob("imagenet_*_*.jpg"))
    return [(path, int(path.stem.rpartition("_")[2])) for path in photos]
