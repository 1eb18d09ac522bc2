"""Explanations of adversarial images, before and after the softmax."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.studies import data, networks
from benchmarks.studies.adversarial_figures import overlap_figure, panel_figure
from benchmarks.studies.adversarial_maps import (
    ADVERSARIAL,
    METHODS,
    TARGETS,
    TRUE,
    Attacked,
    Sizes,
    Subject,
    decided,
    heat,
    overlap,
    study_network,
)
from benchmarks.studies.statistics import Interval, mean_interval
from benchmarks.studies.study import Cell, Claim, Figure, Findings, Settings, Table

NAME = "adversarial"
TITLE = "Adversarial images: explanations before and after the attack, from before and after the softmax"
QUESTION = (
    "An attack changes the decision and hardly the image. Where do Grad-CAM (Selvaraju et al., ICCV 2017) and "
    'integrated gradients (Sundararajan, Taly and Yan, "Axiomatic Attribution for Deep Networks", ICML 2017) then '
    "point, for the true and for the adversarial class, on the original and on the adversarial image, and does it "
    "matter whether a logit, a probability (the question of Lerma and Lucas, "
    '"Pre or Post-Softmax Scores in Gradient-based Attribution Methods, What is Best?", 2023, arXiv:2306.13197) or a '
    "difference of logits is explained? Attacks: FGSM, BIM and Carlini-Wagner L2, on networks of the MobileNet kind."
)

SHARES = (0.1, 0.2)
ATTACKS = ("FGSM", "BIM", "Carlini-Wagner")
PAIRS = (("logit", "probability"), ("logit", "difference"), ("probability", "difference"))
FULL = {
    "photos": Sizes(images=10, attacks=ATTACKS, strength=2 / 255, steps=16, attack_steps=30, search_steps=3),
    "cifar": Sizes(images=32, attacks=ATTACKS, strength=4 / 255, steps=16, attack_steps=40, search_steps=4),
}
QUICK = {
    "photos": Sizes(images=2, attacks=("BIM",), strength=2 / 255, steps=5, attack_steps=1, search_steps=1),
    "cifar": Sizes(images=3, attacks=ATTACKS, strength=4 / 255, steps=6, attack_steps=15, search_steps=2),
}


def run(settings: Settings) -> Findings:
    """See `QUESTION`."""
    all_sizes = QUICK if settings.quick else FULL
    subjects = []
    for name in (settings.network,) if settings.network else ("efficientnet_lite0", "mobilenet_v2_cifar"):
        network = networks.load(name, settings.cache)
        if name == "mobilenet_v2_cifar":
            found, sizes = data.cifar10("test", settings.cache), all_sizes["cifar"]
            chosen = torch.randperm(len(found), generator=settings.generator())[: 3 * sizes.images]
        else:
            found, sizes = data.photos(settings.cache, network.size), all_sizes["photos"]
            chosen = (found.labels >= 0).nonzero().flatten()
        images = found.images[chosen].float() / 255
        subjects.append(study_network(network, images, found.labels[chosen], sizes, settings))
    regions, softmax = region_rows(subjects), softmax_rows(subjects)
    complete = completeness_rows(subjects)
    shown = ".3f"
    tables = [
        Table(
            "attacks",
            "The attacks",
            attack_rows(subjects),
            "Of images that the network classifies correctly. Norms are means over the images where the attack "
            "succeeded, of pixels from 0 to 1; only those images are explained.",
            {"success": ".2f", "L2 norm": ".3f", "largest change (of 255)": ".2f"},
        ),
        Table(
            "confidences",
            "Confidences",
            confidence_rows(subjects),
            "Probability of the class on the image: mean with 95 % interval.",
            _formats(confidence_rows(subjects), shown),
        ),
        Table(
            "regions",
            "Overlap of important regions before and after the attack",
            regions,
            "Share of the most important pixels that two maps have in common: 1 is the same region, and the share "
            "itself what unrelated maps have. Important is what speaks for the class most; by magnitude: for or "
            "against it. Mean with 95 % interval.",
            _formats(regions, shown),
        ),
        Table(
            "softmax",
            "Overlap of important regions: from logits, probabilities and differences",
            softmax,
            "As above, of two maps of one class on one image. The difference is the logit less the logsumexp of all "
            "others, of whose gradient the probability's is a positive multiple.",
            _formats(softmax, shown),
        ),
        Table(
            "completeness",
            "Completeness of integrated gradients",
            complete,
            "Attributions should add up to the score's rise from the black image. Error: how far they are from it, as "
            "a share of that rise, which is large where the rise is next to nothing, as a probability's often is; "
            "median over all integrations, and the largest tenth.",
            {"error, median": ".3f", "error, 90th percentile": ".3f", "rise, mean": ".3f"},
        ),
    ]
    figures = [overlap_figure(regions, [str(row["attack"]) for row in attack_rows(subjects)])]
    for subject in subjects:
        figures += panels(subject, 1 if settings.quick else 2, QUICK if settings.quick else FULL)
    details = {
        "networks": {subject.network.name: {"images": len(subject.images)} for subject in subjects},
        "sizes": {name: vars(sizes) for name, sizes in all_sizes.items()},
        "baseline": "black",
        "shares": SHARES,
    }
    return Findings(tables, figures, claims(subjects, regions, softmax, complete), details)


def _formats(rows: Sequence[dict[str, Cell]], shown: str) -> dict[str, str]:
    return {name: shown for row in rows for name, cell in row.items() if isinstance(cell, float) and name != "share"}


def attack_rows(subjects: Sequence[Subject]) -> list[dict[str, Cell]]:
    """How often each attack succeeded, and with how much."""
    return [
        {
            "network": subject.network.name,
            "attack": one.name,
            "images": len(subject.images),
            "succeeded": len(one.kept),
            "success": len(one.kept) / len(subject.images),
            "L2 norm": mean_interval(one.result.l2[one.kept]).mean,
            "largest change (of 255)": 255 * mean_interval(one.result.linf[one.kept]).mean,
        }
        for subject in subjects
        for one in subject.attacks
    ]


def confidence_rows(subjects: Sequence[Subject]) -> list[dict[str, Cell]]:
    """Probabilities of both classes on both images."""
    rows: list[dict[str, Cell]] = []
    for subject in subjects:
        for one in subject.attacks:
            for column, kind in enumerate((TRUE, ADVERSARIAL)):
                row: dict[str, Cell] = {"network": subject.network.name, "attack": one.name, "class": kind}
                for place, image in enumerate(("original image", "adversarial image")):
                    row |= mean_interval(one.confidences[:, place, column]).cells(image)
                rows.append(row)
    return rows


def region_rows(subjects: Sequence[Subject]) -> list[dict[str, Cell]]:
    """Overlaps before and after, for each network, attack, method, target and share."""
    rows: list[dict[str, Cell]] = []
    for subject in subjects:
        for one in subject.attacks:
            for method in METHODS:
                for target in TARGETS:
                    for share in SHARES:
                        row: dict[str, Cell] = {"network": subject.network.name, "attack": one.name, "method": method}
                        row |= {"target": target, "share": share, "images": len(one.kept)}
                        for what, before, after in decided(one, subject, method, target):
                            row |= mean_interval(overlap(before, after, share)).cells(what)
                        rows.append(row)
    return rows


def softmax_rows(subjects: Sequence[Subject]) -> list[dict[str, Cell]]:
    """Overlaps of one method's maps from different targets."""
    rows: list[dict[str, Cell]] = []
    for subject in subjects:
        for method in METHODS:
            for image, kind, maps in _maps_of(subject, method):
                for share in SHARES:
                    row: dict[str, Cell] = {"network": subject.network.name, "method": method, "image": image}
                    row |= {"class": kind, "share": share}
                    for one, other in PAIRS:
                        row |= mean_interval(overlap(maps(one), maps(other), share)).cells(f"{one} and {other}")
                    rows.append(row)
    return rows


