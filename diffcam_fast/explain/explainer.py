"""From a model and images to maps: one forward pass, one pull-back, one fused pass over both results."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffcam_fast.explain.capture import Capture, Captured
from diffcam_fast.explain.classes import classes_for, parse_classes
from diffcam_fast.explain.evaluation import autocast_off, evaluating
from diffcam_fast.explain.explanation import EPS, Explanation
from diffcam_fast.explain.layers import LayerSpec, choose_layer, resolve_layers, run_eagerly, unwrapped
from diffcam_fast.explain.positions import check_size
from diffcam_fast.explain.pull_back import pull_back
from diffcam_fast.explain.targets import LogitDifference, Target, TargetFunction, check_target, score
from diffcam_fast.ops.cam import cam
from diffcam_fast.reference.cam import METHODS, accumulation_dtype

# One for all explainers, so that an explainer can be copied and pickled as its model can.
_choosing = threading.Lock()


class Explainer:
    """Class activation maps of a classifier.

    The model runs once, in evaluation mode and without recording up to the first explained layer; the
    target's gradient is pulled back from the logits to the layers and no further. The model, its gradients,
    flags, buffers and hooks are left as they were, also after an error. Works under `torch.no_grad`,
    `torch.inference_mode` and autocast, and with frozen parameters. Several threads may use one explainer, or
    several explainers of one model, at a time.

    A model compiled by `torch.compile`, or wrapped in DataParallel, is explained by the network inside, run
    eagerly on the images' device.

    Args:
        model: a classifier: images ``(N, C, *S)`` to logits ``(N, K)``, with an image's logits depending on
            that image alone.
        layers: a module, its dotted name, or a list of either, whose output is ``(N, C, *positions)`` with
            one to three dimensions of positions; None: the last such layer of the model that is laid out like
            the images and is called once, no pooling or dropout. It is chosen at the first call, by a forward
            pass over one image, and shown in the explanation.
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
        chunk_size: how many targets are pulled back at a time; None: all of them, batched. Fewer take less
            memory; 1 does without `torch.vmap`, which some operators' backwards do not support.

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
        self.model = unwrapped(model)
        self.method = method
        self.target = check_target(target)
        self.normalize = normalize
        self.size: str | tuple[int, ...] | None
        self.size = size if size is None or isinstance(size, str) else check_size(size)
        self.reshape = reshape
        self.relu = bool(relu)
        self.chunk_size = chunk_size
        self._layers = None if layers is None else resolve_layers(self.model, layers)

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
        _check_images(images)
        requested = parse_classes(classes, images.shape[0])
        with evaluating(self.model):
            # The user's images stay outside the graph; tensors made under inference mode cannot enter one.
            images = images.clone() if images.is_inference() else images.detach()
            layers = self._resolved(images)
            with Capture(layers) as capture:
                output = run_eagerly(self.model, images)
            captured = capture.outputs()
            logits = _check_logits(output, images.shape[0])
            with torch.no_grad(), autocast_off(logits.device.type):
                return self._explain(images, logits, captured, requested)

    def _resolved(self, images: Tensor) -> dict[str, nn.Module]:
        if self._layers is None:
            with _choosing:
                if self._layers is None:
                    self._layers = resolve_layers(self.model, choose_layer(self.model, images[:1]))
        return self._layers

    def _explain(
        self, images: Tensor, logits: Tensor, captured: Mapping[str, Captured], requested: Tensor | None
    ) -> Explanation:
        activations = {name: self._positions(name, layer.output.detach()) for name, layer in captured.items()}
        size = self._map_size(images, activations)
        with torch.enable_grad():
            wide = logits.to(accumulation_dtype(logits.dtype))
        classes = classes_for(requested, logits)
        scores = score(self.target, wide, classes)

        chunks: dict[str, list[Tensor]] = {name: [] for name in captured}
        for gradients in pull_back(
            wide, captured, scores.cotangent, chunk_size=self.chunk_size, pooled=self.reshape is None
        ):
            for name, gradient in gradients.items():
                chunks[name].append(self._maps(activations[name], gradient).to(images.device))
        layer_maps = {name: maps[0] if len(maps) == 1 else torch.cat(maps, 1) for name, maps in chunks.items()}
        return Explanation(
            layer_maps,
            logits.detach(),
            classes,
            scores.rivals,
            scores.delta,
            size=size,
            normalize=self.normalize,
        )

    def _positions(self, name: str, output: Tensor) -> Tensor:
        """The layer's output as (N, C, *positions)."""
        activations = output if self.reshape is None else self.reshape(output)
        if not isinstance(activations, Tensor):
            raise TypeError(f"reshape: expected the function to return a tensor; got {type(activations).__name__}")
        where = f"layer {name!r}" + ("" if self.reshape is None else " after reshape")
        shape = tuple(activations.shape)
        if not 3 <= len(shape) <= 5:
            raise ValueError(
                f"layers: expected {where} to put out (N, C, *positions), one to three dimensions of "
                f"positions; got shape {shape}"
            )
        if activations.shape[2:].numel() < 2:
            raise ValueError(f"layers: expected {where} to have several positions for a map; got shape {shape}")
        return activations

    def _map_size(self, images: Tensor, activations: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        """The size of the maps; None for the layer's own. Checked before the work is done."""
        wanted = tuple(images.shape[2:]) if isinstance(self.size, str) else self.size
        for name, activation in activations.items():
            shape = tuple(activation.shape)
            if shape[0] != images.shape[0]:
                raise ValueError(
                    f"layers: expected layer {name!r} to put out one entry per image, {images.shape[0]} in "
                    f"all; got shape {shape}"
                )
            if wanted is not None and len(wanted) != len(shape) - 2:
                tokens = len(shape) == 3 and images.dim() > 3 and self.reshape is None
                raise ValueError(
                    f"size: layer {name!r} has {len(shape) - 2} dimensions of positions, in shape {shape}, "
                    f"which cannot be resized to {wanted}"
                    + ("; for tokens pass reshape=diffcam_fast.tokens_to_positions()" if tokens else "")
                )
        dimensions = {activation.dim() for activation in activations.values()}
        if len(dimensions) > 1:
            raise ValueError(
                "layers: expected layers with the same number of dimensions of positions, to fuse their maps"
            )
        return wanted

    def _maps(self, activations: Tensor, gradient: Tensor) -> Tensor:
        """Finished maps (N, t, *positions) from gradients (t, N, *output) or (t, N, C)."""
        if self.reshape is not None:
            count = gradient.shape[0]
            flat = self.reshape(gradient.flatten(0, 1))
            gradient = flat.reshape(count, *activations.shape)
        gradients = gradient.transpose(0, 1)
        if gradients.dim() == activations.dim() == 3:
            # (N, t, C) could be taken for one gradient (N, C, S) where t = C = S.
            gradients = gradients.unsqueeze(3).expand(*gradients.shape, activations.shape[2])
        return cam(activations, gradients, self.method, relu=self.relu, normalize=self.normalize, eps=EPS)


def _check_images(images: Any) -> None:
    if not isinstance(images, Tensor):
        raise TypeError(f"images: expected a torch.Tensor; got {type(images).__name__}")
    if not images.is_floating_point():
        raise TypeError(f"images: expected a floating point tensor; got {images.dtype}")
    if not 3 <= images.dim() <= 5:
        raise ValueError(
            f"images: expected a batch (N, C, *S) with one to three spatial dimensions; got shape {tuple(images.shape)}"
        )


def _check_logits(output: Any, images: int) -> Tensor:
    if not isinstance(output, Tensor):
        raise ValueError(
            f"model: expected it to return logits (N, K); got {type(output).__name__}; wrap the model in a "
            "module that returns its logits"
        )
    if output.dim() != 2 or output.shape[0] != images or output.shape[1] < 2:
        raise ValueError(
            f"model: expected logits of shape ({images}, K), K at least 2, for {images} images (with a batch "
            f"dimension); got shape {tuple(output.shape)}"
        )
    if not output.is_floating_point():
        raise ValueError(f"model: expected floating point logits; got {output.dtype}")
    return output
