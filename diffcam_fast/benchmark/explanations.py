"""Explained inference beside plain inference: what is explained, our explanation of it, and the floor."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import diffcam_fast
from diffcam_fast.benchmark.measure import Candidate
from diffcam_fast.explain import Explainer, Explanation
from diffcam_fast.explain.memory_format import FasterFormat

#: What maps of one network by two libraries may differ by, as a share of range.
TOLERANCE = 1e-4
#: The same for logits, as a share of the largest: other memory formats, other orders of summation.
LOGITS_TOLERANCE = 1e-4

EPS = 1e-7


@dataclass(frozen=True)
class Work:
    """What is to be explained: Grad-CAM of logits, on float32."""

    model: nn.Module
    """In evaluation mode."""

    images: Tensor
    """(N, C, H, W)."""

    classes: Tensor
    """(N, T)."""

    layers: tuple[str, ...]
    """Names of modules of the model."""

    reshape: Callable[[Tensor], Tensor] | None = None
    """From the layers' output to (N, C, H, W), where it is something else."""

    at_input_size: bool = True
    """Maps (N, T, H, W), resized to that of the images and normalised; else one for each layer, at its own size."""

    @property
    def size(self) -> tuple[int, ...] | None:
        """Of the maps; None for the layers' own."""
        return tuple(self.images.shape[2:]) if self.at_input_size else None

    def modules(self, model: nn.Module) -> list[nn.Module]:
        """The layers of the model, or of a twin of it."""
        return [model.get_submodule(name) for name in self.layers]


Maps = Sequence[Tensor]
"""(N, T, H, W), one for each layer, or a single one at the size of the images."""


def images(count: int, size: tuple[int, int]) -> Tensor:
    """Seeded images (count, 3, height, width) with structure at every scale, normalised as networks expect it."""
    generator = torch.Generator().manual_seed(0)
    found = torch.zeros(count, 3, *size)
    cells = 4
    while cells <= max(size):
        noise = torch.randn(count, 3, cells, cells, generator=generator)
        found += functional.interpolate(noise, size, mode="bilinear", align_corners=False)
        cells *= 2
    return found / found.std((1, 2, 3), keepdim=True)


def twin(model: nn.Module, *, frozen: bool = False) -> nn.Module:
    """A model of its own on the same memory: hooks, flags and gradients of the one do not reach the other.

    Args:
        model: a model.
        frozen: whether the twin's parameters take no gradients.
    """
    memo: dict[int, Any] = {id(value): nn.Parameter(value.detach(), not frozen) for value in model.parameters()}
    memo |= {id(buffer): buffer.detach() for buffer in model.buffers()}
    return copy.deepcopy(model, memo)


def classes_with_evidence(
    model: nn.Module,
    images: Tensor,
    layer: str,
    reshape: Callable[[Tensor], Tensor] | None = None,
    count: int = 1,
) -> Tensor:
    """Classes (N, count) whose maps are not empty, of those with the largest logits.

    An empty map would agree with anything.

    Args:
        model: the classifier.
        images: (N, C, H, W).
        layer: whose maps.
        reshape: of the layer's output.
        count: classes an image.

    Raises:
        ValueError: an image does not have so many.
    """
    with torch.inference_mode():
        logits: Tensor = model(images)
    likely = logits.topk(min(4 * count + 6, logits.shape[1])).indices
    explainer = Explainer(model, layer, target=diffcam_fast.Logit(), size=None, reshape=reshape)
    (maps,) = explainer(images, likely.clone()).layer_maps.values()
    evident = maps.flatten(2).amax(2) > 0.5
    if (evident.sum(1) < count).any():
        raise ValueError(
            f"layer {layer!r} has no evidence for {count} of an image's likeliest classes: nothing to check"
        )
    # A stable order: those with evidence first, likelier before less likely.
    return likely.gather(1, evident.int().argsort(stable=True, dim=1, descending=True)[:, :count]).clone()


def explaining(work: Work, *, compiled: bool = False) -> Callable[[int], tuple[Explanation, Maps]]:
    """A function that explains by `Explainer`, and returns the maps beside the explanation.

    Args:
        work: what it explains.
        compiled: whether by `Explainer.compile`, for images of this shape. The first call compiles.
    """
    explainer = Explainer(
        work.model,
        list(work.layers),
        target=diffcam_fast.Logit(),
        size="input" if work.at_input_size else None,
        reshape=work.reshape,
    )
    explain = explainer.compile(dynamic=False) if compiled else explainer

    def run(copy: int) -> tuple[Explanation, Maps]:
        explanation = explain(work.images, work.classes)
        return explanation, [explanation.maps] if work.at_input_size else list(explanation.layer_maps.values())

    return run


def ours(work: Work, *, compiled: bool = False) -> Candidate:
    """The explainer, checked against Grad-CAM written out in plain PyTorch; see `explaining`."""
    # In the order in memory that the explainer hands the images on in: what a network rounds otherwise in another one
    # is not the explanation's.
    order = None if compiled else FasterFormat(work.model)(work.images)
    given = work.images if order is None else work.images.contiguous(memory_format=order)
    expected = Plain(replace(work, images=given)).run(0)
    return Candidate(explaining(work, compiled=compiled), lambda found: error_of_maps(found[1], expected), TOLERANCE)


