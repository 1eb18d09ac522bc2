"""Passive fooling: networks trained to keep their decisions and to show a hoax, and who is taken in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.studies.fooling_figures import clean_figure, grid_figure, steered_figure
from benchmarks.studies.fooling_measures import (
    DIFFERENCES,
    EXPLAINED,
    MEASURES,
    Explained,
    Key,
    Outcome,
    attacked,
    clean_likeness,
    explain,
    similarities,
)
from benchmarks.studies.fooling_tasks import Task, load_tasks
from benchmarks.studies.statistics import Interval, mean_interval
from benchmarks.studies.study import Cell, Claim, Findings, Settings, Table
from diffcam_fast.explain import Logit, LogitDifference, Target
from diffcam_fast.reference.cam import METHODS
from diffcam_fast.robustness.fooling import PassiveFooling, Step
from diffcam_fast.robustness.fooling_losses import (
    ActiveLoss,
    CentreOfMassLoss,
    HoaxLoss,
    LocationLoss,
    MapLoss,
    TopKLoss,
)
from diffcam_fast.robustness.hoax import SalienceHoax

NAME = "fooling"
TITLE = "Passive fooling: networks trained to explain themselves falsely"
QUESTION = (
    "A network can be trained to decide as before while its maps become what an attacker wants (Heo, Joo and Moon, "
    '"Fooling Neural Network Interpretations via Adversarial Model Manipulation", NeurIPS 2019). Piland, Sweet and '
    'Czajka ("DiffGradCAM: A Universal Class Activation Map Resistant to Adversarial Training", 2025, '
    "arXiv:2506.08514) steer maps to a hoax with the entropy of the network's own maps, and hold that maps of logit "
    "differences are not taken in by such training and match Grad-CAM where nobody attacks. They leave open what the "
    "rivals' logits are folded by, so every baseline is tried here; and so is the attacker whom they leave out, who "
    "trains against the difference map itself."
)

Track = Callable[[Iterable[int]], Iterator[int]]

SEEDS = 3
LOGIT, DIFFERENCE = "logit", "difference, logsumexp"
#: "Matches": at least so much of Pearson's correlation and of SSIM. "Not steered": at most this share of what the
#: attacked single-logit map was.
MATCH, UNMOVED = 0.9, 0.1
ACCURACY_POINTS, HOAX_SSIM = 2.0, 0.7


@dataclass(frozen=True)
class Attack:
    """What is trained: a loss of maps of a target by a method."""

    loss: str
    target: str
    method: str = "gradcam"

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.loss}, {self.target}, {self.method}"


ON_LOGIT, ON_DIFFERENCE = Attack("hoax", LOGIT), Attack("hoax", DIFFERENCE)
ATTACKS = (
    ON_LOGIT,
    ON_DIFFERENCE,
    Attack("hoax", LOGIT, "gradcam++"),
    Attack("location", LOGIT),
    Attack("top-k", LOGIT),
    Attack("centre of mass", LOGIT),
    Attack("active", LOGIT),
)
#: For the small network, on which they cost little.
MORE_ATTACKS = (Attack("hoax", "difference, expected"), Attack("hoax", "difference, max"))
TARGETS: dict[str, Target] = {
    name: target for name, target in EXPLAINED.items() if isinstance(target, Logit | LogitDifference)
}


@dataclass(frozen=True)
class Result:
    """A task with what came of each attack on it."""

    task: Task
    hoax: SalienceHoax
    clean: Explained
    outcomes: dict[Attack, Outcome]

    def rise(self, attack: Attack, key: Key) -> Tensor:
        """How much more like the hoax each image's map became by SSIM, mean over seeds."""
        before = self.unattacked[key]["SSIM to hoax"]
        return self.outcomes[attack].measures[key]["SSIM to hoax"].mean(0) - before

    @cached_property
    def unattacked(self) -> dict[Key, dict[str, Tensor]]:
        """The measures of the clean network's maps, by explanation."""
        return similarities(self.clean.maps, self.clean.maps, self.hoax.map)


def run(settings: Settings) -> Findings:
    """Train every attack for every seed and look at what all explanations make of it."""
    results = [study_task(task, settings) for task in load_tasks(settings)]
    return Findings(
        [outputs_table(results), maps_table(results), clean_table(results), all_maps_table(results)],
        [
            *(grid_figure(result, [ON_LOGIT, ON_DIFFERENCE], LOGIT, DIFFERENCE) for result in results),
            steered_figure(results, [ON_LOGIT, ON_DIFFERENCE]),
            clean_figure(results),
        ],
        claims(results),
        details(results, settings),
    )


