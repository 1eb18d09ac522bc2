"""A model that answers for photos: what it sees in them, against which rivals, and where."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffcam_fast import viz
from diffcam_fast.cli.photos import Failure
from diffcam_fast.cli.results import PANEL, overlay_filename
from diffcam_fast.cli.settings import COMPARED_WITH, DTYPES, SCORE_NAMES, Settings, check, find_device, make_target
from diffcam_fast.cli.text import displayed, one_line
from diffcam_fast.explain import Explainer, LogitDifference, Target, tokens_to_positions
from diffcam_fast.models import class_name, find_class, load_model
from diffcam_fast.ops.overlay import overlay

if TYPE_CHECKING:
    from PIL.Image import Image

_DEFAULT_TOP_K = 3


@dataclass(frozen=True)
class SeenPhoto:
    """A photo as the model sees it."""

    path: Path
    size: tuple[int, int]
    box: tuple[float, float, float, float]
    pixels: Tensor


@dataclass(frozen=True)
class Answer:
    """What the model said of one photo, and why. Everything is on the CPU."""

    logits: Tensor
    """(K,), float64."""
    prediction: int
    rivals: list[int]
    differences: list[float]
    prediction_score: float
    panel_maps: Tensor
    """(1 + k, H, W): of the prediction, then of what tells it from each rival."""
    classes: list[int]
    scores: list[float]
    maps: Tensor
    """(T, H, W): of the classes of interest."""


class PhotoExplainer:
    """A model with everything that was asked of it.

    It is tried on an empty image first, so that an option that cannot work is found before any photo is read.
    """

    def __init__(self, settings: Settings) -> None:
        check(settings)
        self.settings = settings
        self.device = find_device(settings.device)
        loaded = load_model(settings.model, settings.weights)
        self.preprocessing = loaded.preprocessing
        self.labels = loaded.labels
        model = loaded.model.to(self.device, DTYPES[settings.dtype])
        reshape = None if settings.tokens is None else tokens_to_positions(settings.tokens)

        def explainer(layers: Sequence[str], target: Target) -> Explainer:
            return Explainer(model, list(layers) or None, method=settings.method, target=target, reshape=reshape)

        self._explain_classes = explainer(settings.layers, make_target(settings))
        height, width = self.preprocessing.size
        trial = self._explain_classes(self._input(torch.zeros(1, 3, height, width, dtype=torch.uint8)))
        self.layers = trial.layers
        class_count = trial.logits.cpu().shape[1]
        if self.labels is not None and len(self.labels) != class_count:
            raise ValueError(f"model: {len(self.labels)} labels for {class_count} classes, expected as many")
        top_k = min(_DEFAULT_TOP_K, class_count - 1) if settings.top_k is None else settings.top_k
        if top_k > class_count - 1:
            raise ValueError(f"--top-k: got {top_k}, but a prediction has {class_count - 1} rivals")
        found = (find_class(query, self.labels, class_count) for query in settings.classes)
        self.classes = list(dict.fromkeys(found))
        self._explain_rivals = explainer(self.layers, LogitDifference(top_k=top_k, pairwise=True))

    def see(self, path: Path, image: Image) -> SeenPhoto:
        """The part of a photo that the model sees, at the size at which it sees it."""
        fit = self.settings.fit
        box = self.preprocessing.box(*image.size, fit)
        return SeenPhoto(path, image.size, box, self.preprocessing.pixels(image, fit))

    def answers(self, batch: Sequence[SeenPhoto], failures: list[Failure]) -> Iterator[tuple[SeenPhoto, Answer]]:
        """Explain a batch; where that fails, one photo at a time, so that only those fail that must."""
        try:
            answers = self._answer(torch.stack([photo.pixels for photo in batch]))
        except (RuntimeError, ValueError) as error:
            if len(batch) == 1:
                failures.append(Failure(str(batch[0].path), one_line(error)))
                return
            for photo in batch:
                yield from self.answers([photo], failures)
            return
        for photo, answer in zip(batch, answers, strict=True):
            maps = torch.cat([answer.panel_maps, answer.maps])
            if not (answer.logits.isfinite().all() and maps.isfinite().all()):
                reason = f"the model's answer is not finite in {self.settings.dtype}"
                failures.append(Failure(str(photo.path), reason))
                continue
            yield photo, answer

    def _input(self, pixels: Tensor) -> Tensor:
        return self.preprocessing.normalize(pixels).to(self.device, DTYPES[self.settings.dtype])

    def _answer(self, pixels: Tensor) -> list[Answer]:
        images = self._input(pixels)
        rivals = self._explain_rivals(images)
        assert rivals.rivals is not None  # a pairwise target always names them
        wanted = torch.tensor(self.classes, device=self.device, dtype=torch.int64).expand(len(images), -1)
        # The prediction comes first, for the panel; without classes of its own it is what is drawn as well.
        chosen = self._explain_classes(images, torch.cat([rivals.classes, wanted], 1))
        first = 1 if self.classes else 0
        logits = rivals.logits.double().cpu()
        maps = chosen.maps.float().cpu()
        pairs = rivals.maps.float().cpu()
        return [
            Answer(
                logits=logits[row],
                prediction=int(rivals.classes[row, 0]),
                rivals=rivals.rivals[row, 0].tolist(),
                differences=rivals.delta[row].tolist(),
                prediction_score=float(chosen.delta[row, 0]),
                panel_maps=torch.cat([maps[row, :1], pairs[row]]),
                classes=chosen.classes[row, first:].tolist(),
                scores=chosen.delta[row, first:].tolist(),
                maps=maps[row, first:],
            )
            for row in range(len(images))
        ]

    def record(self, photo: SeenPhoto, answer: Answer) -> dict[str, Any]:
        """What is written to JSON, beside the pictures that it names."""
        probabilities = answer.logits.softmax(0)

        def described(index: int) -> dict[str, Any]:
            return {
                "index": index,
                "name": class_name(index, self.labels),
                "probability": float(probabilities[index]),
                "logit": float(answer.logits[index]),
            }

        left, top, right, bottom = photo.box
        return {
            "photo": str(photo.path),
            "seen": {
                "photo_size": list(photo.size),
                "fit": self.settings.fit,
                "box": [left, top, right, bottom],
                "input_size": [self.preprocessing.size[1], self.preprocessing.size[0]],
            },
            "settings": self._recorded_settings(),
            "prediction": {**described(answer.prediction), "score": answer.prediction_score},
            "rivals": [
                {**described(index), "difference": difference}
                for index, difference in zip(answer.rivals, answer.differences, strict=True)
            ],
            "classes": [
                {**described(index), "score": score, "overlay": overlay_filename(index, class_name(index, self.labels))}
                for index, score in zip(answer.classes, answer.scores, strict=True)
            ],
            "panel": PANEL,
        }

    def _recorded_settings(self) -> dict[str, Any]:
        settings = self.settings
        target = self._explain_classes.target
        contrast = target if isinstance(target, LogitDifference) else None
        return {
            "model": settings.model,
            "weights": None if settings.weights is None else str(settings.weights),
            "layers": list(self.layers),
            "tokens": settings.tokens,
            "method": settings.method,
            "target": settings.target,
            "baseline": contrast and contrast.baseline,
            "temperature": contrast and contrast.temperature,
            "device": str(self.device),
            "dtype": settings.dtype,
        }

    def draw(self, photo: SeenPhoto, answer: Answer, record: dict[str, Any]) -> dict[str, bytes]:
        """The photo's pictures as PNG, by file name."""
        settings = self.settings
        style: dict[str, Any] = {"colormap": settings.colormap, "opacity": settings.opacity}
        overlays = overlay(answer.maps[None], photo.pixels[None], normalize=None, **style)[0]
        pictures = {entry["overlay"]: _png(picture) for entry, picture in zip(record["classes"], overlays, strict=True)}
        shown = [record["prediction"], *record["rivals"]]
        width, height = photo.size
        part = "central crop" if settings.fit == "crop" else "all, stretched,"
        figure = viz.panel(
            photo.pixels,
            answer.panel_maps,
            [entry["name"] for entry in shown],
            [entry["probability"] for entry in shown],
            [answer.prediction_score, *answer.differences],
            title=displayed(photo.path.name),
            subtitle=f"{settings.model} model  \N{MIDDLE DOT}  {settings.method} at {', '.join(self.layers)}  "
            f"\N{MIDDLE DOT}  {part} of {width} \N{MULTIPLICATION SIGN} {height} pixels",
            overall=COMPARED_WITH[settings.target],
            score_name=SCORE_NAMES[settings.target],
            **style,
        )
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        pictures[PANEL] = buffer.getvalue()
        return pictures


def _png(picture: Tensor) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture.cpu().numpy()).save(buffer, "PNG")
    return buffer.getvalue()
