"""An explainer whose whole computation is one graph under `torch.compile`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from diffcam_fast.explain.capture import Captured, ordinary
from diffcam_fast.explain.checks import check_images, check_map_size
from diffcam_fast.explain.classes import classes_for, parse_classes
from diffcam_fast.explain.evaluation import autocast_dtype
from diffcam_fast.explain.evidence import Recipe, maps_of
from diffcam_fast.explain.explanation import Explanation
from diffcam_fast.explain.graph import Tail
from diffcam_fast.explain.memory_format import in_format
from diffcam_fast.explain.replica import replica
from diffcam_fast.explain.targets import Scores, Target
from diffcam_fast.reference.cam import accumulation_dtype

if TYPE_CHECKING:
    from collections.abc import Hashable

    from diffcam_fast.explain.explainer import Explainer


class _Layer(NamedTuple):
    """What the careful, eager pass saw of a layer."""

    shape: tuple[int, ...]
    """Of its output, without the images' dimension."""

    dtype: torch.dtype
    device: torch.device

    same_everywhere: bool
    """Gradients are needed as their mean over positions only."""

    untouched: bool


@dataclass(frozen=True)
class _Plan:
    """What holds for images of one shape."""

    layers: dict[str, _Layer]
    classes: int


class CompiledExplainer:
    """What `Explainer.compile` returns: called like the explainer, with the same result.

    Forward pass, scores, pull-back and maps are traced into one graph, in which nothing is recorded by autograd: the
    gradient at a layer is that of a zero which is added to its output, by `torch.func.vjp`. The model itself is not
    touched; its parameters are shared.

    Not for many classes of a model with a linear head: those are a matrix product to `Explainer`, and pulled back
    class by class here.
    """

    def __init__(self, explainer: Explainer, options: Mapping[str, Any]) -> None:
        if "fullgraph" in options:
            raise TypeError("fullgraph: an explanation is compiled as one graph or not at all; got it as an option")
        self.explainer = explainer
        self._plans: dict[Hashable, _Plan] = {}
        self._programs: dict[tuple[str, ...], Any] = {}
        self._options = dict(options)

    def __call__(self, images: Tensor, classes: Any = None) -> Explanation:
        """Explain images; see `Explainer.__call__`.

        The first call for images of a shape also explains one of them eagerly: that is where errors of layers and
        model are found. It then compiles, which takes from seconds to minutes.

        Raises:
            RuntimeError: the model cannot be compiled into one graph.
            TypeError: as `Explainer.__call__`.
            ValueError: as `Explainer.__call__`.
        """
        check_images(images)
        requested = parse_classes(classes, images.shape[0])
        if images.shape[0] == 0:
            return self.explainer(images, classes)
        with torch.inference_mode(False), torch.no_grad():
            images = in_format(ordinary(images), self.explainer.memory_format)
            plan = self._plan(images)
            chosen = None
            if requested is not None:
                chosen = classes_for(requested, images.new_empty(1).expand(images.shape[0], plan.classes))
            program = self._program(plan)
            zeros = {
                name: torch.zeros(
                    (
                        images.shape[0],
                        *((layer.shape[0], *(1 for _ in layer.shape[1:])) if layer.same_everywhere else layer.shape),
                    ),
                    dtype=layer.dtype,
                    device=layer.device,
                )
                for name, layer in plan.layers.items()
            }
            try:
                layer_maps, logits, chosen, delta, rivals = program(images, chosen, zeros)
            except torch._dynamo.exc.TorchDynamoException as error:
                raise RuntimeError(
                    "compile: torch.compile cannot turn this model's explanation into one graph (its own message is "
                    "above); call the explainer itself, which runs the model eagerly"
                ) from error
            size = check_map_size(images, layer_maps, self.explainer.size, reshaped=self.explainer.reshape is not None)
        return Explanation(layer_maps, logits, chosen, rivals, delta, size=size, normalize=self.explainer.normalize)

    def _plan(self, images: Tensor) -> _Plan:
        key = (images.shape[1:], images.dtype, images.device, autocast_dtype(images.device.type))
        if key not in self._plans:
            seen: list[Tail] = []
            self.explainer._explain_watched(images[:1], seen.append)
            (tail,) = seen
            self._plans[key] = _Plan(
                {name: self._layer(name, layer, tail) for name, layer in tail.captured.items()}, tail.logits.shape[1]
            )
        return self._plans[key]

    def _layer(self, name: str, layer: Captured, tail: Tail) -> _Layer:
        output = layer.output
        once = self.explainer.reshape is None and (self.explainer.method == "gradcam" or name in tail.pools)
        return _Layer(tuple(output.shape[1:]), output.dtype, output.device, once, layer.untouched and not layer.aliased)

    def _program(self, plan: _Plan) -> Any:
        copied = tuple(name for name, layer in plan.layers.items() if not layer.untouched)
        if copied not in self._programs:
            model = _Model(self.explainer.model, tuple(plan.layers), copied)
            recipe = self.explainer._recipe

            def program(
                images: Tensor, classes: Tensor | None, zeros: dict[str, Tensor]
            ) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor, Tensor | None]:
                return _explain(model, recipe, images, classes, zeros)

            self._programs[copied] = torch.compile(program, fullgraph=True, **self._options)
        return self._programs[copied]


