"""Which modules are put into evaluation mode, and for how long."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn

from diffcam_fast.explain import evaluation
from diffcam_fast.explain.evaluation import evaluating


class Flagless(nn.Module):
    """A module whose flag is not among its attributes."""

    @property
    def training(self) -> bool:
        """Kept elsewhere."""
        return self.__dict__.get("mode", True)

    @training.setter
    def training(self, mode: bool) -> None:
        self.__dict__["mode"] = mode


def _nested() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4), nn.Sequential(), nn.Dropout()), nn.ReLU())


def _shared() -> nn.Module:
    block = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    return nn.ModuleDict({"one": block, "other": nn.Sequential(block, block[1])})


def _circular() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2))
    model.add_module("itself", model)
    return model


def _with_gaps() -> nn.Module:
    model = _nested()
    model.register_module("absent", None)
    model._modules = OrderedDict(model._modules)
    return model


MODELS = {
    "nested": _nested,
    "in several places": _shared,
    "circular": _circular,
    "gaps and an ordered dictionary": _with_gaps,
    "a single module": lambda: nn.Linear(2, 2),
    "wide and deep": lambda: nn.Sequential(*(nn.Sequential(*(nn.ReLU() for _ in range(40))) for _ in range(40))),
    "flag kept elsewhere": lambda: nn.Sequential(nn.ReLU(), Flagless(), nn.ReLU()),
    "TorchScript": lambda: torch.jit.trace(_nested().eval(), torch.rand(1, 3, 4, 4)),
}


@pytest.fixture(params=("compiled", "Python"))
def walk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to find the modules."""
    if request.param == "Python":
        monkeypatch.setattr(evaluation, "_modules_in_training", None)
    elif evaluation._modules_in_training is None:
        pytest.skip("not compiled")
    return request.param


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("raised", ("all", "none", "every third"))
def test_flags_are_down_within_and_as_they_were_afterwards(name: str, raised: str, walk: str) -> None:
    model = MODELS[name]()
    modules = list(model.modules())
    for number, module in enumerate(modules):
        module.training = raised == "all" or (raised == "every third" and number % 3 == 0)
    before = [module.training for module in modules]
    with evaluating(model):
        assert not any(module.training for module in modules)
        with evaluating(model):
            assert not any(module.training for module in modules)
        assert not any(module.training for module in modules)
    assert [module.training for module in modules] == before


def test_the_compiled_walk_finds_what_pythons_does() -> None:
    if evaluation._modules_in_training is None:
        pytest.skip("not compiled")
    for name, make in MODELS.items():
        model = make()
        found = evaluation._modules_in_training(model)
        if name in ("flag kept elsewhere", "TorchScript"):
            assert found is None  # and Python goes through it
        else:
            assert {id(module) for module in found} == {id(module) for module in model.modules()}, name
            next(iter(model.modules())).training = 1  # true, but no flag of PyTorch's making
            assert evaluation._modules_in_training(model) is None, name
    assert evaluation._modules_in_training(object()) is None
