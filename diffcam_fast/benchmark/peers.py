"""The same maps by other libraries: pytorch-grad-cam, torchcam, captum, and plain PyTorch.

Each is used as its documentation shows, on a model of its own (they leave hooks on it), set up once before it is timed.
What none of them does by itself, resizing to the images' size and normalising, is added as briefly as a user would.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from diffcam_fast.benchmark.explanations import (
    TOLERANCE,
    Maps,
    Plain,
    Work,
    error_of_maps,
    explaining,
    normalized,
    together,
    twin,
)
from diffcam_fast.benchmark.measure import Candidate

Run = Callable[[int], Any]


@dataclass(frozen=True)
class Peer:
    """Another way to the same maps."""

    title: str

    package: str
    """What has to be installed for it, as imported."""

    set_up: Callable[[Work, Any], Run]
    """From the work and the imported package to a function that explains it, which is timed."""

    maps: Callable[[Any, Work], Maps] = lambda found, work: found
    """From what the function returns to maps; not timed."""

    can: Callable[[Work], bool] = lambda work: True
    """Whether it makes these maps at all."""

    expected: Callable[[Maps, Work], Maps] = lambda maps, work: maps
    """From our maps, as the work asks for them, to the peer's, where it fuses several layers in another way."""


def absent_because(name: str) -> str | None:
    """Why a peer cannot be compared with here, or None when it can."""
    try:
        importlib.import_module(PEERS[name].package)
    except Exception as error:  # libraries that were built for another PyTorch fail in ways of their own
        return f"{type(error).__name__}: {error}"
    return None


def candidate(name: str, work: Work) -> Candidate:
    """A peer, with the check of its maps against ours.

    Args:
        name: in `PEERS`.
        work: what it explains.

    Raises:
        ImportError: it is not installed.
    """
    peer = PEERS[name]
    reason = absent_because(name)
    if reason is not None:
        raise ImportError(f"{peer.title} cannot be compared with: {reason}")
    expected = peer.expected(explaining(work)(0)[1], work)
    run = peer.set_up(work, importlib.import_module(peer.package))
    return Candidate(run, lambda found: error_of_maps(peer.maps(found, work), expected), TOLERANCE)


def _plain(work: Work, library: Any) -> Run:
    return Plain(work).run


def _torchcam(work: Work, library: Any) -> Run:
    model = twin(work.model)
    extractor = library.GradCAM(model, work.modules(model), reshape_transform=work.reshape)
    classes = work.classes.T.tolist()

    def run(copy: int) -> Maps:
        logits = model(work.images)
        found = [
            # Maps that are resized are normalised then, and need not be before.
            extractor(indices, logits, not work.at_input_size, retain_graph=number + 1 < len(classes))
            for number, indices in enumerate(classes)
        ]
        maps = [torch.stack(of_layer, 1) for of_layer in zip(*found, strict=True)]
        return together(maps, work) if work.at_input_size else maps

    return run


def _captum(work: Work, library: Any) -> Run:
    model = twin(work.model)
    methods = [library.LayerGradCam(model, module) for module in work.modules(model)]

    def run(copy: int) -> Maps:
        maps = [
            torch.cat(
                [
                    method.attribute(work.images, classes, relu_attributions=True).detach()
                    for classes in work.classes.unbind(1)
                ],
                1,
            )
            for method in methods
        ]
        return together(maps, work)

    return run


def _pytorch_grad_cam(work: Work, library: Any) -> Run:
    model = twin(work.model)
    method = library.GradCAM(model=model, target_layers=work.modules(model), reshape_transform=work.reshape)
    target = library.utils.model_targets.ClassifierOutputTarget
    targets = [[target(index) for index in classes] for classes in work.classes.T.tolist()]

    def run(copy: int) -> list[Any]:
        return [method(input_tensor=work.images, targets=of_class) for of_class in targets]

    return run


def _from_arrays(found: list[Any], work: Work) -> Maps:
    return [torch.stack([torch.from_numpy(maps) for maps in found], 1)]


def _fused_arrays(maps: Maps, work: Work) -> Maps:
    """The mean of the layers' maps at the size of the images, each normalised before it is resized and not after."""
    size = work.images.shape[2:]
    resized = [functional.interpolate(of_layer, size, mode="bilinear", align_corners=False) for of_layer in maps]
    return [normalized(torch.stack(resized).mean(0))]


PEERS = {
    "plain": Peer("plain PyTorch", "torch", _plain),
    "torchcam": Peer("torchcam", "torchcam.methods", _torchcam),
    "captum": Peer(
        "captum",
        "captum.attr",
        _captum,
        # The second dimension is always its channels.
        can=lambda work: work.reshape is None,
    ),
    "pytorch_grad_cam": Peer(
        "pytorch-grad-cam",
        "pytorch_grad_cam",
        _pytorch_grad_cam,
        maps=_from_arrays,
        # Several layers it fuses at the size of the images, and in another way than we do.
        can=lambda work: len(work.layers) == 1 or not work.at_input_size,
        expected=_fused_arrays,
    ),
}
"""By name. What takes one pass of the model comes before what takes one for each class (or layer)."""
