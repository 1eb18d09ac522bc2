"""Adversarial images: FGSM, BIM and Carlini-Wagner L2 from Foolbox, without leaving the images' device."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from diffcam_fast.explain.capture import ordinary
from diffcam_fast.explain.checks import check_images, check_logits
from diffcam_fast.explain.evaluation import evaluating
from diffcam_fast.ops.arguments import check_integer, check_number, check_positive
from diffcam_fast.reference.cam import accumulation_dtype

Bounds = tuple[float, float]


class Adversarial(NamedTuple):
    """Attacked images, ready for an `Explainer`, and what the attack came to. Everything is on the images' device."""

    images: Tensor
    """(N, C, *S), the dtype of the images given. Where the Carlini-Wagner attack found nothing: the image given."""

    succeeded: Tensor
    """bool (N,): whether the model decides against the label, of a targeted attack for the target class."""

    predicted: Tensor
    """int64 (N,): the model's decisions on `images`."""

    l2: Tensor
    """(N,), float32 (float64 for float64 images): Euclidean norms of the perturbations."""

    linf: Tensor
    """(N,), as `l2`: largest absolute changes of a value."""


def fgsm(
    model: nn.Module,
    images: Tensor,
    labels: Any,
    strength: float,
    *,
    target_classes: Any = None,
    bounds: Bounds = (0.0, 1.0),
) -> Adversarial:
    """Fast gradient sign method: every value moves by `strength`, to where the cross-entropy grows.

    Goodfellow, Shlens and Szegedy, "Explaining and Harnessing Adversarial Examples", ICLR 2015.

    The model runs in evaluation mode; its flags, gradients and hooks are left as they were. The gradient is taken in
    float32 (float64 for float64 images) also for images in half precision; what comes back is rounded to their dtype,
    whose steps near 1 may be as large as the perturbation.

    Args:
        model: a classifier: images ``(N, C, *S)`` to logits ``(N, K)``. Preprocessing belongs into it, so that the
            bounds are those of its input.
        images: floating point, within the bounds, on the model's device. N may be 0.
        labels: the classes to move away from: ``(N,)`` integers, one integer for all, or None: the predicted classes.
        strength: largest change of a value, in the images' units; 0 gives the images back.
        target_classes: classes to move to, as `labels` but not None: the cross-entropy with them is made smaller.
        bounds: smallest and largest value of an image.

    Returns:
        The images with success flags and norms.

    Raises:
        TypeError: an argument is not of a type above.
        ValueError: images outside the bounds or not finite, a strength that is negative or not finite, classes of the
            wrong shape or out of range, a target class that is the label, a model that does not return logits.
        ImportError: Foolbox is missing.
    """
    check_number("strength", strength, least=0)

    def attack(attacks: Any) -> _Run:
        # The same as Foolbox's LinfFastGradientAttack, which refuses target classes.
        method = attacks.LinfBasicIterativeAttack(rel_stepsize=1.0, steps=1)
        return lambda fooled, inputs, goal: method.run(fooled, inputs, goal, epsilon=float(strength))

    return _attacked(model, images, labels, target_classes, bounds, None if strength == 0 else attack)


def bim(
    model: nn.Module,
    images: Tensor,
    labels: Any,
    strength: float,
    *,
    steps: int = 10,
    step_size: float | None = None,
    target_classes: Any = None,
    bounds: Bounds = (0.0, 1.0),
) -> Adversarial:
    """Basic iterative method: small steps of `fgsm`, each brought back to within `strength` of the image.

    Kurakin, Goodfellow and Bengio, "Adversarial examples in the physical world", ICLR workshop 2017. It starts from
    the image itself and draws nothing at random.

    Args:
        model: as in `fgsm`.
        images: as in `fgsm`.
        labels: as in `fgsm`.
        strength: as in `fgsm`.
        steps: at least 1.
        step_size: change of a value in one step, positive; None: ``2 * strength / steps``, for which the steps together
            reach twice as far as they may.
        target_classes: as in `fgsm`.
        bounds: as in `fgsm`.

    Returns:
        The images with success flags and norms.

    Raises:
        TypeError: as in `fgsm`, or steps that are no integer.
        ValueError: as in `fgsm`, or fewer than one step, or a step size that is not a positive number.
        ImportError: Foolbox is missing.
    """
    check_number("strength", strength, least=0)
    check_integer("steps", steps, least=1)
    if step_size is not None:
        check_positive("step_size", step_size)
    size = 2 * strength / steps if step_size is None else step_size

    def attack(attacks: Any) -> _Run:
        method = attacks.LinfBasicIterativeAttack(abs_stepsize=float(size), steps=int(steps))
        return lambda fooled, inputs, goal: method.run(fooled, inputs, goal, epsilon=float(strength))

    return _attacked(model, images, labels, target_classes, bounds, None if strength == 0 else attack)


