"""What a study is given and what it hands back, and the files that are made of it."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch

from diffcam_fast.benchmark.report import as_csv
from diffcam_fast.models.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

Item = TypeVar("Item")
Cell = str | int | float | bool | None

_STEM = re.compile(r"[a-z0-9]+(?:[_-][a-z0-9]+)*")
_DOTS_PER_INCH = 100
_COLOURS = 256


@dataclass(frozen=True)
class Settings:
    """How a study is to be run.

    Attributes:
        quick: a small size that shows that everything works; its figures mean little.
        seed: of everything that is drawn at random.
        device: where networks and images are.
        network: in place of the study's own networks, such as `torchvision:resnet50`; None for the study's own.
        cache: folder for fetched data and fitted networks.
        progress: show progress bars on the standard error.
    """

    quick: bool
    seed: int
    device: torch.device
    network: str | None
    cache: Path
    progress: bool = True

    def track(self, items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
        """The items again, with a progress bar."""
        try:
            from tqdm import tqdm
        except ImportError as error:
            raise ImportError("studies need tqdm: pip install 'diffcam_fast[studies]'") from error
        yield from tqdm(items, desc=what, total=total, leave=False, mininterval=0.5, disable=not self.progress)

    def generator(self, offset: int = 0) -> torch.Generator:
        """A random number generator of the CPU; the same seed and offset give the same numbers."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + offset)


@dataclass(frozen=True)
class Table:
    """Rows under a title. The columns are those of the rows, in the order in which they first come.

    Attributes:
        name: stem of the CSV file's name, after the study's.
        title: heading.
        rows: cells by column; units belong in the columns' names.
        note: what a reader has to know, in words.
        formats: how the numbers of a column are shown to people, such as ".3f"; files have them in full.
    """

    name: str
    title: str
    rows: list[dict[str, Cell]]
    note: str = ""
    formats: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Figure:
    """A picture, its stem, heading and caption."""

    name: str
    title: str
    caption: str
    figure: Drawing


@dataclass(frozen=True)
class Claim:
    """Something that a paper claims or that we ask for, and what came out.

    Attributes:
        says: the claim.
        holds: whether it held here; None where this run cannot tell.
        found: what came out, in words, with numbers.
    """

    says: str
    holds: bool | None
    found: str


@dataclass(frozen=True)
class Findings:
    """What a study hands back; `details` are JSON-ready: sizes, hyperparameters, counts."""

    tables: list[Table]
    figures: list[Figure]
    claims: list[Claim]
    details: dict[str, Any] = field(default_factory=dict)


class Study(Protocol):
    """A module of this package."""

    NAME: str
    TITLE: str
    QUESTION: str

    def run(self, settings: Settings) -> Findings:
        """Run it."""


def write(
    study: Study, findings: Findings, settings: Settings, origin: dict[str, Any], duration: float, folder: Path
) -> list[Path]:
    """Write a study's JSON, its tables as CSV and its figures as PNG, each complete or not at all.

    Args:
        study: which one.
        findings: what it handed back.
        settings: how it was run.
        origin: machine, versions, commit and command; see `benchmarks.environment.describe`.
        duration: seconds that the run took.
        folder: created where it is missing.

    Returns:
        The paths. The JSON file is written last: where it is, what it names is there too.

    Raises:
        ValueError: a table or figure is named twice, or its name is no stem of lower-case letters and digits.
    """
    stems = [part.name for part in (*findings.tables, *findings.figures)]
    for stem in stems:
        if not _STEM.fullmatch(stem):
            raise ValueError(f"name: got {stem!r}; expected lower-case letters and digits, with single - or _ between")
    for parts in (findings.tables, findings.figures):
        names = [part.name for part in parts]
        if len(set(names)) < len(names):
            raise ValueError(f"name: got {names}; expected each once")
    tables = {f"{study.NAME}-{table.name}.csv": as_csv(_finite(table.rows)).encode() for table in findings.tables}
    figures = {f"{study.NAME}-{figure.name}.png": _png(figure.figure) for figure in findings.figures}
    content = {
        "study": study.NAME,
        "title": study.TITLE,
        "question": study.QUESTION,
        "settings": {
            "size": "quick" if settings.quick else "full",
            "seed": settings.seed,
            "device": str(settings.device),
            "network": settings.network,
        },
        "duration_s": round(duration, 1),
        "environment": origin,
        "claims": [asdict(claim) for claim in findings.claims],
        "tables": [
            {"file": file, "title": table.title, "note": table.note, "formats": table.formats, "rows": table.rows}
            for file, table in zip(tables, findings.tables, strict=True)
        ],
        "figures": [
            {"file": file, "title": figure.title, "caption": figure.caption}
            for file, figure in zip(figures, findings.figures, strict=True)
        ],
        "details": findings.details,
    }
    text = json.dumps(_finite(content), indent=1, allow_nan=False) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    files = {**tables, **figures, f"{study.NAME}.json": text.encode()}
    for name, data in files.items():
        write_atomically(folder / name, data)
    return [folder / name for name in files]


def _png(figure: Drawing) -> bytes:
    from PIL import Image

    drawn, picture = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=_DOTS_PER_INCH, bbox_inches="tight")
    # As many colours as fit into a byte, dithered: half the size, and photos still look like photos.
    colours = Image.open(drawn).convert("RGB")
    palette = colours.quantize(_COLOURS - 1)
    reduced = np.array(colours.quantize(palette=palette))
    # Dithered white would look like dust.
    reduced[(np.asarray(colours) == 255).all(2)] = _COLOURS - 1
    indexed = Image.fromarray(reduced, "P")
    entries = [*(palette.getpalette() or []), *[0] * (3 * _COLOURS)]
    indexed.putpalette([*entries[: 3 * (_COLOURS - 1)], 255, 255, 255])
    indexed.save(picture, format="png", optimize=True)
    return picture.getvalue()


def _finite(value: Any) -> Any:
    """The same with None for numbers that JSON does not have: an interval of one value has no width."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
