"""Fitting the studies' own networks: a linear layer on a fixed trunk, or a whole small network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.studies.data_store import arrays

_BATCH = 50


class Normalize(nn.Module):
    """Subtract a mean from red, green and blue, which run from 0 to 1, and divide by a standard deviation."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        """(N, 3, H, W) to the same shape."""
        return (input - self.mean) / self.std


def fit_probe(
    trunk: nn.Module,
    images: Tensor,
    labels: Tensor,
    class_count: int,
    decay: float = 1e-3,
    steps: int = 200,
    *,
    progress: bool = True,
) -> nn.Linear:
    """The linear layer that tells classes best from a trunk's features, by L-BFGS on the cross entropy.

    Args:
        trunk: images to features (N, C), in eval mode; it is not changed.
        images: float32 (N, 3, H, W), from 0 to 1.
        labels: int64 (N,).
        class_count: how many classes there are.
        decay: weight of the mean square of the layer's weights, for features of unit variance.
        steps: of the optimiser, at most.
        progress: show a progress bar on the standard error.

    Returns:
        The layer, in eval mode. Nothing in it is random.
    """
    with torch.no_grad():
        batches = _bar(images.split(_BATCH), "features", progress)
        features = torch.cat([trunk(batch) for batch in batches])
    mean, std = features.mean(0), features.std(0) + 1e-6
    features = (features - mean) / std
    head = nn.Linear(features.shape[1], class_count)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(head(features), labels) + decay * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        head.weight /= std
        head.bias -= head.weight @ mean
    return head.eval().requires_grad_(False)


def fit(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    batch: int = 50,
    rate: float = 3e-3,
    decay: float = 0.02,
    smoothing: float = 0.1,
    flip: bool = True,
    shift: int = 4,
    generator: torch.Generator,
    progress: bool = True,
) -> None:
    """Train a classifier by AdamW with one cycle of the learning rate, on images shifted and mirrored at random.

    Args:
        model: is trained, and left in eval mode.
        images: float32 (N, 3, H, W), from 0 to 1, on the model's device.
        labels: int64 (N,).
        epochs: how often each image is seen.
        batch: images at a time; what is left of an epoch after whole batches is not seen in it.
        rate: the highest learning rate.
        decay: weight decay.
        smoothing: of the labels, in the loss.
        flip: whether images are mirrored, half of the batches.
        shift: pixels by which a batch is moved at most, each way; what leaves on one side comes back on the other.
        generator: of all that is random here. The model's first weights are the caller's.
        progress: show a progress bar on the standard error.
    """
    count = len(images) // batch
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * count)
    model.train()
    for _ in _bar(range(epochs), "epochs", progress):
        for chosen in torch.randperm(len(images), generator=generator)[: count * batch].split(batch):
            seen = images[chosen.to(images.device)]
            rows, columns = torch.randint(-shift, shift + 1, (2,), generator=generator).tolist()
            seen = seen.roll((rows, columns), (2, 3))
            if flip and torch.rand((), generator=generator) < 0.5:
                seen = seen.flip(3)
            loss = F.cross_entropy(model(seen), labels[chosen.to(labels.device)], label_smoothing=smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


def fitted(cache: Path, stem: str, recipe: dict[str, Any], model: nn.Module, train: Callable[[], None]) -> nn.Module:
    """A model that was fitted before by the same recipe, or is fitted now and kept.

    Args:
        cache: folder that fitted weights are kept in.
        stem: what the model is, as the beginning of the files' names.
        recipe: all that decides what comes out, JSON-ready.
        model: takes the weights.
        train: trains this model in place.

    Returns:
        The model, in eval mode, without gradients at its parameters.
    """

    def make() -> dict[str, np.ndarray]:
        train()
        return {name: value.cpu().numpy() for name, value in model.state_dict().items()}

    found = arrays(cache, stem, recipe, make)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in found.items()}, strict=True)
    model.zero_grad(set_to_none=True)
    return model.eval()


def _bar(items: Any, what: str, progress: bool) -> Any:
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("the progress bar needs tqdm: pip install 'diffcam_fast[studies]'") from error
    return tqdm(items, desc=what, disable=None if progress else True, leave=False)
