"""Explained inference in bfloat16, eager and as one CUDA graph, as a multiple of plain inference, and beside peers."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import diffcam_fast as dcf
from benchmarks.gpu.case import Case
from benchmarks.gpu.timing import Settings, captured, latencies
from benchmarks.report import Row
from benchmarks.speed.measure import Timing, WrongResult
from benchmarks.speed.networks import OTHERS, POOLED, SIZE, Network
from diffcam_fast.backends import serving
from diffcam_fast.benchmark.explanations import Plain, Work, error_of_maps, explaining, images
from diffcam_fast.benchmark.peers import PEERS
from diffcam_fast.benchmark.peers import absent_because as peer_absent_because

NETWORKS = {
    network.name: network
    for network in (*POOLED, *OTHERS)
    if network.name in ("resnet50", "mobilenet_v2", "convnext_tiny", "vit_b_16")
}
BATCHES = (1, 32, 256)

#: Images that are told apart; larger batches repeat them.
DISTINCT = 32

#: Two ways to the same map, both in bfloat16: each rounds a thousand products by 2^-9, in other places.
SHARE_OF_RANGE = 0.1

#: The same for a graph and the calls that it was made of.
GRAPH_SHARE_OF_RANGE = 0.02


def cases(settings: Settings) -> list[Case]:
    """Small batches of every network first."""
    chosen = [(NETWORKS[name], batch) for batch in BATCHES for name in NETWORKS]
    if settings.quick:
        chosen = [(NETWORKS["mobilenet_v2"], 1)]
    built: dict[str, nn.Module] = {}
    return [
        Case(
            f"{network.name}, batch {batch}",
            partial(_measure, network, batch, built, settings),
            seconds=6.0,
        )
        for network, batch in chosen
    ]


def _measure(network: Network, batch: int, built: dict[str, nn.Module], settings: Settings) -> Row:
    torch.backends.cudnn.benchmark = True
    half = torch.bfloat16 if settings.on_gpu else torch.float32
    if network.name not in built:
        built[network.name] = network.build().to(settings.device, half, memory_format=torch.channels_last)
    model = built[network.name]
    size = 64 if settings.quick and not network.tokens else SIZE
    photos = images(min(batch, DISTINCT), (size, size)).to(settings.device, half, memory_format=torch.channels_last)
    photos = photos.repeat(-(-batch // len(photos)), 1, 1, 1)[:batch].contiguous(memory_format=torch.channels_last)
    work = _work(model, photos, network)
    row: Row = {"network": network.name, "batch": batch, "dtype": str(half).removeprefix("torch.")}
    row["backend"] = serving(settings.device)
    row["error"] = _checked("ours", error_of_maps(explaining(work)(0)[1], Plain(work).run(0)), SHARE_OF_RANGE)

    explainer = dcf.Explainer(model, network.layer, reshape=network.reshape)

    def inference(copy: int) -> Tensor:
        with torch.inference_mode():
            found: Tensor = model(photos)
            return found

    runs: dict[str, Callable[[int], Any]] = {"inference": inference, "ours": lambda copy: explainer(photos).maps}
    if settings.on_gpu:
        graph = explainer.capture(photos)
        difference = (graph(photos).maps - explainer(photos).maps).abs().amax().item()
        row["graph_error"] = _checked("graph", difference, GRAPH_SHARE_OF_RANGE)
        runs["inference_graph"] = captured(inference, 1, 1, settings)
        runs["ours_graph"] = lambda copy: graph(photos).maps
    absent = {}
    for name, peer in PEERS.items():
        reason = peer_absent_because(name) or (None if peer.can(work) else "it does not make these maps")
        if reason is None:
            reason = _try(name, work, runs)
        if reason is not None:
            absent[name] = reason
    timings = latencies(runs, settings)
    return row | columns(timings) | {f"{name}_absent": reason for name, reason in absent.items()}


def columns(timings: dict[str, Timing]) -> Row:
    """Milliseconds, and multiples of plain inference; a graph's of plain inference as a graph."""
    found: Row = {"rounds": min(timing.rounds for timing in timings.values())}
    for name, timing in timings.items():
        found |= {f"{name}_ms": 1e3 * timing.median}
    found["multiple"] = timings["ours"].median / timings["inference"].median
    if "ours_graph" in timings:
        found["graph_multiple"] = timings["ours_graph"].median / timings["inference_graph"].median
    for name in PEERS:
        if name in timings:
            found[f"{name}_multiple"] = timings[name].median / timings["inference"].median
            found[f"vs_{name}"] = timings["ours"].median / timings[name].median
    return found


def _work(model: nn.Module, photos: Tensor, network: Network) -> Work:
    """Everybody explains the same classes: of each image's likeliest, the first whose map is not empty."""
    with torch.inference_mode():
        likely = model(photos).topk(10).indices
    explainer = dcf.Explainer(model, network.layer, target=dcf.Logit(), size=None, reshape=network.reshape)
    (maps,) = explainer(photos, likely.clone()).layer_maps.values()
    evident = maps.flatten(2).amax(2) > 0.5
    if not evident.any(1).all():
        raise ValueError(f"{network.name}: an image has no evidence for any of its ten likeliest classes")
    classes = likely.gather(1, evident.int().argmax(1, keepdim=True)).clone()
    return Work(model, photos, classes, (network.layer,), network.reshape)


def _try(name: str, work: Work, runs: dict[str, Callable[[int], Any]]) -> str | None:
    """Add a peer, or say why it cannot be added."""
    peer = PEERS[name]
    try:
        run = peer.set_up(work, importlib.import_module(peer.package))
        expected = peer.expected(explaining(work)(0)[1], work)
        _checked(peer.title, error_of_maps(peer.maps(run(0), work), expected), SHARE_OF_RANGE)
    except Exception as error:  # other people's code, on a device and in a precision that it may not be made for
        return f"{type(error).__name__}: {str(error)[:200]}"
    runs[name] = run
    return None


def _checked(who: str, error: float, tolerance: float) -> float:
    if not error <= tolerance:
        raise WrongResult(f"{who}: error {error:.3g} where at most {tolerance:.3g} is allowed; not timed")
    return error
