"""From options and photos to written results."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from diffcam_fast.cli.photo_explainer import PhotoExplainer, SeenPhoto
from diffcam_fast.cli.photos import Failure, find_photos
from diffcam_fast.cli.results import Results
from diffcam_fast.cli.settings import Settings
from diffcam_fast.cli.text import displayed
from diffcam_fast.models import PhotoError, read_photo


class OptionError(ValueError):
    """What was asked for cannot be done for any photo; the message says what and why."""


def explain_photos(
    arguments: Sequence[Path], settings: Settings, *, announce: bool
) -> tuple[list[dict[str, Any]], list[Failure]]:
    """Explain photos and write the results.

    Args:
        arguments: files and folders.
        settings: what was asked for.
        announce: print a line for each photo on the standard output.

    Returns:
        The records of the photos that were explained, as they were written to JSON but with the paths of their
        pictures from here on, and those that failed.

    Raises:
        OptionError: the settings cannot be followed for any photo.
    """
    try:
        explainer = PhotoExplainer(settings)
        results = Results(settings.output)
    except (ValueError, TypeError, ImportError, RuntimeError, OSError) as error:
        raise OptionError(str(error)) from error
    photos, failures = find_photos(arguments, settings.output)
    records = []
    # The bar shows on terminals only; its total is known, so that it can say how long it will take.
    with tqdm(total=len(photos), unit="photo", desc="explaining", disable=None, file=sys.stderr) as bar:
        for batch in _batches(photos, settings, explainer, failures, bar):
            for photo, answer in explainer.answers(batch, failures):
                record = explainer.record(photo, answer)
                try:
                    folder = results.write(photo.path, explainer.draw(photo, answer, record), record)
                except OSError as error:
                    failures.append(Failure(str(photo.path), f"results not written: {error}"))
                    continue
                records.append(_located(record, folder))
                if announce:
                    bar.write(_summary(records[-1]), file=sys.stdout)
            bar.update(len(batch))
    return records, failures


def _batches(
    photos: Sequence[Path],
    settings: Settings,
    explainer: PhotoExplainer,
    failures: list[Failure],
    bar: tqdm[Any],
) -> Iterator[list[SeenPhoto]]:
    """Photos that could be read, a batch at a time; the others become failures."""
    batch: list[SeenPhoto] = []
    for path in photos:
        try:
            batch.append(explainer.see(path, read_photo(path)))
        except PhotoError as error:
            failures.append(Failure(str(path), str(error)))
            bar.update()
        if len(batch) == settings.batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def _located(record: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The record with the pictures' paths from the current folder instead of from the record's own."""
    classes = [{**entry, "overlay": str(folder / entry["overlay"])} for entry in record["classes"]]
    return {**record, "classes": classes, "panel": str(folder / record["panel"])}


def _summary(record: dict[str, Any]) -> str:
    prediction, rival = record["prediction"], record["rivals"][0]
    return (
        f"{displayed(record['photo'])}: {prediction['name']} ({prediction['probability']:.1%}) rather than "
        f"{rival['name']} ({rival['probability']:.1%}): {displayed(record['panel'])}"
    )
