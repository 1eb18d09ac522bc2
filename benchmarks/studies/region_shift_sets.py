"""The sets of images of the region-shift study, each with the networks that are watched on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.studies import data
from benchmarks.studies.region_shift_networks import FITTED, Fit, Subject, fit_subject, inception_subject, real_subject
from benchmarks.studies.study import Settings

RESNET = "ResNet-50-like"
"""Whose attack is transferred to the other networks."""

_SHOTS = 10
_FACE_SIZE = 64
_INCEPTION_SIZE = 139


@dataclass(frozen=True)
class Watched:
    """Images, and the networks that are watched on them.

    Attributes:
        name: of the set, in tables.
        images: float32 (N, 3, H, W), from 0 to 1; no network was fitted to them.
        labels: int64 (N,).
        subjects: the networks.
    """

    name: str
    images: Tensor
    labels: Tensor
    subjects: list[Subject]


def faces(settings: Settings) -> Watched:
    """Faces of 40 people: half of each person's photos to fit the networks, half to watch them on."""
    found = data.faces(settings.cache)
    central = found.floats()[:, :, 10:102]
    images = F.interpolate(central, size=(_FACE_SIZE, _FACE_SIZE), mode="bilinear", antialias=True)
    shot = torch.arange(len(images)) % _SHOTS
    fitting, watching = shot < _SHOTS // 2, shot >= _SHOTS // 2
    epochs = 12 if settings.quick else 40
    how = Fit("faces", images[fitting], found.labels[fitting], 40, epochs, settings.seed, {"batch": 25})
    names = (RESNET, "Xception-like") if settings.quick else tuple(FITTED)
    subjects = [fit_subject(name, how, settings.cache) for name in names]
    if not settings.quick:
        subjects.append(inception_subject(how, _INCEPTION_SIZE, len(how.images), settings.cache))
    watched, labels = images[watching], found.labels[watching]
    if settings.quick:  # one photo of every other person
        watched, labels = watched[::10], labels[::10]
    return Watched("faces", watched, labels, subjects)


def cifar10(settings: Settings) -> Watched:
    """CIFAR-10's test images; networks fitted to a part of its training images, and one that others trained."""
    found = data.cifar10("test", settings.cache).first(24 if settings.quick else 200)
    resnet18, _ = real_subject("cifar_resnet18", settings.cache)
    subjects = []
    if not settings.quick:
        train = data.cifar10("train", settings.cache).first(10_000)
        how = Fit("cifar10", train.floats(), train.labels, 10, 3, settings.seed)
        subjects = [fit_subject(name, how, settings.cache) for name in FITTED]
        subjects.append(inception_subject(how, _INCEPTION_SIZE, 2000, settings.cache))
    return Watched("CIFAR-10", found.floats(), found.labels, [*subjects, resnet18])


def photos(name: str, settings: Settings) -> Watched:
    """Labelled photos, and one ImageNet network with its own weights."""
    subject, network = real_subject(name, settings.cache)
    found = data.photos(settings.cache, network.size)
    labelled = found.labels >= 0
    count = 4 if settings.quick else len(found)
    return Watched("photos", found.floats()[labelled][:count], found.labels[labelled][:count], [subject])
