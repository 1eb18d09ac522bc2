"""Models by name: the embedded default, torchvision's, timm's, or whatever a function of the user's returns."""

from __future__ import annotations

import difflib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffcam_fast.models.efficientnet_lite import LITE0_PREPROCESSING, load_efficientnet_lite0
from diffcam_fast.models.imagenet_classes import imagenet_labels
from diffcam_fast.models.preprocessing import INTERPOLATIONS, Preprocessing

SPECS = "'default', 'torchvision:NAME', 'timm:NAME' or 'MODULE:FUNCTION'"


@dataclass(frozen=True)
class LoadedModel:
    """A classifier and what one must know to feed it and to read its answers.

    Attributes:
        name: the specification that it was loaded by.
        model: the network: images (N, 3, H, W) to logits (N, K).
        preprocessing: what it expects of its images.
        labels: names of its classes by index, or None where they have none.
    """

    name: str
    model: nn.Module
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    labels: tuple[str, ...] | None = None


def load_model(spec: str = "default", weights: str | Path | None = None) -> LoadedModel:
    """Load a classifier, in eval mode, on the CPU.

    Args:
        spec: "default": the embedded EfficientNet-Lite0; "torchvision:resnet50", "timm:resnet50": a classifier of those
            packages; "module:function": called without arguments, the function returns an `nn.Module`, or a
            `LoadedModel` where it is not fed with ImageNet's normalisation at 224 x 224 or its classes have names.
        weights: a state dict (`torch.save(model.state_dict(), ...)`), for any spec but "default". Without it,
            torchvision's and timm's models come with their own pretrained weights, fetched if they were not yet, and a
            function's model is taken as it is.

    Returns:
        The model with its preprocessing and labels.

    Raises:
        ImportError: a package is not installed.
        ValueError: an unknown spec or model name, or weights that do not fit.
        TypeError: the function returned something else.
        RuntimeError: pretrained weights could not be fetched.
    """
    if spec == "default":
        if weights is not None:
            raise ValueError("weights: the default model has its own; name the model that these weights are for")
        return LoadedModel(spec, load_efficientnet_lite0(), LITE0_PREPROCESSING, imagenet_labels())
    source, separator, name = spec.partition(":")
    if not separator or not source or not name:
        raise ValueError(f"model: got {spec!r}, expected {SPECS}")
    state = _read_state_dict(Path(weights)) if weights is not None else None
    load = {"torchvision": _load_torchvision, "timm": _load_timm}.get(source)
    loaded = load(spec, name, state) if load else _load_function(spec, source, name, state)
    loaded.model.eval()
    return loaded