def _maps_of(subject: Subject, method: str) -> list[tuple[str, str, Callable[[str], Tensor]]]:
    found: list[tuple[str, str, Callable[[str], Tensor]]] = [
        ("original", TRUE, lambda target: subject.maps[method, target])
    ]

    def of(one: Attacked, kind: str) -> Callable[[str], Tensor]:
        return lambda target: one.maps[method, target, kind]

    return found + [(one.name, kind, of(one, kind)) for one in subject.attacks for kind in (TRUE, ADVERSARIAL)]


def completeness_rows(subjects: Sequence[Subject]) -> list[dict[str, Cell]]:
    """Errors of the integration, as a share of the score's rise."""
    rows: list[dict[str, Cell]] = []
    for subject in subjects:
        for target, pairs in subject.completeness.items():
            error, rise = torch.tensor(pairs, dtype=torch.float64).unbind(1)
            shares = error.abs() / rise.abs()
            row: dict[str, Cell] = {"network": subject.network.name, "target": target, "integrations": len(pairs)}
            row |= {"error, median": float(shares.median()), "error, 90th percentile": float(shares.quantile(0.9))}
            rows.append(row | {"rise, mean": float(rise.mean())})
    return rows


def panels(subject: Subject, count: int, all_sizes: dict[str, Sizes]) -> list[Figure]:
    """Panels of the first images on which the last attack succeeded."""
    one = next((found for found in reversed(subject.attacks) if len(found.kept)), None)
    if one is None:
        return []
    steps = all_sizes["photos"].steps
    figures = []
    for place in range(min(count, len(one.kept))):
        index = int(one.kept[place])
        original, classes = subject.images[index : index + 1], one.classes[place]
        rows = []
        for method in METHODS:
            before, after = [], []
            for target in TARGETS:
                other = heat(subject.network, method, target, original, classes[1:], steps)[0][0]
                before += [subject.maps[method, target][index], other]
                after += [one.maps[method, target, kind][place] for kind in (TRUE, ADVERSARIAL)]
            rows += [(f"{method}\noriginal image", before), (f"{method}\nadversarial image", after)]
        names = [subject.network.labels[int(chosen)] for chosen in classes]
        told = [[f"{float(p):.2f}" for p in line] for line in one.confidences[place]]
        caption = (
            f"{subject.network.name}, {one.name}. True class {names[0]}: probability {told[0][0]}, after the attack "
            f"{told[1][0]}. Adversarial class {names[1]}: {told[0][1]}, after the attack {told[1][1]}. The "
            f"perturbation is shown around grey, {float(one.result.linf[index]) * 255:.1f} of 255 at most. Red: "
            "evidence for the class, blue: against it."
        )
        figures.append(
            panel_figure(
                f"panel-{subject.network.name}-{place + 1}".replace("torchvision:", ""),
                f"{subject.network.name}: {names[0]} becomes {names[1]}",
                caption,
                (original[0], one.result.images[index]),
                [f"{target}\n{kind}" for target in TARGETS for kind in ("true class", "adversarial class")],
                rows,
            )
        )
    return figures