def attacks_on(task: Task, settings: Settings) -> tuple[Attack, ...]:
    """Which attacks a run tries: the small network stands for all where little time is given."""
    small = "small" in task.name
    if settings.quick:
        return (ON_LOGIT, ON_DIFFERENCE) if small else (ON_LOGIT,)
    if task.name.startswith("photos"):
        return (ON_LOGIT, ON_DIFFERENCE)
    return ATTACKS + MORE_ATTACKS if small else ATTACKS


def study_task(task: Task, settings: Settings) -> Result:
    """All attacks on one network."""
    hoax = task.hoax(settings.device)
    clean = explain(task.model, task.layer, task.test, task.test_labels.unsqueeze(1), settings.device)
    losses: dict[str, Callable[[], MapLoss]] = {
        "hoax": lambda: HoaxLoss(hoax),
        "location": LocationLoss,
        "top-k": TopKLoss,
        "centre of mass": CentreOfMassLoss,
        "active": lambda: ActiveLoss(*task.pair),
    }
    outcomes = {}
    for number, attack in enumerate(attacks_on(task, settings)):
        networks, steps = [], []
        for seed in range(1 if settings.quick else SEEDS):
            fooling = PassiveFooling(
                task.model,
                task.layer,
                losses[attack.loss](),
                TARGETS[attack.target],
                attack.method,
                strength=task.training.strength,
                optimizer=partial(torch.optim.Adam, lr=task.training.rate),
            )
            pair = task.pair if attack.loss == "active" else None
            batches = task.batches(settings.device, settings.generator(100 * number + seed), pair)
            label = f"{task.name}: {attack.name}, seed {seed + 1}"
            steps.append(train(fooling, task, batches, partial(settings.track, what=label)))
            networks.append(fooling)
        outcomes[attack] = attacked(task, clean, hoax.map, losses[attack.loss](), networks, steps)
    return Result(task, hoax, clean, outcomes)


def train(fooling: PassiveFooling, task: Task, batches: Iterator[tuple[Tensor, Tensor]], shown: Track) -> list[Step]:
    """All steps of an attack, with a learning rate that falls to a twentieth."""
    steps = task.training.steps
    schedule = torch.optim.lr_scheduler.LinearLR(fooling.optimizer, 1.0, 0.05, steps)
    found = []
    for _ in shown(range(steps)):
        found.append(fooling.step(*next(batches)))
        schedule.step()
    return found


def outputs_table(results: list[Result]) -> Table:
    """What the attacks did to the outputs."""
    rows: list[dict[str, Cell]] = []
    for result in results:
        before = result.clean.correct(result.task.test_labels).double()
        for attack, found in result.outcomes.items():
            change = mean_interval(100 * (found.correct.mean(0) - before))
            first, last = found.training[0]
            rows.append(
                {
                    "task": result.task.name,
                    "attack": attack.name,
                    "accuracy clean (%)": 100 * float(before.mean()),
                    "accuracy fooled (%)": 100 * float(found.correct.mean()),
                    **change.cells("change (points)"),
                    "worst seed (points)": 100 * float((found.correct.mean(1) - before.mean()).min()),
                    "same prediction (%)": 100 * float(found.agrees.mean()),
                    **mean_interval(found.moved.mean(0)).cells("total variation"),
                    "map loss, first step": first.map_loss,
                    "map loss, last step": last.map_loss,
                    "images": change.count,
                    "seeds": len(found.correct),
                }
            )
    formats = {column: ".1f" for column in rows[0] if "(" in column}
    formats |= {column: ".3f" for column in rows[0] if "variation" in column or "loss" in column}
    note = (
        "Test images, none of which was trained on. Intervals: 95 %, over images, each the mean of its seeds. Total "
        "variation: half the sum of the changes of an image's probabilities. Map losses are those of the training of "
        "the first seed."
    )
    return Table("outputs", "What the attacks did to the outputs", rows, note, formats)


