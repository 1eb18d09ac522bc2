"""Small networks for comparisons with the installed originals."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CLASSES = 7


class Flat(nn.Module):
    """Convolutions, and a head that sees every position."""

    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        self.early = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU())
        self.late = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(5, 12, 3, padding=1), nn.BatchNorm2d(12))
        self.relu = nn.ReLU(in_place)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(12 * 6 * 5, 9), nn.Tanh(), nn.Linear(9, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.late(self.early(x))))


class Pooled(Flat):
    """The same with a mean over positions before one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(12, CLASSES))


class Volume(nn.Module):
    """Three spatial dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Conv3d(2, 6, 3, stride=2)
        self.head = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool3d(2), nn.Flatten(), nn.Linear(48, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.late(x))


class Tokens(nn.Module):
    """A transformer with a class token, on 4 x 4 patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.late = nn.LayerNorm(8)
        self.last = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.head(self.last(self.late(self.block(x)))[:, 0])


SHAPES = {Flat: (3, 12, 10), Pooled: (3, 12, 10), Volume: (2, 8, 9, 10), Tokens: (3, 16, 16)}


def make(kind: type[nn.Module], dtype: torch.dtype = torch.float32, **options: bool) -> nn.Module:
    """A network with seeded weights, in evaluation mode."""
    torch.manual_seed(3)
    network = kind(**options)
    # Activations of both signs make maps that are not all zeros.
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        network.train()(images(kind, 8))
    return network.to(dtype).eval()


def images(kind: type[nn.Module], count: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = next(shape for known, shape in SHAPES.items() if issubclass(kind, known))
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(5)).to(dtype)
