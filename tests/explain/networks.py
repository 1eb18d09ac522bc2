"""Small networks, each with a trait that makes explaining one hard. `tap` sees the outputs of the layers named."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 5


class Tapped(nn.Module):
    """A network that shows the outputs of its `layers` to `tap`: what an oracle needs in place of hooks."""

    layers: tuple[str, ...] = ("layer",)
    image_shape: tuple[int, ...] = (3, 12, 10)

    def tap(self, name: str, output: Tensor) -> Tensor:
        return output

    def images(self, count: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(count, *self.image_shape, dtype=dtype)


class PooledConvolutions(Tapped):
    """The usual: convolutions, batch norm, mean over positions, one linear layer."""

    layers = ("early", "layer")

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.layer = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6))
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tap("early", self.early(x))
        x = self.tap("layer", self.layer(x))
        return self.head(self.drop(x.mean((2, 3))))


class InPlaceAfter(Tapped):
    """An in-place ReLU right after the layer, then a head that sees every position."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 6, 3, stride=2)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(6 * 5 * 4, 7), nn.Tanh(), nn.Linear(7, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.tap("layer", self.layer(x))
        return self.head(functional.relu_(x))


class Residual(Tapped):
    """The layer's output is used twice, and added to in place; a further layer builds on it."""

    layers = ("layer", "late")

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 6, 3, padding=1)
        self.block = nn.Sequential(nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1))
        self.late = nn.Conv2d(6, 4, 3, stride=2)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tap("layer", self.layer(x))
        y = self.block(x)
        y += x
        x.relu_()
        y = self.tap("late", self.late(y + x))
        return self.head(y.tanh_().mean((-1, -2)))


class Branches(Tapped):
    """Two layers side by side, neither built on the other."""

    layers = ("left", "right")

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.left = nn.Conv2d(4, 3, 3)
        self.right = nn.Sequential(nn.Conv2d(4, 3, 3, stride=2), nn.GELU())
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        left = self.tap("left", self.left(x)).amax((2, 3))
        right = self.tap("right", self.right(x)).square().mean((2, 3))
        return self.head(torch.cat([left, right], 1))


class Aliased(Tapped):
    """The layer hands its own input on, and the network then changes that input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.layer = nn.Dropout(0.5)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.tap("layer", self.layer(x).clone() if self._oracle else self.layer(x))
        x.mul_(-3)
        return self.head(torch.cat([y.sin().mean((2, 3)), x.mean((2, 3))], 1))

    _oracle = False


class Signal(Tapped):
    """One spatial dimension; as many channels as positions as targets, whose gradients are easily mistaken."""

    image_shape = (2, 12)

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv1d(2, 3, 3, stride=4)
        self.head = nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tap("layer", self.layer(x))
        return self.head(x.mean(-1))


class Volume(Tapped):
    """Three spatial dimensions."""

    image_shape = (1, 6, 7, 8)

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv3d(1, 4, 3)
        self.head = nn.Sequential(nn.ReLU(inplace=True), nn.AdaptiveAvgPool3d(2), nn.Flatten())
        self.classifier = nn.Linear(4 * 8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.head(self.tap("layer", self.layer(x))))


class Tokens(Tapped):
    """A transformer with a class token."""

    layers = ("layer", "block.norm1")
    image_shape = (3, 16, 16)

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.block = Attention(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        x = self.tap("layer", self.layer(x))
        x = self.block(x, self.tap)
        return self.head(x[:, 0])


class Attention(nn.Module):
    """A pre-norm attention block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x: Tensor, tap: Callable[[str, Tensor], Tensor]) -> Tensor:
        y = tap("block.norm1", self.norm1(x))
        return x + self.attention(y, y, y, need_weights=False)[0]


NETWORKS = (PooledConvolutions, InPlaceAfter, Residual, Branches, Aliased, Signal, Volume, Tokens)


def make(kind: type[Tapped], dtype: torch.dtype = torch.float64) -> Tapped:
    """A network with seeded weights and batch-norm statistics, in evaluation mode."""
    torch.manual_seed(1)
    network = kind()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return network.to(dtype).eval()
