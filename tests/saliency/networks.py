"""Small networks for tests of saliency, and what has to be found as it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 5


class Plain(nn.Module):
    """ReLU modules, each used once: what captum's guided back-propagation is made for."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3), nn.ReLU()
        )
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Mixed(nn.Module):
    """Every form of ReLU: a module used twice, functions, in place, ReLU6, clamps; and others that are none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3)
        self.again, self.six = nn.ReLU(inplace=True), nn.ReLU6()
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(0.1)  # in place on what it was given
        x = self.again(self.first(x))
        y = self.six(self.again(self.second(x) - 0.1) * 3)
        y = functional.relu(y - 0.2) + (y - 0.1).clamp(min=0) + functional.relu6(y - 0.3, inplace=True)
        y = y + torch.nn.functional.hardtanh(y) + functional.leaky_relu(y - 1)
        return self.head(y.relu_().mean((2, 3)))


def make(kind: type[nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    """One with its own weights, in training mode: what explains it has to do without."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = kind()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.3, 0.3)
                module.running_var.uniform_(0.5, 2)
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.weight.mul_(2)
    return model.to(dtype).train()


def images(count: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    """Of the size that they take."""
    return torch.randn(count, 3, 11, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def state(model: nn.Module) -> dict[str, Any]:
    """All of a model that an explanation must not change, and the state of the random number generator."""
    return {
        "parameters": [(value.detach().clone(), value.grad, value.requires_grad) for value in model.parameters()],
        "buffers": [value.clone() for value in model.buffers()],
        "flags": [module.training for module in model.modules()],
        "hooks": [
            (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
            for module in model.modules()
        ],
        "modules": [id(module) for module in model.modules()],
        "random": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
    }


def assert_same(found: Any, expected: Any) -> None:
    """Equality of what `state` returns."""
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected
