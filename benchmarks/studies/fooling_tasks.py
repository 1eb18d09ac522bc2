"""What passive fooling is tried on: a network, images to train the attack with, and others to look at its maps on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.studies import data, networks
from benchmarks.studies.data_store import arrays
from benchmarks.studies.study import Settings
from diffcam_fast.explain import Explainer, Logit
from diffcam_fast.robustness.hoax import SalienceHoax

_FACES = {"size": 56, "shots": 6, "steps": 220, "batch": 32, "rate": 4e-3, "decay": 1e-2, "seed": 0, "form": 1}
_ENTROPY_IMAGES = 200


@dataclass(frozen=True)
class Training:
    """How an attack is trained: steps of Adam, images a step, learning rate, and the map loss's factor."""

    steps: int
    batch: int
    rate: float
    strength: float


@dataclass(frozen=True)
class Task:
    """A classification task and its network.

    Attributes:
        name: short, for tables.
        model: in eval mode; images from 0 to 1 to logits.
        layer: dotted name of the explained layer.
        train: uint8 (N, 3, H, W), for the attacks.
        train_labels: int64 (N,).
        test: others, that are measured on.
        test_labels: int64, of the test images.
        names: of the classes.
        mirrored: whether training images are turned left to right at random.
        pair: two of the classes, for active fooling.
        training: of the attacks.
    """

    name: str
    model: nn.Module
    layer: str
    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    names: tuple[str, ...]
    mirrored: bool
    pair: tuple[int, int]
    training: Training

    def batches(
        self, device: torch.device, generator: torch.Generator, pair: tuple[int, int] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Training batches without end; with a pair of classes, half of each batch shows one of them."""
        everywhere = torch.arange(len(self.train))
        if pair is not None:
            of_pair = everywhere[(self.train_labels == pair[0]) | (self.train_labels == pair[1])]
        while True:
            chosen = _drawn(everywhere, self.training.batch, generator)
            if pair is not None:
                half = self.training.batch // 2
                chosen = torch.cat([chosen[half:], _drawn(of_pair, half, generator)])
            images = self.train[chosen]
            if self.mirrored:
                turned = torch.rand(len(chosen), generator=generator) < 0.5
                images = torch.where(turned[:, None, None, None], images.flip(3), images)
            yield (images.float() / 255).to(device), self.train_labels[chosen].to(device)

    @property
    def share_trained(self) -> float:
        """The share of the network's parameters that attacks train."""
        counts = [(parameter.numel(), parameter.requires_grad) for parameter in self.model.parameters()]
        return sum(count for count, trained in counts if trained) / sum(count for count, _ in counts)

    def hoax(self, device: torch.device) -> SalienceHoax:
        """The hoax of the size and mean entropy of the network's own Grad-CAM maps of single logits."""
        images = (self.train[:_ENTROPY_IMAGES].float() / 255).to(device)
        labels = self.train_labels[:_ENTROPY_IMAGES]
        explainer = Explainer(self.model, self.layer, target=Logit(), size=None)
        maps = [
            explainer(part, wanted).layer_maps[self.layer]
            for part, wanted in zip(images.split(50), labels.split(50), strict=True)
        ]
        return SalienceHoax.like(torch.cat(maps))


def _drawn(indices: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return indices[torch.randint(len(indices), (count,), generator=generator)]


def load_tasks(settings: Settings) -> list[Task]:
    """The tasks of a run: CIFAR-10 and the faces, at full size photos too; photos alone for a network of one's own."""
    if settings.network is not None:
        return [_photos(settings, settings.network)]
    tasks = [_cifar(settings), _faces(settings)]
    return tasks if settings.quick else [*tasks, _photos(settings, "efficientnet_lite0")]


def _cifar(settings: Settings) -> Task:
    network = networks.load("cifar_resnet18", settings.cache)
    train, test = data.cifar10("train", settings.cache), data.cifar10("test", settings.cache)
    count = 80 if settings.quick else 500
    model = network.model.requires_grad_()
    # The attack trains the later half alone: its maps become the hoax sooner, and its accuracy suffers less.
    for name in ("conv1", "bn1", "layer1", "layer2"):
        model.get_submodule(name).requires_grad_(False)
    return Task(
        "CIFAR-10, ResNet-18",
        model.to(settings.device),
        network.layer,
        train.images,
        train.labels,
        test.images[:count],
        test.labels[:count],
        network.labels,
        True,
        (3, 5),  # cats and dogs
        Training(30 if settings.quick else 90, 32, 1.8e-4, 10.0),
    )


def _faces(settings: Settings) -> Task:
    faces = data.faces(settings.cache)
    size = int(_FACES["size"])
    images = F.interpolate(faces.images.float(), (size, size), mode="bilinear", antialias=True).round().to(torch.uint8)
    is_train = torch.arange(len(images)) % 10 < _FACES["shots"]
    model = _faces_network(len(faces.names))
    recipe = {**_FACES, "network": str(model), "torch": torch.__version__}
    state = arrays(
        settings.cache,
        "faces_network",
        recipe,
        lambda: _fit_faces(model, images[is_train], faces.labels[is_train], settings),
    )
    model.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
    return Task(
        "40 faces, small network",
        model.eval().requires_grad_().to(settings.device),
        "layer",
        images[is_train],
        faces.labels[is_train],
        images[~is_train],
        faces.labels[~is_train],
        faces.names,
        True,
        (0, 1),
        Training(50 if settings.quick else 200, 32, 2e-3, 20.0),
    )


def _faces_network(class_count: int) -> nn.Sequential:
    """Four convolutions and a mean; the layer to explain has 7 x 7 positions."""
    trunk: list[nn.Module] = []
    channels = 3
    for outputs in (16, 32, 64):
        trunk += [_convolution(channels, outputs), nn.MaxPool2d(2)]
        channels = outputs
    model = nn.Sequential()
    model.add_module("trunk", nn.Sequential(*trunk))
    model.add_module("layer", _convolution(channels, 96))
    model.add_module("pool", nn.AdaptiveAvgPool2d(1))
    model.add_module("flatten", nn.Flatten())
    model.add_module("linear", nn.Linear(96, class_count))
    return model


def _convolution(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


def _fit_faces(model: nn.Sequential, images: Tensor, labels: Tensor, settings: Settings) -> Mapping[str, np.ndarray]:
    steps, rate = int(_FACES["steps"]), float(_FACES["rate"])
    generator = torch.Generator().manual_seed(int(_FACES["seed"]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(_FACES["seed"]))
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
                module.reset_parameters()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=float(_FACES["decay"]))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps)
    for _ in settings.track(range(steps), "fitting a network to the faces"):
        chosen = torch.randint(len(images), (int(_FACES["batch"]),), generator=generator)
        down, across, mirrored = torch.randint(-3, 4, (3,), generator=generator).tolist()
        batch = torch.roll(images[chosen].float() / 255, (down, across), (2, 3))
        batch = batch.flip(3) if mirrored > 0 else batch
        loss = F.cross_entropy(model(batch), labels[chosen], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return {name: value.numpy() for name, value in model.eval().state_dict().items()}


def _photos(settings: Settings, name: str) -> Task:
    network = networks.load(name, settings.cache)
    photos = data.photos(settings.cache, network.size)
    model = network.model.to(settings.device)
    with torch.no_grad():
        predicted = torch.cat([model((part.float() / 255).to(settings.device)) for part in photos.images.split(8)])
    labels = torch.where(photos.labels >= 0, photos.labels, predicted.argmax(1).cpu())
    # Every other photo: those that come first are of another source than those that come last.
    is_train = torch.arange(len(labels)) % 2 == 0
    return Task(
        f"photos, {name}",
        model.requires_grad_(),
        network.layer,
        photos.images[is_train],
        labels[is_train],
        photos.images[~is_train],
        labels[~is_train],
        network.labels,
        True,
        (int(labels[is_train][0]), int(labels[is_train][1])),
        Training(10 if settings.quick else 60, 6, 1e-4, 10.0),
    )