class _Model:
    """The model as a function of images, and of what is added to its layers' outputs."""

    def __init__(self, model: nn.Module, layers: tuple[str, ...], copied: tuple[str, ...]) -> None:
        self._model = replica(model)
        self._outputs: dict[str, Tensor] = {}
        self._added: dict[str, Tensor] = {}
        for name in layers:
            self._model.get_submodule(name).register_forward_hook(self._hook(name, name in copied))

    def _hook(self, name: str, copied: bool) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            self._outputs[name] = output.clone() if copied else output
            return output + self._added[name]

        return hook

    def __call__(self, images: Tensor, added: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        self._added, self._outputs = added, {}
        logits: Tensor = self._model(images)
        outputs = self._outputs
        self._added, self._outputs = {}, {}
        if len(outputs) < len(added):
            raise ValueError("the model does not reach its layers by its modules: a copy of it misses them")
        return logits, outputs


def _explain(
    model: _Model, recipe: Recipe, images: Tensor, classes: Tensor | None, zeros: dict[str, Tensor]
) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor, Tensor | None]:
    differentiated: Any = torch.func.vjp(lambda added: model(images, added), zeros, has_aux=True)
    logits, pull, outputs = differentiated
    with torch.autocast(logits.device.type, enabled=False):
        wide = logits.to(accumulation_dtype(logits.dtype))
        chosen = wide.argmax(1, keepdim=True) if classes is None else classes
        scores = _scores(recipe, wide, chosen)
        cotangents = scores.cotangent.to(logits.dtype).transpose(0, 1)
        bytes_each = 3 * sum(output.nbytes for output in outputs.values())
        step = recipe.chunk_size or max(1, recipe.memory_budget // max(bytes_each, 1))
        found: dict[str, list[Tensor]] = {name: [] for name in outputs}
        for start in range(0, len(cotangents), step):
            chunk = cotangents[start : start + step]
            if len(chunk) == 1:
                gradients = {name: gradient.unsqueeze(0) for name, gradient in pull(chunk[0])[0].items()}
            else:
                (gradients,) = torch.func.vmap(pull)(chunk)
            for name, gradient in gradients.items():
                activations = outputs[name] if recipe.reshape is None else recipe.reshape(outputs[name])
                if gradient.shape[1:] != outputs[name].shape:
                    gradient = gradient.flatten(2) / outputs[name].shape[2:].numel()
                found[name].append(maps_of(recipe, activations, gradient).to(images.device))
    maps = {name: parts[0] if len(parts) == 1 else torch.cat(parts, 1) for name, parts in found.items()}
    return maps, logits, chosen, scores.delta, scores.rivals


def _scores(recipe: Recipe, logits: Tensor, classes: Tensor) -> Scores:
    target = recipe.target
    if isinstance(target, Target):
        return target.scores(logits, classes)
    differentiated: Any = torch.func.vjp(lambda z: target(z, classes), logits)
    scores, pull = differentiated
    count = classes.shape[1]
    each = torch.eye(count, dtype=scores.dtype, device=scores.device).unsqueeze(1).expand(-1, len(logits), -1)
    (rows,) = torch.func.vmap(pull)(each)
    return Scores(scores, rows.transpose(0, 1))
