"""What `diffcam bench` measures on the machine that it runs on."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from diffcam_fast.benchmark import end_to_end, kernels, machine, report
from diffcam_fast.benchmark.explanations import images
from diffcam_fast.cli.explain import OptionError
from diffcam_fast.cli.settings import find_device
from diffcam_fast.explain import Explainer, tokens_to_positions
from diffcam_fast.models import load_model

#: Of running text on a terminal.
WIDTH = 100


@dataclass(frozen=True)
class BenchSettings:
    """What was asked for; the options of `diffcam bench` under their own names."""

    model: str = "default"
    weights: Path | None = None
    layer: str | None = None
    tokens: int | None = None
    batch_sizes: tuple[int, ...] = (1, 8)
    device: str = "auto"
    quick: bool = False
    output: Path | None = None


class Bench:
    """The measurements that settings ask for, checked but not yet made.

    Args:
        settings: what was asked for.
        command: as it was typed, for the record.

    Raises:
        OptionError: an option has no valid value, or the model cannot be had.
    """

    def __init__(self, settings: BenchSettings, command: str) -> None:
        self.settings = settings
        try:
            if any(size < 1 for size in settings.batch_sizes):
                raise ValueError(f"--batch-size: got {min(settings.batch_sizes)}, expected at least 1")
            self._device = find_device(settings.device)
            loaded = load_model(settings.model, settings.weights)
            self._reshape = None if settings.tokens is None else tokens_to_positions(settings.tokens)
            self._model = loaded.model.to(self._device)
            self._size = loaded.preprocessing.size
            # Found out before anything is measured, where it cannot work.
            trial = Explainer(self._model, settings.layer, reshape=self._reshape)(self._images(1))
            (self._layer,) = trial.layers
            if settings.output is not None:
                settings.output.mkdir(parents=True, exist_ok=True)
        except (ValueError, TypeError, ImportError, RuntimeError, OSError) as error:
            raise OptionError(str(error)) from error
        self.environment = machine.describe(command, self._device)

    def reports(self) -> Iterator[report.Report]:
        """Measure one after the other; the files of each are written as soon as it is there.

        Raises:
            OptionError: there is nothing to explain at the layer.
            WrongResult: a result is not what it has to be, so that its speed says nothing.
        """
        parts = tqdm([self._kernels, self._end_to_end], desc="measuring", disable=None, leave=False, file=sys.stderr)
        for measure in parts:
            found = measure()
            if self.settings.output is not None:
                report.write(found, self.environment, self.settings.output)
            yield found

    def _kernels(self) -> report.Report:
        return kernels.run(self._device, quick=self.settings.quick)

    def _end_to_end(self) -> report.Report:
        batches = [self._images(size) for size in self.settings.batch_sizes]
        try:
            return end_to_end.run(
                self._model, batches, self._layer, self._reshape, device=self._device, quick=self.settings.quick
            )
        except ValueError as error:
            raise OptionError(str(error)) from error

    def _images(self, count: int) -> Tensor:
        return images(count, self._size).to(self._device)


def as_text(found: report.Report) -> str:
    """A report for a terminal."""
    introduction = " ".join(found.introduction.replace("*", "").replace("`", "").split())
    lines = [found.title, "", *textwrap.wrap(introduction, WIDTH)]
    for table in found.tables:
        lines += ["", table.title, "", *(f"  {line}" for line in report.text_lines(table))]
    return "\n".join(lines)


def as_record(found: Sequence[report.Report], environment: dict[str, Any]) -> dict[str, Any]:
    """Reports for machines: by name, as in their JSON files."""
    return {one.name: json.loads(report.as_json(one, environment)) for one in found}