def carlini_wagner(
    model: nn.Module,
    images: Tensor,
    labels: Any,
    *,
    confidence: float = 0.0,
    steps: int = 100,
    search_steps: int = 6,
    step_size: float = 0.01,
    initial_constant: float = 0.1,
    abort_early: bool = True,
    target_classes: Any = None,
    bounds: Bounds = (0.0, 1.0),
) -> Adversarial:
    """Carlini and Wagner's L2 attack: the smallest perturbation it can find that changes the decision.

    Carlini and Wagner, "Towards Evaluating the Robustness of Neural Networks", IEEE S&P 2017. Adam minimises
    ``|perturbation|^2 + c * loss`` over images kept within the bounds by a hyperbolic tangent; a binary search for each
    image looks for the smallest c that works. The defaults take the batch at most 600 times through the model and back;
    the paper takes 10,000 steps for each of 9 values of c.

    An image for which nothing was found comes back as it was given, where Foolbox returns zeros.

    Args:
        model: as in `fgsm`.
        images: as in `fgsm`.
        labels: as in `fgsm`.
        confidence: by how much the winning logit must lead; not negative.
        steps: of Adam for each c, at least 1.
        search_steps: how many values of c are tried, at least 1.
        step_size: of Adam, positive, in the space before the hyperbolic tangent.
        initial_constant: the first c, positive.
        abort_early: leave a c once the loss, summed over the batch, has stopped falling. What comes out for an image
            then depends on the others; False makes each independent of its batch.
        target_classes: as in `fgsm`.
        bounds: as in `fgsm`.

    Returns:
        The images with success flags and norms. The images stay on their device; one number an image and step, the
        search's bookkeeping, is read from it.

    Raises:
        TypeError: as in `fgsm`, or an argument above is not of its type.
        ValueError: as in `fgsm`, or an argument above is out of range.
        ImportError: Foolbox is missing.
    """
    check_number("confidence", confidence, least=0)
    check_integer("steps", steps, least=1)
    check_integer("search_steps", search_steps, least=1)
    check_positive("step_size", step_size)
    check_positive("initial_constant", initial_constant)
    if not isinstance(abort_early, bool):
        raise TypeError(f"abort_early: expected a bool; got {type(abort_early).__name__}")

    def attack(attacks: Any) -> _Run:
        method = attacks.L2CarliniWagnerAttack(
            binary_search_steps=int(search_steps),
            steps=int(steps),
            stepsize=float(step_size),
            confidence=float(confidence),
            initial_const=float(initial_constant),
            abort_early=abort_early,
        )

        def run(fooled: Any, inputs: Tensor, goal: Any) -> Tensor:
            # Foolbox leaves zeros where it found nothing, which a model may well misclassify, too.
            found, goal = _noting(goal)
            attacked: Tensor = method.run(fooled, inputs, goal)
            return torch.where(found().reshape(-1, *[1] * (inputs.dim() - 1)), attacked, inputs)

        return run

    return _attacked(model, images, labels, target_classes, bounds, attack)


def _foolbox() -> Any:
    try:
        return importlib.import_module("foolbox")
    except ImportError as error:
        raise ImportError("adversarial images need Foolbox: pip install 'diffcam_fast[robustness]'") from error


_Run = Callable[[Any, Tensor, Any], Tensor]
"""(Foolbox's model, images, Foolbox's criterion) -> attacked images."""