def _load_torchvision(spec: str, name: str, state: Mapping[str, Tensor] | None) -> LoadedModel:
    try:
        import torchvision
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        raise ImportError(f"model: {spec!r} needs torchvision: pip install torchvision ({error})") from error
    models = torchvision.models
    _check_name("torchvision", name, models.list_models(module=models))
    pretrained = models.get_model_weights(name).DEFAULT
    preset = pretrained.transforms()
    crop, resize = preset.crop_size[0], preset.resize_size[0]
    preprocessing = Preprocessing(
        size=(crop, crop),
        crop_fraction=min(crop / resize, 1.0),
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        interpolation=preset.interpolation.value,
    )
    if state is None:
        with _fetching(spec):
            # This fetches, and refuses a pickle that would run code; building the model then finds the file in place.
            pretrained.get_state_dict(progress=sys.stderr.isatty(), check_hash=True, weights_only=True)
            model = models.get_model(name, weights=pretrained, progress=False)
        return LoadedModel(spec, model, preprocessing, _labels_for(len(pretrained.meta["categories"])))
    count = _class_count(state)
    # These two rescale their input themselves wherever they were pretrained.
    options = {"transform_input": True, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = models.get_model(name, weights=None, num_classes=count, **options)
    _load_state(spec, model, state)
    return LoadedModel(spec, model, preprocessing, _labels_for(count))


def _load_timm(spec: str, name: str, state: Mapping[str, Tensor] | None) -> LoadedModel:
    try:
        import timm
        import timm.data
    except (ImportError, RuntimeError) as error:
        raise ImportError(f"model: {spec!r} needs timm: pip install timm ({error})") from error
    # A tag after the dot names one of several sets of weights for the same architecture.
    _check_name("timm", name.partition(".")[0], timm.list_models())
    if state is None:
        with _fetching(spec):
            model = timm.create_model(name, pretrained=True)
        count = int(model.num_classes)
    else:
        count = _class_count(state)
        model = timm.create_model(name, pretrained=False, num_classes=count)
        _load_state(spec, model, state)
    config = timm.data.resolve_model_data_config(model)
    if config["input_size"][0] != 3:
        raise ValueError(f"model: {spec!r} takes {config['input_size'][0]} channels, expected 3 (red, green, blue)")
    preprocessing = Preprocessing(
        size=tuple(config["input_size"][1:]),
        crop_fraction=config["crop_pct"],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"] if config["interpolation"] in INTERPOLATIONS else "bicubic",
    )
    return LoadedModel(spec, model, preprocessing, _labels_for(count))


def _load_function(spec: str, module: str, path: str, state: Mapping[str, Tensor] | None) -> LoadedModel:
    with _importing_from_here():
        try:
            found: Any = importlib.import_module(module)
            function: Callable[[], Any] = functools.reduce(getattr, path.split("."), found)
        except ModuleNotFoundError as error:
            if error.name is not None and not f"{module}.".startswith(f"{error.name}."):
                raise  # the module is there, and lacks something that it imports itself
            raise ValueError(f"model: got {spec!r}: no module {module!r}; expected {SPECS}") from error
        except AttributeError as error:
            raise ValueError(f"model: got {spec!r}: {error}") from error
        if not callable(function):
            raise TypeError(f"model: {spec!r} is of type {type(function).__name__}, expected a function")
        result = function()
    if isinstance(result, nn.Module):
        result = LoadedModel(spec, result)
    if not isinstance(result, LoadedModel):
        raise TypeError(
            f"model: {spec!r} returned {type(result).__name__}, expected nn.Module or diffcam_fast.models.LoadedModel"
        )
    if state is not None:
        _load_state(spec, result.model, state)
    return result


def _read_state_dict(path: Path) -> Mapping[str, Tensor]:
    """A state dict from a file, also where a training script wrapped it; never runs code that the file may hold."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"weights: cannot read {str(path)!r}: {error.strerror or error}") from error
    except Exception as error:  # a file that is not a checkpoint makes the unpickler stumble anywhere
        raise ValueError(f"weights: {str(path)!r} is not a state dict that can be loaded safely") from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"weights: {str(path)!r} holds {type(content).__name__}, expected a state dict")
    if not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"weights: {str(path)!r} holds more than tensors, expected a state dict")
    if all(key.startswith("module.") for key in content):  # saved from DataParallel
        content = {key.removeprefix("module."): value for key, value in content.items()}
    return content


def _class_count(state: Mapping[str, Tensor]) -> int:
    """How many classes a classifier's state dict is for: its last weight or bias belongs to the classifying layer."""
    for key in reversed(list(state)):
        if key.rpartition(".")[2] in ("weight", "bias") and state[key].ndim:
            return int(state[key].shape[0])
    raise ValueError("weights: no weight and no bias among the tensors, expected a classifier's state dict")


def _load_state(spec: str, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        first = " ".join(" ".join(str(error).split("\n")[1:3]).split())
        raise ValueError(f"weights: they do not fit {spec!r}: {first[:300]}") from error


def _labels_for(class_count: int) -> tuple[str, ...] | None:
    """Both packages order their thousand classes as ImageNet does; other counts are somebody's own classes."""
    return imagenet_labels() if class_count == len(imagenet_labels()) else None


def _check_name(package: str, name: str, names: list[str]) -> None:
    if name not in names:
        close = difflib.get_close_matches(name, names, n=3)
        hint = f"; close to it: {', '.join(close)}" if close else ""
        raise ValueError(f"model: {package} has no classifier {name!r}{hint}")


@contextmanager
def _fetching(spec: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # network, hub and file errors of whichever library fetches
        raise RuntimeError(
            f"model: the pretrained weights of {spec!r} could not be loaded ({type(error).__name__}: {error}); "
            "give a state dict with --weights (weights=...)"
        ) from error


@contextmanager
def _importing_from_here() -> Iterator[None]:
    """Let modules of the current folder be found, as `python -m` does; `sys.path` is put back."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)
