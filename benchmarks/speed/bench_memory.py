"""Memory of a process that explains one image after the other: it has to stay flat."""

from __future__ import annotations

import math
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import diffcam_fast as dcf
from benchmarks import figures
from benchmarks.report import Bar, Column, Report, Row, Table
from diffcam_fast.backends import serving

EXPLANATIONS = 100_000
SAMPLE_EVERY = 1_000
#: The first tenth fills PyTorch's and the allocator's caches.
WARM_UP_SHARE = 0.1
#: Less than 11 bytes an explanation: no Python object that is kept is that small.
LIMIT_KB = 1024

STATM = Path("/proc/self/statm")

INTRODUCTION = """\
A fresh process explains {count:,} images, one a call and one after the other, on a small convolutional network (two
convolutions with batch normalisation, a pooled linear head, 10 classes, images of 3 x 32 x 32), with a new
explanation each time and none kept. Resident memory is read from the kernel every {every:,} explanations. *Growth*:
slope of the least-squares line through the samples after the first {warm_up:,}, for 100,000 explanations;
*range*: largest less smallest of those samples. The {backend} backend serves, on one thread."""


def small_network() -> nn.Module:
    """Two convolutions and a pooled head, with seeded weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 10),
        ).eval()


def resident_kb() -> float:
    """Resident memory of this process, in KiB."""
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1024


def sample(explanations: int, every: int) -> tuple[list[Row], Row]:
    """Explain in a loop.

    Returns:
        The number of explanations so far and resident memory, from before the first one on; and what served.
    """
    # Work this small gains nothing from a second thread.
    torch.set_num_threads(1)
    network = small_network()
    explainer = dcf.Explainer(network, layers=network[5])
    images = torch.rand(16, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    # Made and touched beforehand: what the sampling itself keeps must not be taken for growth.
    resident = np.full(explanations // every + 1, math.nan)
    resident[0] = resident_kb()
    with tqdm(total=explanations, desc="memory", disable=None) as progress:
        for done in range(1, explanations + 1):
            explainer(images[done % len(images)])
            if done % every == 0:
                resident[done // every] = resident_kb()
                progress.update(every)
    samples = [{"explanations": every * index, "resident_kb": float(kb)} for index, kb in enumerate(resident)]
    return samples, {"backend": serving("cpu"), "threads": torch.get_num_threads()}


def summary(samples: list[Row]) -> Row:
    """What the samples after warm-up say."""
    explanations = samples[-1]["explanations"]
    settled = [row for row in samples if row["explanations"] >= WARM_UP_SHARE * explanations]
    counts = np.array([row["explanations"] for row in settled], dtype=np.float64)
    resident = np.array([row["resident_kb"] for row in settled])
    return {
        "explanations": explanations,
        "warm_up": settled[0]["explanations"],
        "samples": len(settled),
        "start_kb": samples[0]["resident_kb"],
        "settled_kb": settled[0]["resident_kb"],
        "end_kb": settled[-1]["resident_kb"],
        "range_kb": float(resident.max() - resident.min()),
        "growth_kb_per_100000": round(np.polyfit(counts, resident, 1)[0] * 100_000),
    }


def figure(samples: list[Row], found: Row) -> bytes:
    """Resident memory over explanations, as PNG."""
    picture, (axes,) = figures.empty()
    counts = [row["explanations"] / 1000 for row in samples]
    axes.plot(counts, [row["resident_kb"] / 1024 for row in samples], marker=".", markersize=3)
    axes.axvspan(0, found["warm_up"] / 1000, color="0.9", label="warm-up")
    axes.set(xlabel="thousand explanations", ylabel="resident memory (MiB)", xlim=(0, counts[-1]))
    axes.set_ylim(bottom=0, top=1.15 * max(row["resident_kb"] for row in samples) / 1024)
    axes.set_title(f"growth after warm-up: {found['growth_kb_per_100000']:+d} KiB per 100,000 explanations")
    axes.legend(loc="lower right")
    return figures.png(picture)


def run(quick: bool = False) -> Report:
    """Explain 100,000 images, or for `quick` a few hundred."""
    explanations, every = (200, 20) if quick else (EXPLANATIONS, SAMPLE_EVERY)
    # A process of its own: what earlier benchmarks freed stays resident, and growth would disappear in it.
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        samples, settings = fresh.submit(sample, explanations, every).result()
    return report(samples, settings, every)


def report(samples: list[Row], settings: Row, every: int) -> Report:
    """The samples as a report: one row with the summary, the samples in the JSON file, a figure."""
    found = summary(samples)
    caption = (
        f"Resident memory over {found['explanations']:,} explanations: {found['settled_kb'] / 1024:.0f} MiB after "
        f"warm-up, {found['end_kb'] / 1024:.0f} MiB at the end; growth {found['growth_kb_per_100000']:+d} KiB per "
        f"100,000 explanations, range {found['range_kb']:.0f} KiB."
    )
    columns = [
        Column("explanations", "explanations", ",d"),
        Column("warm-up", "warm_up", ",d"),
        Column("before the first, KiB", "start_kb", ".0f"),
        Column("after warm-up, KiB", "settled_kb", ".0f"),
        Column("at the end, KiB", "end_kb", ".0f"),
        Column("range, KiB", "range_kb", ".0f"),
        Column("growth, KiB per 100,000", "growth_kb_per_100000", "+.0f"),
    ]
    return Report(
        name="memory",
        title="Memory over many explanations",
        introduction=INTRODUCTION.format(
            count=found["explanations"],
            every=every,
            warm_up=found["warm_up"],
            backend=settings["backend"],
        ),
        rows=[found],
        tables=[Table("Resident memory", [found], columns)],
        bars=[
            Bar(
                f"growth after warm-up below {LIMIT_KB} KiB per 100,000 explanations",
                "growth_kb_per_100000",
                LIMIT_KB,
                applies=lambda row: row["explanations"] >= EXPLANATIONS,  # a smoke run is too short to judge
                show="+.0f",
            )
        ],
        label=lambda row: f"{row['explanations']:,} explanations",
        details={**settings, "samples": samples},
        figures={"memory.png": (caption, figure(samples, found))},
    )
