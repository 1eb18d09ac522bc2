"""What tests need of the studies' data and networks. It is fetched once into the ignored cache folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from diffcam_fast.models.registry import FetchRefusedError

CACHE = Path(__file__).parents[2] / ".cache" / "studies"

Loaded = TypeVar("Loaded")


def fetched(load: Callable[[], Loaded]) -> Loaded:
    """What a function loads; skips the test where no registry serves it."""
    try:
        return load()
    except FetchRefusedError as error:
        pytest.skip(f"could not be fetched: {error}")
