"""Maps of a network that is being trained: differentiable in its parameters, through activations and gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffcam_fast.explain import Finer, Logit, LogitDifference, LogProbability, Probability, Target
from diffcam_fast.explain.capture import Capture
from diffcam_fast.explain.checks import check_activations, check_logits
from diffcam_fast.explain.finishing import EPS
from diffcam_fast.explain.layers import run_eagerly
from diffcam_fast.explain.targets import TargetFunction
from diffcam_fast.ops.cam import cam
from diffcam_fast.ops.logit_difference import logit_difference
from diffcam_fast.reference.cam import accumulation_dtype


@dataclass(frozen=True)
class Recorded:
    """One forward pass, recorded from the parameters to the logits.

    Attributes:
        name: of the explained layer.
        activations: what it put out, ``(N, C, *S)``.
        logits: ``(N, K)``; float32, or float64 for a float64 model.
    """

    name: str
    activations: Tensor
    logits: Tensor

    def maps(
        self, target: Target | TargetFunction, classes: Tensor, method: str, normalize: str | None = "minmax"
    ) -> Tensor:
        """Maps as `diffcam_fast.Explainer` makes them at the layer's own size, with their way back to the parameters.

        The gradients are pulled back from the logits to the layer, no further, and recorded themselves.

        Args:
            target: as in `diffcam_fast.Explainer`.
            classes: ``(N, T)``, int64.
            method: see `diffcam_fast.cam`.
            normalize: see `diffcam_fast.cam`.

        Returns:
            ``(N, T, *S)``, after ReLU.

        Raises:
            TypeError: a target whose gradient cannot be differentiated once more.
            ValueError: the scores do not depend on the layer, or do not have the shape of the classes.
        """
        scores = differentiable_scores(target, self.logits, classes)
        gradients = []
        for score in scores.unbind(1):
            found = None
            if score.requires_grad:
                (found,) = torch.autograd.grad(score.sum(), self.activations, create_graph=True, allow_unused=True)
            if found is None:
                raise ValueError(
                    f"layer: the score of {target} does not depend differentiably on layer {self.name!r}: there is "
                    "no gradient to explain by"
                )
            gradients.append(found)
        return cam(self.activations, torch.stack(gradients, 1), method, normalize=normalize, eps=EPS)


def record(model: nn.Module, name: str, layer: nn.Module, images: Tensor) -> Recorded:
    """Run a model so that maps of a layer can be differentiated in the model's parameters.

    Args:
        model: images ``(N, C, *S)`` to logits ``(N, K)``, in the mode in which it should run.
        name: of the layer, for what is said in errors.
        layer: part of the model.
        images: as the model takes them.

    Raises:
        TypeError: the layer does not put out a floating point tensor.
        ValueError: it was not called once, or has no positions; or the model does not put out logits.
    """
    with Capture({name: layer}) as capture:
        output = run_eagerly(model, images)
    captured = capture.outputs()[name]
    logits = check_logits(output, images.shape[0])
    activations = check_activations(name, captured.output, reshaped=False)
    if activations.shape[0] != images.shape[0]:
        raise ValueError(
            f"layer: expected layer {name!r} to put out one entry per image, {images.shape[0]} in all; "
            f"got shape {tuple(activations.shape)}"
        )
    return Recorded(name, activations, logits.to(accumulation_dtype(logits.dtype)))


def differentiable_scores(target: Target | TargetFunction, logits: Tensor, classes: Tensor) -> Tensor:
    """Scores ``(N, T)`` of a target, twice differentiable in the logits; ``T`` times the rivals where pairwise.

    Args:
        target: as in `diffcam_fast.Explainer`; of the `Target` classes, those that come with the library.
        logits: ``(N, K)``.
        classes: ``(N, T)``, int64.

    Raises:
        TypeError: another `Target`, whose gradient in closed form need not be differentiable; or a function that does
            not return a tensor.
        ValueError: a function's scores have another shape than the classes.
    """
    if isinstance(target, Logit):
        return logits.gather(1, classes)
    if isinstance(target, Probability):
        return logits.softmax(1).gather(1, classes)
    if isinstance(target, LogProbability):
        return logits.log_softmax(1).gather(1, classes)
    if isinstance(target, Finer):
        return logit_difference(logits, classes, baseline="finer", alpha=target.alpha, ranks=target.ranks).delta
    if isinstance(target, LogitDifference):
        found = logit_difference(
            logits, classes, baseline=target.baseline, top_k=target.top_k, temperature=target.temperature
        )
        if not target.pairwise:
            return found.delta
        assert found.differences is not None
        return found.differences.flatten(1)
    if isinstance(target, Target):
        raise TypeError(
            "attacked: expected Logit, LogitDifference, Finer, Probability, LogProbability or a function "
            f"(logits, classes) -> scores; got {type(target).__name__}"
        )
    scores = target(logits, classes)
    if not isinstance(scores, Tensor):
        raise TypeError(f"attacked: expected the function to return a tensor; got {type(scores).__name__}")
    if scores.shape != classes.shape:
        raise ValueError(
            f"attacked: expected scores of shape (N, T) = {tuple(classes.shape)}, one per class; "
            f"got {tuple(scores.shape)}"
        )
    return scores
