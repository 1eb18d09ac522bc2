"""A training step with a map loss beside a plain training step: `PassiveFooling` on a ResNet-18 for CIFAR's images."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from benchmarks.report import Bar, Column, Report, Row, Table
from benchmarks.speed.measure import QUICK, Candidate, Effort, beside, compare, thread_counts, threads
from benchmarks.studies.networks_cifar import CifarResNet18
from diffcam_fast import Logit, LogitDifference
from diffcam_fast.benchmark.explanations import images as seeded_images
from diffcam_fast.explain import Target
from diffcam_fast.reference import cam as reference_cam
from diffcam_fast.reference import logit_difference as reference_logit_difference
from diffcam_fast.robustness.fooling import PassiveFooling
from diffcam_fast.robustness.fooling_losses import ActiveLoss, CentreOfMassLoss, HoaxLoss, MapLoss, TopKLoss
from diffcam_fast.robustness.hoax import SalienceHoax

#: A step with a map loss in plain steps.
LIMIT = 2.5

#: Relative error of a step's loss, and of what the loss has become after it, against float64. What a step changes
#: is small beside the loss; float32's rounding of the loss is larger beside that.
TOLERANCE = 1e-3

STRENGTH = 10.0
SIZE, CLASSES = 32, 10
#: Small enough for steps without end, large enough that the first takes a hundredth of the loss.
LEARNING_RATE = 1e-5

INTRODUCTION = """\
One step of `PassiveFooling`: forward pass, map of each image's label, cross-entropy plus ten times the map loss,
backward pass through the map's gradients, optimizer (stochastic gradient descent). *plain*: the same step without the
map. *vs plain*: our median time by the plain step's. Top-k, centre of mass and active compare with the original
network's maps, which are made anew at each step, in the time. ResNet-18 for 32 x 32 pixels with seeded weights, batch
norm in evaluation mode in both. Candidates alternate in one process; before it was timed, each one's first loss and
what the loss had become after the step were checked against float64 and the reference formulas."""


@dataclass(frozen=True)
class Case:
    """One row of the results."""

    batch: int
    layer: str
    loss: str
    attacked: Target
    method: str
    threads: int

    def columns(self) -> Row:
        """The case as columns of a row."""
        difference = isinstance(self.attacked, LogitDifference)
        return {
            "batch": self.batch,
            "layer": self.layer,
            "loss": self.loss,
            "attacked": f"difference, {self.attacked.baseline}" if difference else "logit",
            "method": self.method,
            "threads": self.threads,
        }


LOSSES: dict[str, Callable[[int], MapLoss]] = {
    "hoax": lambda size: HoaxLoss(SalienceHoax((size, size))),
    "top-k": lambda size: TopKLoss(),
    "centre of mass": lambda size: CentreOfMassLoss(),
    "active": lambda size: ActiveLoss(0, 1),
}


def cases(quick: bool) -> list[Case]:
    """What is measured."""
    count = thread_counts()[-1]
    if quick:
        return [
            Case(4, "layer4", "hoax", Logit(), "gradcam", 1),
            Case(4, "layer4", "active", LogitDifference(), "gradcam++", 1),
        ]
    found = [Case(32, "layer4", loss, Logit(), "gradcam", count) for loss in LOSSES]
    found += [
        Case(32, "layer4", "hoax", Logit(), "gradcam++", count),
        Case(32, "layer4", "hoax", LogitDifference(), "gradcam", count),
        Case(32, "layer4", "hoax", LogitDifference("expected"), "gradcam", count),
        Case(32, "layer3", "hoax", LogitDifference(), "gradcam", count),
    ]
    return found


class Inputs:
    """A network and a batch of a case, and the losses that are right."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.images = seeded_images(case.batch, (SIZE, SIZE))
        self.labels = torch.arange(case.batch) % CLASSES
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = CifarResNet18(CLASSES)
        for module in self.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0  # statistics that keep the activations in range, from one batch
        with torch.no_grad():
            self.model.train()(self.images)
        self.model.eval()
        self.map_loss = LOSSES[case.loss]({"layer3": 8, "layer4": 4}[case.layer])

    def expected(self, strength: float) -> tuple[float, float]:
        """A step's loss and the loss after it, in float64, by the reference formulas."""
        model = copy.deepcopy(self.model).double()
        images = self.images.double()
        before = self._maps(model, images)[1].detach()

        def loss() -> Tensor:
            logits, maps = self._maps(model, images)
            found = functional.cross_entropy(logits, self.labels)
            if strength == 0:
                return found
            counted = self.map_loss.counts(self.labels)
            return found + strength * self.map_loss(maps, before)[counted].mean()

        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        first = loss()
        first.backward()
        optimizer.step()
        return first.item(), loss().item()

    def _maps(self, model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
        kept: list[Tensor] = []
        handle = model.get_submodule(self.case.layer).register_forward_hook(lambda *call: kept.append(call[2]))
        logits = model(images)
        handle.remove()
        classes = self.map_loss.classes(self.labels)
        if isinstance(self.case.attacked, LogitDifference):
            target = self.case.attacked
            scores = reference_logit_difference.logit_difference(
                logits, classes, target.baseline, 0, target.temperature, 1.0, []
            )[0]
        else:
            scores = logits.gather(1, classes)
        gradients = [torch.autograd.grad(score.sum(), kept[0], create_graph=True)[0] for score in scores.unbind(1)]
        return logits, reference_cam.cam(kept[0], torch.stack(gradients, 1), self.case.method, True, "minmax", 1e-7)

    def ours(self, strength: float = STRENGTH) -> Candidate:
        """The trainer, with the check of its first step."""
        case = self.case
        sgd = partial(torch.optim.SGD, lr=LEARNING_RATE)
        fooling = PassiveFooling(
            self.model, case.layer, self.map_loss, case.attacked, case.method, strength=strength, optimizer=sgd
        )
        first, after = self.expected(strength)

        def error(found: Any) -> float:
            return _relative([found.loss, fooling.step(self.images, self.labels).loss], [first, after])

        return Candidate(lambda copy: fooling.step(self.images, self.labels), error, TOLERANCE)

    def plain(self) -> Candidate:
        """What training without a map does, with the same check."""
        model = copy.deepcopy(self.model)
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        first, after = self.expected(0)

        def step() -> float:
            loss = functional.cross_entropy(model(self.images), self.labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            return loss.item()

        return Candidate(lambda copy: step(), lambda found: _relative([found, step()], [first, after]), TOLERANCE)


def _relative(found: list[float], expected: list[float]) -> float:
    """The larger of the first loss's relative error, and that of what the step took from it."""
    fell, wanted = found[0] - found[1], expected[0] - expected[1]
    rounding = 4e-7 * abs(expected[0])  # of two losses in float32
    return max(abs(found[0] / expected[0] - 1), max(0.0, abs(fell - wanted) - rounding) / abs(wanted))


def measure(case: Case, effort: Effort) -> Row:
    """One row. The number of threads is set already."""
    inputs = Inputs(case)
    label = _label(case.columns())
    candidates = {"ours": inputs.ours(), "plain": inputs.plain()}
    timings, errors = compare(candidates, what=label, effort=effort)
    mine = timings["ours"]
    row = {**case.columns(), "rounds": mine.rounds, "error": errors["ours"], **mine.milliseconds()}
    return row | beside(timings, errors, {"plain": "plain step"})


def run(quick: bool = False) -> Report:
    """Measure everything, or for `quick` two small cases in a few rounds.

    Raises:
        WrongResult: a step's loss, or what became of it, is wrong.
    """
    found = []
    for case in tqdm(cases(quick), desc="fooling", disable=None):
        with threads(case.threads):
            found.append(measure(case, QUICK if quick else Effort(seconds=12.0, minimum_rounds=7)))
    return report(found)


def report(found: list[Row]) -> Report:
    """The rows as a report, with the table and the bar."""
    columns = [
        Column("layer", "layer"),
        Column("map loss", "loss"),
        Column("attacked", "attacked"),
        Column("method", "method"),
        Column("ms", "ms", ".4g"),
        Column("p20", "ms_p20", ".4g"),
        Column("p80", "ms_p80", ".4g"),
        Column("plain ms", "plain_ms", ".4g"),
        Column("vs plain", "vs_plain", ".2f"),
    ]
    return Report(
        name="fooling",
        title="training with a map loss",
        introduction=f"{INTRODUCTION} {found[0]['threads']} threads.",
        rows=found,
        tables=[Table(f"Batches of {found[0]['batch']}", found, columns)],
        bars=[Bar("a step with a map loss takes at most 2.5 plain steps", "vs_plain", LIMIT, show=".2f")],
        label=_label,
    )


def _label(row: Row) -> str:
    return f"{row['loss']}, {row['attacked']}, {row['method']}, {row['layer']}, batch {row['batch']}"