def maps_table(results: list[Result]) -> Table:
    """What they did to the maps of Grad-CAM and Grad-CAM++."""
    rows: list[dict[str, Cell]] = []
    for result in results:
        for attack, found in result.outcomes.items():
            for method in dict.fromkeys(("gradcam", attack.method)):
                for name in EXPLAINED:
                    key = name, method
                    rows.append(
                        {
                            "task": result.task.name,
                            "attack": attack.name,
                            "method": method,
                            "explanation": name,
                            "attack's loss clean": float(found.unattacked[key].mean()),
                            "attack's loss fooled": float(found.reached[key].mean()),
                            "SSIM to hoax clean": float(result.unattacked[key]["SSIM to hoax"].mean()),
                            **found.interval(key, "SSIM to hoax").cells("SSIM to hoax"),
                            **found.interval(key, "SSIM to clean").cells("SSIM to clean"),
                            **found.interval(key, "Pearson to clean").cells("Pearson to clean"),
                        }
                    )
    formats = {column: ".2f" for column in rows[0] if "SSIM" in column or "Pearson" in column}
    formats |= {column: ".3f" for column in rows[0] if "loss" in column}
    note = (
        "Maps of each test image's label. The attack's loss: what the training lowers, here of each explanation's maps "
        "(negative for the centre of mass: how far it moved). SSIM to clean: with the same explanation of the network "
        "before the attack. Intervals as above. All methods and measures are in the last table."
    )
    return Table("maps", "What the attacks did to the maps", rows, note, formats)


def all_maps_table(results: list[Result]) -> Table:
    """Every measure of every explanation, with intervals over images and over seeds."""
    rows: list[dict[str, Cell]] = []
    for result in results:
        for attack, found in result.outcomes.items():
            for name in EXPLAINED:
                for method in METHODS:
                    key = name, method
                    seeds = found.over_seeds(key, "SSIM to hoax")
                    row: dict[str, Cell] = {
                        "task": result.task.name,
                        "attack": attack.name,
                        "explanation": name,
                        "method": method,
                    }
                    for measure in MEASURES:
                        row |= found.interval(key, measure).cells(measure)
                    row["entropy clean (nats)"] = float(result.unattacked[key]["entropy"].nanmean())
                    row |= found.interval(key, "entropy").cells("entropy (nats)")
                    row["empty maps (%)"] = 100 * float(found.measures[key]["entropy"].isnan().double().mean())
                    row |= {"SSIM to hoax, seeds low": seeds.low, "SSIM to hoax, seeds high": seeds.high}
                    rows.append(row | {"images": len(result.task.test), "seeds": seeds.count})
    numbers = [column for column, cell in rows[0].items() if isinstance(cell, float)]
    note = "As above. Empty maps correlate with nothing and have no entropy; they are left out there."
    return Table("all-maps", "All methods, all explanations", rows, note, dict.fromkeys(numbers, ".3f"))


def clean_table(results: list[Result]) -> Table:
    """How alike explanations are where nobody attacked."""
    rows: list[dict[str, Cell]] = []
    for result in results:
        for method in METHODS:
            for name in EXPLAINED:
                if name == LOGIT:
                    continue
                found = clean_likeness(result.clean, method, name)
                row: dict[str, Cell] = {"task": result.task.name, "method": method, "explanation": name}
                for measure, interval in found.items():
                    row |= interval.cells(measure)
                rows.append(row | {"images": found["SSIM"].count})
    formats = {column: ".3f" for column in rows[0] if "Pearson" in column or "SSIM" in column}
    note = "Each explanation's maps beside those of single logits by the same method, before any attack."
    return Table("clean", "Does the difference match Grad-CAM where nobody attacks?", rows, note, formats)


def claims(results: list[Result]) -> list[Claim]:
    """The bars, and what the paper claims."""
    found = []
    for result in results:
        if result.task.name.startswith("CIFAR"):
            found += bars(result)
    for result in results:
        found += steering(result)
    for method in ("gradcam", "gradcam++"):
        found.append(matching(results, method))
    return found


def bars(result: Result) -> list[Claim]:
    """What we ask of the hoax on CIFAR-10."""
    found = result.outcomes[ON_LOGIT]
    before = float(result.clean.correct(result.task.test_labels).double().mean())
    worst = 100 * float((found.correct.mean(1) - before).min())
    reached = found.interval((LOGIT, "gradcam"), "SSIM to hoax")
    start = float(result.unattacked[LOGIT, "gradcam"]["SSIM to hoax"].mean())
    kept = reached.mean >= HOAX_SSIM
    training = result.task.training
    why = "" if kept else f" Training was stopped after {training.steps} steps of {training.batch} images."
    return [
        Claim(
            f"The ResNet-18 fooled by the hoax keeps its accuracy within {ACCURACY_POINTS:g} points.",
            worst >= -ACCURACY_POINTS,
            f"{100 * before:.1f} % before, {100 * float(found.correct.mean()):.1f} % after on {len(result.task.test)} "
            f"test images; the seed that lost most: {worst:+.1f} points.",
        ),
        Claim(
            f"Its single-logit Grad-CAM's similarity to the hoax rises to at least {HOAX_SSIM} SSIM.",
            kept,
            f"From {start:.2f} to {reached}, test images.{why}",
        ),
    ]


