"""From a model and images to maps: one forward pass, one pull-back, one fused pass over both results."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffcam_fast.explain.capture import Capture, Captured, ordinary
from diffcam_fast.explain.checks import check_activations, check_images, check_logits, check_map_size
from diffcam_fast.explain.classes import classes_for, parse_classes
from diffcam_fast.explain.compiled import CompiledExplainer
from diffcam_fast.explain.cuda_graph import CapturedExplainer
from diffcam_fast.explain.evaluation import autocast_off, evaluating
from diffcam_fast.explain.evidence import Recipe, gather_evidence
from diffcam_fast.explain.explanation import Explanation
from diffcam_fast.explain.graph import Tail
from diffcam_fast.explain.habits import HabitBook, Habits
from diffcam_fast.explain.layers import (
    ALL,
    LayerSpec,
    choose_layer,
    resolve_layers,
    run_eagerly,
    spatial_layers,
    unwrapped,
)
from diffcam_fast.explain.memory_format import (
    AUTO,
    FasterFormat,
    check_memory_format,
    in_format,
    same_but_for_rounding,
)
from diffcam_fast.explain.pooling import FasterPooling, max_poolings
from diffcam_fast.explain.positions import check_size
from diffcam_fast.explain.pull_back import check_differentiable
from diffcam_fast.explain.targets import LogitDifference, Target, TargetFunction, check_target
from diffcam_fast.reference.cam import METHODS, accumulation_dtype

DEFAULT_MEMORY_BUDGET = 512 * 2**20
"""Bytes that the gradients of several targets may take at a time."""

# One for all explainers, so that an explainer can be copied and pickled as its model can.
_choosing = threading.Lock()


class Explainer:
    """Class activation maps of a classifier.

    The model runs once, in evaluation mode and up to the first explained layer as under `torch.inference_mode`; the
    target's gradient is pulled back from the logits to the layers and no further. The model, its gradients,
    flags, buffers and hooks are left as they were, also after an error. Works under `torch.no_grad`,
    `torch.inference_mode` and autocast, and with frozen parameters. Several threads may use one explainer, or
    several explainers of one model, at a time.

    The first pass over images of a shape is a careful one, with `torch.no_grad` in place of inference mode and copies
    of the layers' outputs for the model to change; those that follow leave out what it shows not to be needed. Where
    it is needed after all, as by a tail that multiplies with tensors from before the layer, the pass is done again
    carefully, once, and so are all later ones.

    On a CPU, networks with depthwise separable convolutions are run on channels-last copies of contiguous images, which
    they are faster on; the first such pass is done in both orders, and logits and maps have to agree but for rounding,
    or the images stay as they are. `memory_format` says otherwise. Max pooling of contiguous images before the
    explained layer is done on channels-last copies, with the same bits sooner, unless the caller has hooked the pooling
    layer.

    A model compiled by `torch.compile`, or wrapped in DataParallel, is explained by the network inside, run
    eagerly on the images' device; `compile` compiles the explanation.

    Args:
        model: a classifier: images ``(N, C, *S)`` to logits ``(N, K)``, with an image's logits depending on
            that image alone.
        layers: a module, its dotted name, or a list of either, whose output is ``(N, C, *positions)`` with
            one to three dimensions of positions; None: the last such layer of the model that is laid out like
            the images and is called once, no pooling or dropout. "all": every module that is called once and puts
            out something laid out like the images, leaf modules and blocks alike; where one hands on what another
            put out, the inner one. None and "all" are resolved at the first call, by a forward pass over one image,
            and shown in the explanation. For several layers there is still one forward and one pull-back; their
            activations and gradients are in memory together, for "all" what training would keep and once more.
        method: how activations and gradients become a map: see `diffcam_fast.cam`.
        target: what is explained: `LogitDifference`, `Finer`, `Logit`, `Probability`, `LogProbability`, or a
            function ``(logits (N, K), classes (N, T)) -> scores (N, T)``, differentiable in the logits.
        normalize: "minmax", "max" or None, as in `diffcam_fast.cam`.
        size: of the maps: "input" (that of the images), None (the layer's own, of several the largest) or a
            tuple.
        reshape: for layers whose output is not ``(N, C, *positions)``: a function of the output that makes it
            so, such as `tokens_to_positions()`. It is applied to the gradient as well, so it may select and
            reorder only.
        relu: whether negative evidence is set to zero.
        chunk_size: how many targets are pulled back at a time; None: as many as `memory_budget` allows, batched.
            1 does without `torch.vmap`, which some operators' backwards do not support. Where the logits are one
            linear layer of the mean over the layer's positions nothing is pulled back, and this does not apply.
        memory_budget: bytes that the gradients and cotangents of several targets may take at a time (an estimate;
            what one target needs is taken in any case).
        memory_format: the order in memory that images are handed to the model in. "auto": channels-last on a CPU (x86,
            float32 or bfloat16) where the model has depthwise and pointwise convolutions, as the images come
            elsewhere. A `torch.memory_format`: always that; `torch.preserve_format`: always as they come.

    Raises:
        TypeError: an argument is not of a type above.
        ValueError: a layer is not part of the model, or another argument has no valid value.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: LayerSpec | Sequence[LayerSpec] | None = None,
        method: str = "gradcam",
        target: Target | TargetFunction = LogitDifference(),  # noqa: B008 (immutable)
        normalize: str | None = "minmax",
        size: str | Sequence[int] | None = "input",
        reshape: Callable[[Tensor], Tensor] | None = None,
        *,
        relu: bool = True,
        chunk_size: int | None = None,
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        memory_format: str | torch.memory_format = AUTO,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module; got {type(model).__name__}")
        if method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}; got {method!r}")
        if normalize not in (None, "max", "minmax"):
            raise ValueError(f"normalize: expected None, 'max' or 'minmax'; got {normalize!r}")
        if isinstance(size, str) and size != "input":
            raise ValueError(f"size: expected 'input', None or a tuple of integers; got {size!r}")
        if reshape is not None and not callable(reshape):
            raise TypeError(f"reshape: expected a function or None; got {type(reshape).__name__}")
        if chunk_size is not None:
            if isinstance(chunk_size, bool) or not isinstance(chunk_size, int):
                raise TypeError(f"chunk_size: expected an integer or None; got {type(chunk_size).__name__}")
            if chunk_size < 1:
                raise ValueError(f"chunk_size: expected at least 1; got {chunk_size}")
        if isinstance(memory_budget, bool) or not isinstance(memory_budget, int):
            raise TypeError(f"memory_budget: expected an integer; got {type(memory_budget).__name__}")
        if memory_budget < 1:
            raise ValueError(f"memory_budget: expected a positive number of bytes; got {memory_budget}")
        self.model = unwrapped(model)
        self.method = method
        self.target = check_target(target)
        self.normalize = normalize
        self.size: str | tuple[int, ...] | None
        self.size = size if size is None or isinstance(size, str) else check_size(size)
        self.reshape = reshape
        self.relu = bool(relu)
        self.chunk_size = chunk_size
        self.memory_budget = memory_budget
        self._all_layers = isinstance(layers, str) and layers == ALL and ALL not in dict(self.model.named_modules())
        self._layers = None if layers is None or self._all_layers else resolve_layers(self.model, layers)
        self._poolings = max_poolings(self.model)
        self.memory_format = check_memory_format(memory_format)
        self._habits = HabitBook(FasterFormat(self.model) if self.memory_format == AUTO else None, _agree)

    @property
    def _recipe(self) -> Recipe:
        return Recipe(
            self.method,
            self.target,
            self.normalize,
            self.relu,
            self.reshape,
            self.chunk_size,
            self.memory_budget,
        )

    def __call__(self, images: Tensor, classes: Any = None) -> Explanation:
        """Explain images.

        Args:
            images: ``(N, C, *S)``, floating point, as the model takes them. N may be 0.
            classes: None (the predicted class), an integer for all images, or ``(N,)`` or ``(N, T)`` integers
                as a tensor, an array or lists.

        Returns:
            The explanation. On a GPU nothing in it has been waited for. Classes that are on the GPU are not
            read, and so not checked.

        Raises:
            TypeError: images that are no floating point tensor, classes that are no integers, a layer that
                does not put out a tensor.
            ValueError: images without batch dimension, classes of the wrong shape or out of range; a layer
                that was not called, was called more than once, has no positions, or does not reach the
                logits; a model whose output is not ``(N, K)``, or whose tail is not differentiable.
        """
        check_images(images)
        requested = parse_classes(classes, images.shape[0])
        with evaluating(self.model):
            # The user's images stay outside the graph; tensors made under inference mode cannot enter one.
            images = in_format(ordinary(images), self.memory_format)
            layers = self._resolved(images)
            return self._habits.follow(images, lambda given, habits: self._attempt(given, layers, requested, habits))

    def compile(self, **options: Any) -> CompiledExplainer:
        """An explainer with the same results, compiled by `torch.compile` from the images to the maps.

        Args:
            **options: of `torch.compile` (`mode`, `backend`, `dynamic`, `options`), but for `fullgraph`, which is
                always on. What cannot be compiled into one graph raises at the first call.
        """
        return CompiledExplainer(self, options)

    def capture(self, example: Tensor, classes: Any = None) -> CapturedExplainer:
        """A CUDA graph of the whole explained inference, for images like the example.

        What costs time for small batches is launching kernels one by one; a graph launches them all at once.

        Args:
            example: images on the model's CUDA device, of the shape, dtype and layout of those to come. Autocast is
                captured as it is now.
            classes: None: the predicted classes are explained. Classes as in `__call__`: as many are explained at
                each call, these or others given then.

        Returns:
            A function ``(images, classes=None) -> Explanation``.

        Raises:
            ValueError: the images or the model are not on a CUDA device, or what `__call__` refuses.
        """
        return CapturedExplainer(self, example, classes)

    def _explain_watched(self, images: Tensor, watch: Callable[[Tail], None]) -> Explanation:
        """A careful explanation, for whose recorded pass `watch` is called."""
        with evaluating(self.model):
            images = in_format(ordinary(images), self.memory_format)
            return self._attempt(images, self._resolved(images), None, Habits(), watch)[0]

    def _resolved(self, images: Tensor) -> dict[str, nn.Module]:
        if self._layers is None:
            with _choosing:
                if self._layers is None:
                    if self._all_layers:
                        self._layers = resolve_layers(self.model, spatial_layers(self.model, images[:1]))
                    else:
                        self._layers = resolve_layers(self.model, choose_layer(self.model, images[:1]))
        return self._layers

    def _attempt(
        self,
        images: Tensor,
        layers: Mapping[str, nn.Module],
        requested: Tensor | None,
        habits: Habits,
        watch: Callable[[Tail], None] | None = None,
    ) -> tuple[Explanation, Habits]:
        """An explanation, and what was learned about the model from it."""
        capture = Capture(layers, habits.untouched, inference=habits.inference)
        with FasterPooling(self._poolings), capture:
            output = run_eagerly(self.model, images)
        captured = capture.outputs()
        logits = check_logits(output, images.shape[0])
        torch._C._set_grad_enabled(False)  # `evaluating` puts it back
        with autocast_off(logits.device.type):
            return self._explain(images, logits, captured, requested, habits, watch)

    def _explain(
        self,
        images: Tensor,
        logits: Tensor,
        captured: Mapping[str, Captured],
        requested: Tensor | None,
        habits: Habits,
        watch: Callable[[Tail], None] | None,
    ) -> tuple[Explanation, Habits]:
        reshape = self.reshape
        activations = {
            name: check_activations(
                name,
                layer.output.detach() if reshape is None else reshape(layer.output.detach()),
                reshaped=reshape is not None,
            )
            for name, layer in captured.items()
        }
        size = check_map_size(images, activations, self.size, reshaped=reshape is not None)
        check_differentiable(logits, list(captured))
        wide = logits
        if logits.dtype != accumulation_dtype(logits.dtype):
            with torch.enable_grad():
                wide = logits.to(accumulation_dtype(logits.dtype))
        classes = classes_for(requested, logits)
        tail = Tail(wide, captured)
        if watch is not None:
            watch(tail)
        learned = habits
        weight = None
        if habits.linear_head is not False and reshape is None and len(captured) == 1 and len(images) > 0:
            (name,) = captured
            # Asking autograd for a single target takes little longer, and is always right.
            single = classes.shape[1] == 1 and not (
                isinstance(self.target, Target) and self.target.targets_per_class > 1
            )
            weight = tail.head_weight(name, without_hooks=single)
            if weight is not None and habits.linear_head is None:
                is_head = tail.is_head(name, weight)
                learned = learned.with_head(is_head)
                weight = weight if is_head else None
        evidence = gather_evidence(self._recipe, tail, activations, classes, images.device, weight)
        explanation = Explanation(
            evidence.layer_maps,
            logits.detach(),
            classes,
            evidence.rivals,
            evidence.delta,
            size=size,
            normalize=self.normalize,
        )
        return explanation, learned.after(captured)


def _agree(one: Explanation, other: Explanation) -> bool:
    pairs = [(one.logits, other.logits)]
    pairs += [(maps, other.layer_maps[name]) for name, maps in one.layer_maps.items()]
    return all(same_but_for_rounding(*pair) for pair in pairs)