def pooled(subjects: Sequence[Subject], measure: Callable[[Subject, Attacked], Tensor]) -> Interval:
    """Mean over all images of the networks, each counted once: with its mean over the attacks that succeeded."""
    each = []
    for subject in subjects:
        found = torch.full((len(subject.images), len(subject.attacks)), torch.nan)
        for number, one in enumerate(subject.attacks):
            found[one.kept.cpu(), number] = measure(subject, one).cpu()
        each.append(found.nanmean(1))
    return mean_interval(torch.cat(each))


def claims(
    subjects: Sequence[Subject],
    regions: Sequence[dict[str, Cell]],
    softmax: Sequence[dict[str, Cell]],
    complete: Sequence[dict[str, Cell]],
) -> list[Claim]:
    """What came out, in words."""
    share = SHARES[0]

    def kept_region(method: str, target: str) -> Interval:
        return pooled(subjects, lambda s, one: overlap(*decided(one, s, method, target)[0][1:], share))

    def moved(method: str, target: str) -> Interval:
        return pooled(subjects, lambda s, one: overlap(*decided(one, s, method, target)[1][1:], share))

    def magnitude(method: str, target: str) -> Interval:
        return pooled(subjects, lambda s, one: overlap(*decided(one, s, method, target)[3][1:], share))

    def between(method: str, one: str, other: str) -> Interval:
        maps = [(s.maps[method, one], s.maps[method, other]) for s in subjects]
        return mean_interval(torch.cat([overlap(*pair, share) for pair in maps]))

    stayed = {(method, target): kept_region(method, target) for method in METHODS for target in TARGETS}
    by_magnitude = {(method, target): magnitude(method, target) for method in METHODS for target in TARGETS}
    before = pooled(subjects, lambda s, one: one.confidences[:, 0, 0])
    after = pooled(subjects, lambda s, one: one.confidences[:, 1, 1])
    pre_post = {method: between(method, "logit", "probability") for method in METHODS}
    same = {method: between(method, "probability", "difference") for method in METHODS}
    cam, path = METHODS
    worst = max(complete, key=lambda row: float(row["error, median"] or 0))
    return [
        Claim(
            "Adversarial images are classified with as much confidence as the originals.",
            after.mean >= before.low,
            f"Probability of the decision: {after} on adversarial images, {before} on the originals.",
        ),
        Claim(
            "An attack leaves Grad-CAM of the true class where it was: more than half of the top tenth of pixels stay.",
            all(stayed[cam, target].low > 0.5 for target in TARGETS),
            "Overlap "
            + "; ".join(f"{stayed[cam, target]} ({target})" for target in TARGETS)
            + "; by magnitude "
            + "; ".join(f"{by_magnitude[cam, target]} ({target})" for target in TARGETS)
            + ". By magnitude, evidence against the class counts as much as evidence for it.",
        ),
        Claim(
            "Integrated gradients lose more of the region than Grad-CAM.",
            all(stayed[path, target].high < stayed[cam, target].low for target in TARGETS),
            "Overlap "
            + "; ".join(f"{stayed[path, target]} ({target})" for target in TARGETS)
            + f", where {share:g} is chance: single pixels, beside maps of a few large cells.",
        ),
        Claim(
            "The explanation of the wrong decision points somewhere else than that of the right one did.",
            all(moved(method, target).high < 0.5 for method in METHODS for target in TARGETS),
            "Overlap of the decision's map before and after: "
            + "; ".join(f"{moved(method, target)} ({method}, {target})" for method in METHODS for target in TARGETS)
            + ".",
        ),
        Claim(
            "It matters whether a score from before or after the softmax is explained: less than 0.9 of the region is "
            "shared.",
            all(found.high < 0.9 for found in pre_post.values()),
            "Overlap of logit and probability on the original images: "
            + "; ".join(f"{found} ({method})" for method, found in pre_post.items())
            + ".",
        ),
        Claim(
            "Grad-CAM points at the same region from the probability and from the logsumexp difference.",
            same[cam].low > 0.99,
            f"Overlap {same[cam]}. For integrated gradients, where the factor changes on the way, it is {same[path]}.",
        ),
        Claim(
            "Integrated gradients add up to within a tenth of the score's rise.",
            float(worst["error, median"] or 0) <= 0.1,
            "Median error "
            + "; ".join(f"{row['error, median']:.3f} ({row['network']}, {row['target']})" for row in complete)
            + ".",
        ),
    ]