def steering(result: Result) -> list[Claim]:
    """Whether difference maps are taken in, by the usual attacker and by one who aims at them."""
    where = f"{result.task.name}: "
    target = result.rise(ON_LOGIT, (LOGIT, "gradcam"))
    limit = UNMOVED * float(target.mean())
    usual = mean_interval(result.rise(ON_LOGIT, (DIFFERENCE, "gradcam")))
    others = ", ".join(
        f"{name.removeprefix('difference, ')} {float(result.rise(ON_LOGIT, (name, 'gradcam')).mean()):+.2f}"
        for name in DIFFERENCES
    )
    alike = result.outcomes[ON_LOGIT].interval((DIFFERENCE, "gradcam"), "SSIM to clean")
    less = mean_interval(target - result.rise(ON_LOGIT, (DIFFERENCE, "gradcam")))
    found = [
        Claim(
            f"{where}a network trained to show a hoax in its single-logit maps does not show it in its difference maps "
            "(Piland et al. 2025).",
            usual.high <= limit if usual.count > 1 else None,
            f"SSIM to the hoax rose by {mean_interval(target)} for the logit and by {usual} for the logsumexp "
            f"difference; by baseline: {others}. A tenth of the logit's rise at most would count as not showing it. "
            f"SSIM of the difference's map to what it was in the clean network: {alike}.",
        ),
        Claim(
            f"{where}such a network shows the hoax less in its difference maps than in its single-logit maps.",
            less.low > 0 if less.count > 1 else None,
            f"The logit's SSIM rose by {less} more, image by image, than the logsumexp difference's.",
        ),
    ]
    if ON_DIFFERENCE in result.outcomes:
        aimed = mean_interval(result.rise(ON_DIFFERENCE, (DIFFERENCE, "gradcam")))
        correct = result.outcomes[ON_DIFFERENCE].correct.mean()
        before = result.clean.correct(result.task.test_labels).double().mean()
        found.append(
            Claim(
                f"{where}a network trained to show the hoax in its difference maps does not show it there either (not "
                "tried by the paper).",
                aimed.high <= limit if aimed.count > 1 else None,
                f"After as much training its SSIM to the hoax rose by {aimed}, with "
                f"{100 * float(correct - before):+.1f} points of accuracy.",
            )
        )
    return found


def matching(results: list[Result], method: str) -> Claim:
    """Whether differences match the logit where nobody attacks."""
    parts, holds = [], True
    for result in results:
        by_name = {name: clean_likeness(result.clean, method, name) for name in DIFFERENCES}
        holds &= all(interval.mean >= MATCH for interval in by_name[DIFFERENCE].values())
        told = "; ".join(f"{name.removeprefix('difference, ')} {_both(found)}" for name, found in by_name.items())
        parts.append(f"{result.task.name} ({by_name[DIFFERENCE]['SSIM'].count} maps): {told}")
    shown = {"gradcam": "DiffGradCAM matches Grad-CAM", "gradcam++": "DiffGradCAM++ matches Grad-CAM++"}[method]
    return Claim(
        f"{shown} in the non-adversarial case (Piland et al. 2025).",
        holds,
        f"Pearson and SSIM by baseline, both at least {MATCH} for logsumexp on every task being a match. "
        + ". ".join(parts)
        + ".",
    )


def _both(found: dict[str, Interval]) -> str:
    return f"{found['Pearson'].mean:.2f} and {found['SSIM'].mean:.2f}"


def details(results: list[Result], settings: Settings) -> dict[str, Any]:
    """Sizes and hyper-parameters."""
    return {
        "batch norm": "in evaluation mode while the attacks are trained; scales and shifts are trained",
        "optimizer": "Adam, the learning rate falling to a twentieth",
        "seeds": 1 if settings.quick else SEEDS,
        "explained class": "the label",
        "tasks": {
            result.task.name: {
                "layer": result.task.layer,
                "map": list(result.hoax.size),
                "hoax": {"ones": result.hoax.count, "entropy_nats": result.hoax.entropy},
                "training images": len(result.task.train),
                "test images": len(result.task.test),
                "classes": len(result.task.names),
                "steps": result.task.training.steps,
                "images a step": result.task.training.batch,
                "learning rate": result.task.training.rate,
                "strength": result.task.training.strength,
                "share of parameters trained": result.task.share_trained,
                "pair of active fooling": list(result.task.pair),
            }
            for result in results
        },
    }
