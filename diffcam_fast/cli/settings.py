"""What can be asked of `diffcam explain`, checked before anything is done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from diffcam_fast import viz
from diffcam_fast.explain import Finer, Logit, LogitDifference, LogProbability, Probability, Target
from diffcam_fast.models.preprocessing import FITS
from diffcam_fast.ops.colormaps import color_table

DTYPES = {name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "float16")}
_PLAIN_TARGETS = {
    "finer": Finer,
    "logit": Logit,
    "probability": Probability,
    "log-probability": LogProbability,
}
SCORE_NAMES = {
    "difference": "logit difference",
    "finer": "finer difference",
    "logit": "logit",
    "probability": "probability",
    "log-probability": "log probability",
}
COMPARED_WITH = {
    "difference": "all other classes",
    "finer": "the classes nearest to it",
    "logit": "(its logit alone)",
    "probability": "all other classes",
    "log-probability": "all other classes",
}


@dataclass(frozen=True)
class Settings:
    """What was asked for; the options of `diffcam explain` under their own names."""

    output: Path
    classes: tuple[str, ...] = ()
    top_k: int | None = None
    model: str = "default"
    weights: Path | None = None
    layers: tuple[str, ...] = ()
    tokens: int | None = None
    method: str = "gradcam"
    target: str = "difference"
    baseline: str | None = None
    temperature: float | None = None
    fit: str = "crop"
    batch_size: int = 8
    device: str = "auto"
    dtype: str = "float32"
    colormap: str = "jet"
    opacity: float = 0.5


def check(settings: Settings) -> None:
    """Check what nothing else would before a photo is read.

    Raises:
        ValueError: an option has no valid value; names it.
        ImportError: the colormap needs a package that is not installed.
    """
    if settings.batch_size < 1:
        raise ValueError(f"--batch-size: got {settings.batch_size}, expected at least 1")
    if settings.top_k is not None and not 1 <= settings.top_k < viz.MAX_PANEL_MAPS:
        raise ValueError(f"--top-k: got {settings.top_k}, expected 1 to {viz.MAX_PANEL_MAPS - 1} rivals")
    if settings.dtype not in DTYPES:
        raise ValueError(f"--dtype: got {settings.dtype!r}, expected one of {', '.join(DTYPES)}")
    if settings.fit not in FITS:
        raise ValueError(f"--fit: got {settings.fit!r}, expected one of {', '.join(FITS)}")
    if not 0.0 <= settings.opacity <= 1.0:
        raise ValueError(f"--opacity: got {settings.opacity}, expected a number from 0 to 1")
    color_table(settings.colormap)


def find_device(name: str) -> torch.device:
    """The device by its name; "auto" is a GPU where there is one.

    Raises:
        ValueError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA answers with an AssertionError
        raise ValueError(f"--device: {name!r} is not to be had here: {str(error).splitlines()[0]}") from error
    return device


def make_target(settings: Settings) -> Target:
    """What the overlays explain.

    Raises:
        ValueError: an unknown target, or a parameter that the target does not have.
    """
    if settings.target == "difference":
        temperature = 1.0 if settings.temperature is None else settings.temperature
        return LogitDifference(baseline=settings.baseline or "logsumexp", temperature=temperature)
    if settings.target not in _PLAIN_TARGETS:
        raise ValueError(f"--target: got {settings.target!r}, expected one of {', '.join(SCORE_NAMES)}")
    for option, value in (("--baseline", settings.baseline), ("--temperature", settings.temperature)):
        if value is not None:
            raise ValueError(f"{option}: only for --target difference, got --target {settings.target}")
    target: Target = _PLAIN_TARGETS[settings.target]()
    return target
