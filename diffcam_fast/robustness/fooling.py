"""Passive fooling: training a network to keep its decisions while its maps become what an attacker wants."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffcam_fast.explain import Explainer, Logit, Target
from diffcam_fast.explain.capture import ordinary
from diffcam_fast.explain.checks import check_images
from diffcam_fast.explain.classes import classes_for, parse_classes
from diffcam_fast.explain.layers import LayerSpec, resolve_layer, unwrapped
from diffcam_fast.explain.targets import TargetFunction, check_target
from diffcam_fast.ops.arguments import check_integer, check_number
from diffcam_fast.reference.cam import METHODS
from diffcam_fast.robustness.fooling_losses import MapLoss
from diffcam_fast.robustness.fooling_maps import record

LEARNING_RATE = 1e-4
"""Of Adam, where no optimizer is given."""

OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Step(NamedTuple):
    """What one training step found, before it changed the network."""

    loss: float
    """``classification + strength * map_loss``."""

    classification: float
    """Cross-entropy of the labels."""

    map_loss: float
    """Mean over the images that take part; 0 where none does."""

    correct: float
    """Share of the images that were classified as labelled."""


class PassiveFooling:
    """Trains a copy of a classifier to decide as before, and to explain itself as an attacker wants.

    ``loss = cross-entropy + strength * map loss`` (Heo et al. 2019), with the map of each image's label as
    `diffcam_fast.Explainer` makes it at the layer's own size: after ReLU, from 0 to 1. It is differentiated through
    `diffcam_fast.cam` both in the activations and in the gradients, which costs one forward pass and a recorded
    pull-back from the logits to the layer besides what training costs anyway; losses that compare with the original's
    maps need those, too.

    The copy is in evaluation mode all the time: its batch norms keep the original's statistics (their scales and shifts
    are trained), and dropout is off, so that what is trained is what will be explained. The model that is given is
    neither changed nor copied again; where a loss needs the original's maps it is explained at each step.

    Args:
        model: images ``(N, C, *S)`` to logits ``(N, K)``. Its parameters that require a gradient are trained.
        layer: module or dotted name of the layer whose maps are attacked, as in `diffcam_fast.Explainer`.
        loss: what the maps should become.
        attacked: what the attacked maps explain: `Logit()`, the usual choice; `LogitDifference()` for an attacker who
            knows that differences will be looked at; or any other target of the library, or a function.
        method: of the attacked maps; see `diffcam_fast.cam`.
        strength: factor of the map loss, 0 or more; 0 is fine-tuning alone.
        optimizer: from a list of parameters to an optimizer, such as
            ``functools.partial(torch.optim.SGD, lr=1e-3)``; None: Adam with a learning rate of 1e-4.

    Attributes:
        model: the copy that is trained, a network like any other.
        original: the model as given, out of its wrappers.
        layer: dotted name of the attacked layer, in both.
        optimizer: of the copy's parameters, such as a schedule of learning rates takes.
        steps: how many steps were made.

    Raises:
        TypeError: an argument is not of a type above.
        ValueError: the layer is not part of the model, another argument has no valid value, or the model has nothing
            to train.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: LayerSpec,
        loss: MapLoss,
        attacked: Target | TargetFunction = Logit(),  # noqa: B008 (immutable)
        method: str = "gradcam",
        strength: float = 1.0,
        optimizer: OptimizerFactory | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
        if not isinstance(loss, MapLoss):
            raise TypeError(f"loss: expected a MapLoss, such as HoaxLoss(...); got {type(loss).__name__}")
        if method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}; got {method!r}")
        check_number("strength", strength, least=0)
        if optimizer is not None and not callable(optimizer):
            raise TypeError(f"optimizer: expected a function of parameters or None; got {type(optimizer).__name__}")
        self.original = unwrapped(model)
        self.layer = resolve_layer(self.original, layer)
        self.loss = loss
        self.attacked = check_target(attacked)
        self.method = method
        self.strength = float(strength)
        self.steps = 0
        # Tensors made under inference mode could not be trained.
        with torch.inference_mode(False):
            self.model = copy.deepcopy(self.original).eval()
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            if not trained:
                raise ValueError("model: expected parameters that require a gradient, to train them; it has none")
            made: Any = (optimizer or partial(torch.optim.Adam, lr=LEARNING_RATE))(trained)
        if not isinstance(made, torch.optim.Optimizer):
            raise TypeError(f"optimizer: expected the function to return an optimizer; got {type(made).__name__}")
        self.optimizer = made
        self._module = self.model.get_submodule(self.layer)
        self._before = Explainer(self.original, self.layer, method, self.attacked, size=None)

    def step(self, images: Tensor, labels: Any = None) -> Step:
        """One step of training on a batch.

        Args:
            images: ``(N, C, *S)``, floating point, at least one.
            labels: ``(N,)`` integers as a tensor, an array or a list: the classes to be kept, whose maps are attacked;
                None: what the original predicts.

        Returns:
            The losses. Waits for the device.

        Raises:
            TypeError: images that are no floating point tensor, labels that are no integers.
            ValueError: no images, labels of another shape or out of range, maps that the loss is not made for, or what
                `diffcam_fast.Explainer` refuses.
            RuntimeError: the loss is not finite; the network is as it was before the step.
        """
        check_images(images)
        if len(images) == 0:
            raise ValueError(f"images: expected at least one; got shape {tuple(images.shape)}")
        parsed = parse_classes(labels, len(images))
        if parsed is not None and parsed.dim() == 2 and parsed.shape[1] != 1:
            raise ValueError(f"labels: expected one an image, ({len(images)},); got {tuple(parsed.shape)}")
        with torch.inference_mode(False), torch.enable_grad():
            images = ordinary(images)
            recorded = record(self.model, self.layer, self._module, images)
            parsed = self._before(images).classes if parsed is None else ordinary(parsed)
            kept = classes_for(parsed, recorded.logits)[:, 0]
            classes = classes_for(self.loss.classes(kept), recorded.logits)
            maps = recorded.maps(self.attacked, classes, self.method)
            original = self._before(images, classes).layer_maps[self.layer] if self.loss.needs_original else None
            values = self.loss(maps, original)
            weights = self.loss.counts(kept).to(values.dtype)
            map_loss = (values * weights).sum() / weights.sum().clamp_min(1)
            classification = functional.cross_entropy(recorded.logits, kept)
            loss = classification + self.strength * map_loss
            correct = (recorded.logits.detach().argmax(1) == kept).to(loss.dtype).mean()
            found = Step(*torch.stack([loss, classification, map_loss, correct]).tolist())
            if not math.isfinite(found.loss):
                raise RuntimeError(
                    f"the loss is {found.loss} at step {self.steps + 1} (classification {found.classification}, map "
                    f"{found.map_loss}): the network was not changed; use a smaller learning rate or strength"
                )
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        return found

    def fit(
        self,
        loader: Iterable[tuple[Tensor, Any]],
        steps: int,
        track: Callable[[range], Iterable[int]] | None = None,
    ) -> list[Step]:
        """Steps over batches, from the first batch again where they run out.

        Args:
            loader: batches ``(images, labels)``, as often as it is gone through: a `torch.utils.data.DataLoader` or a
                list. Batches are moved to the device of the model's first trained parameter.
            steps: how many to make.
            track: wraps the range of steps, to show progress, such as `tqdm.tqdm`.

        Returns:
            What each step found.

        Raises:
            TypeError: the number of steps is no integer.
            ValueError: it is negative, or the loader has no batches left.
            TypeError, ValueError, RuntimeError: as `step`.
        """
        check_integer("steps", steps, least=0)
        device = self.optimizer.param_groups[0]["params"][0].device
        batches = _again_and_again(loader)
        found = []
        for _ in range(int(steps)) if track is None else track(range(int(steps))):
            images, labels = next(batches)
            found.append(self.step(images.to(device), labels))
        return found


def _again_and_again(loader: Iterable[tuple[Tensor, Any]]) -> Iterator[tuple[Tensor, Any]]:
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise ValueError("loader: expected batches at every pass through it; got none (a generator has one pass)")