def _attacked(
    model: nn.Module,
    images: Tensor,
    labels: Any,
    target_classes: Any,
    bounds: Bounds,
    attack: Callable[[Any], _Run] | None,
) -> Adversarial:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
    check_images(images)
    low, high = _check_bounds(bounds)
    foolbox = _foolbox()
    with evaluating(model):
        images = ordinary(images)
        dtype = accumulation_dtype(images.dtype)
        if images.numel() > 0:
            smallest, largest = (float(value) for value in images.aminmax())
            if not low <= smallest <= largest <= high:  # nor for what is not a number
                raise ValueError(
                    f"images: expected values within the bounds {low} to {high}; got {smallest:.6g} to {largest:.6g}"
                )
        # Copies, because a model may normalise its input in place.
        logits = check_logits(model(images.clone()), len(images)).detach()
        away, toward = _goals(labels, target_classes, logits)
        result = images
        if attack is not None and images.numel() > 0:
            fooled = foolbox.PyTorchModel(_InImagesDtype(model, images.dtype), bounds=(low, high), device=images.device)
            goal = foolbox.Misclassification(away) if toward is None else foolbox.TargetedMisclassification(toward)
            with torch.enable_grad():
                result = attack(foolbox.attacks)(fooled, images.to(dtype), goal).detach().to(images.dtype)
            logits = model(result.clone()).detach()
        predicted = logits.argmax(1)
        change = (result.to(dtype) - images.to(dtype)).flatten(1)
        return Adversarial(
            result.clone() if result is images else result,
            predicted != away if toward is None else predicted == toward,
            predicted,
            change.norm(dim=1),
            change.abs().amax(1) if change.numel() > 0 else change.new_zeros(len(images)),
        )


class _InImagesDtype(nn.Module):
    """The model as Foolbox is shown it: in float32 at least, and with gradients for the images alone."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        # Not as a part of this module: Foolbox moves what it is given to a device.
        self._inside = (model,)
        self._dtype = dtype
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = _GradientOfImages.apply(images, self._inside[0], self._dtype)
        return logits


class _GradientOfImages(torch.autograd.Function):
    """Logits that hand a gradient on to the images and to no parameter, whoever calls `backward`."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, model: nn.Module, dtype: torch.dtype) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        with torch.set_grad_enabled(wanted):
            inside = images.detach().requires_grad_(wanted)
            logits: Tensor = model(inside.to(dtype, copy=True)).to(images.dtype)
        if wanted:
            if not logits.requires_grad:
                raise ValueError("model: expected logits that depend on the images differentiably; these do not")
            ctx.recorded = inside, logits
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        inside, logits = ctx.recorded
        return torch.autograd.grad(logits, inside, gradients[0])[0], None, None


def _noting(goal: Any) -> tuple[Callable[[], Tensor], Any]:
    """A criterion like the one given that notes for which images it was ever met; and a function that tells."""
    met: list[Tensor] = []

    class Noting(type(goal)):  # type: ignore[misc]
        def __call__(self, perturbed: Any, outputs: Any) -> Any:
            now = super().__call__(perturbed, outputs)
            met[:] = [now.raw | met[0]] if met else [now.raw]
            return now

    noting = Noting.__new__(Noting)
    noting.__dict__.update(goal.__dict__)
    return lambda: met[0], noting


def _goals(labels: Any, target_classes: Any, logits: Tensor) -> tuple[Tensor, Tensor | None]:
    """Labels, the predicted classes for None, and target classes: int64 (N,), on the logits' device."""
    away = logits.argmax(1) if labels is None else _class_indices("labels", labels, logits)
    if target_classes is None:
        return away, None
    toward = _class_indices("target_classes", target_classes, logits)
    if labels is not None and bool((away == toward).any()):
        raise ValueError("target_classes: expected classes other than the labels; got the same for some image")
    return away, toward


def _class_indices(name: str, classes: Any, logits: Tensor) -> Tensor:
    images, count = logits.shape
    given = classes if isinstance(classes, Tensor) else np.asarray(classes)
    if not isinstance(given, Tensor):
        if given.dtype.kind not in "iu" and given.size > 0:
            raise TypeError(f"{name}: expected integers; got {given.dtype}")
        given = torch.from_numpy(given.astype(np.int64))
    if given.dtype == torch.bool or given.is_floating_point() or given.is_complex():
        raise TypeError(f"{name}: expected integers; got {given.dtype}")
    if given.dim() > 1 or (given.dim() == 1 and len(given) != images):
        raise ValueError(f"{name}: expected an integer or shape ({images},); got shape {tuple(given.shape)}")
    if given.numel() > 0:
        low, high = (int(bound) for bound in given.aminmax())
        if low < 0 or high >= count:
            raise ValueError(f"{name}: expected indices from 0 to {count - 1} for {count} classes; got {low} to {high}")
    return given.to(logits.device, torch.int64).expand(images)


def _check_bounds(bounds: Any) -> Bounds:
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise TypeError(f"bounds: expected two numbers, smallest and largest; got {bounds!r}")
    for bound in bounds:
        check_number("bounds", bound)
    if not bounds[0] < bounds[1]:
        raise ValueError(f"bounds: expected the smallest value first; got {tuple(bounds)}")
    return float(bounds[0]), float(bounds[1])