def inference(work: Work, *, compiled: bool = False, channels_last: bool = False) -> Candidate:
    """The model alone; its logits have to be those of the explanation.

    Args:
        work: whose model, and on which images.
        compiled: whether by `torch.compile`.
        channels_last: whether the images are in that order in memory; no copy of them is in the time.
    """
    logits = explaining(work)(0)[0].logits
    images = work.images.contiguous(memory_format=torch.channels_last) if channels_last else work.images
    model: Any = torch.compile(work.model, fullgraph=True, dynamic=False) if compiled else work.model

    def run(copy: int) -> Tensor:
        with torch.inference_mode():
            found: Tensor = model(images)
            return found

    def error(found: Tensor) -> float:
        return ((found - logits).abs().amax() / logits.abs().amax()).item()

    return Candidate(run, error, LOGITS_TOLERANCE)


def error_of_maps(found: Maps, expected: Maps) -> float:
    """The largest difference, as a share of the maps' range; infinite for other shapes.

    Raises:
        ValueError: an image has nothing but empty maps, and too much would pass for right.
    """
    if [maps.shape for maps in found] != [maps.shape for maps in expected]:
        return float("inf")
    if not torch.stack([right.amax((1, 2, 3)) for right in expected]).amax(0).gt(0.5).all():
        raise ValueError("an image has no map that is not empty: choose classes with evidence for them")
    # Maps span 0 to 1.
    differences = [(mine.to(right.device) - right).abs().amax() for mine, right in zip(found, expected, strict=True)]
    return torch.stack(differences).amax().item()


def normalized(maps: Tensor) -> Tensor:
    """Maps (..., H, W) from 0 to 1."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return (maps - low) / (high - low + EPS)


def resized(maps: Tensor, size: tuple[int, ...] | None) -> Tensor:
    """Maps (N, T, H, W) at another size, from 0 to 1."""
    # Before resizing too, as the explainer and pytorch-grad-cam have it: beside some raw maps EPS is not small.
    finished = normalized(maps)
    if size is None:
        return finished
    return normalized(functional.interpolate(finished, size, mode="bilinear", align_corners=False))


class Plain:
    """Grad-CAM as it is written by hand in plain PyTorch: hooks, one differentiation a class, a weighted sum.

    Args:
        work: what is explained, by a twin of the model.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._model = twin(work.model)
        self._kept: list[Tensor] = []
        for module in work.modules(self._model):
            module.register_forward_hook(lambda module, inputs, output: self._kept.append(output))

    def run(self, copy: int) -> Maps:
        """Maps of all classes."""
        work = self._work
        self._kept.clear()
        with torch.enable_grad():
            logits = self._model(work.images)
        count = work.classes.shape[1]
        maps: list[list[Tensor]] = [[] for _ in work.layers]
        for index in range(count):
            score = logits.gather(1, work.classes[:, index : index + 1]).sum()
            gradients = torch.autograd.grad(score, self._kept, retain_graph=index + 1 < count)
            for layer, (output, gradient) in enumerate(zip(self._kept, gradients, strict=True)):
                activations = output.detach()
                if work.reshape is not None:
                    activations, gradient = work.reshape(activations), work.reshape(gradient)
                weights = gradient.mean((2, 3), keepdim=True)
                maps[layer].append((weights * activations).sum(1).relu())
        self._kept.clear()
        return together([torch.stack(of_layer, 1) for of_layer in maps], work)


def together(layer_maps: Maps, work: Work) -> Maps:
    """Maps as the work asks for them, of several layers at the size of the images their mean.

    Args:
        layer_maps: (N, T, h, w) of each layer, after ReLU.
        work: what asks.
    """
    finished = [resized(maps, work.size) for maps in layer_maps]
    if not work.at_input_size or len(finished) == 1:
        return finished
    return [normalized(torch.stack(finished).mean(0))]


def bare_pull_back(work: Work) -> Candidate:
    """The gradient of the classes' logits with respect to the layer's output, of a graph that is there already.

    Added to plain inference this is the floor of an explanation: nothing is recorded, and no map is made.
    """
    model = twin(work.model, frozen=True)
    with _leaves(work.modules(model)) as leaves, torch.no_grad():
        logits = model(work.images)
    scores = [logits.gather(1, classes[:, None]).sum() for classes in work.classes.unbind(1)]

    def run(copy: int) -> list[tuple[Tensor, ...]]:
        return [torch.autograd.grad(score, leaves, retain_graph=True) for score in scores]

    return _unchecked(run)


def bare_input_gradient(work: Work) -> Candidate:
    """Forward pass and gradient of the classes' logits with respect to the images; parameters take none."""
    model = twin(work.model, frozen=True)
    images = work.images.clone().requires_grad_()

    def run(copy: int) -> tuple[Tensor, ...]:
        return torch.autograd.grad(model(images).gather(1, work.classes).sum(), images)

    return _unchecked(run)


def bare_product(work: Work, head: nn.Linear) -> Candidate:
    """The classifying layer's weight times the activations: raw maps of all classes, where positions are averaged."""
    model = twin(work.model, frozen=True)
    with _leaves(work.modules(model)) as leaves, torch.no_grad():
        model(work.images)
    activations = leaves[0].detach().flatten(2)
    weight = head.weight.detach()
    return _unchecked(lambda copy: weight @ activations)


def _unchecked(run: Callable[[int], Any]) -> Candidate:
    """A yardstick: it makes no map that could be wrong."""
    return Candidate(run, lambda found: 0.0, 0.0)


@contextmanager
def _leaves(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Within, the modules' outputs become leaves that are recorded from; they are collected in order."""
    leaves: list[Tensor] = []

    def cut(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        torch.set_grad_enabled(True)
        leaves.append(output.detach().requires_grad_())
        return leaves[-1].clone()  # the tail may work in place

    handles = [module.register_forward_hook(cut) for module in modules]
    try:
        yield leaves
    finally:
        for handle in handles:
            handle.remove()
