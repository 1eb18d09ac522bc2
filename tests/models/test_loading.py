"""Models by name, and weights from files."""

from __future__ import annotations

import pickle
import sys
import types

import pytest
import torch
from torch import nn

from diffcam_fast.models import EfficientNetLite0, LoadedModel, Preprocessing, imagenet_labels, load_model


def small_network(classes=4):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))


@pytest.fixture
def torchvision():
    return pytest.importorskip("tests.helpers.torchvision_cpu")


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """A module of a user's in the current folder."""
    (tmp_path / "a_users_zoo.py").write_text(
        "from diffcam_fast.models import LoadedModel, Preprocessing\n"
        "from torch import nn\n"
        "def plain():\n"
        "    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2))\n"
        "def described():\n"
        "    return LoadedModel('mine', plain(), Preprocessing(size=(32, 48)), ('ant', 'bee'))\n"
        "class nested:\n"
        "    make = staticmethod(plain)\n"
        "def wrong():\n"
        "    return 'a model'\n"
        "constant = 3\n"
    )
    (tmp_path / "a_broken_zoo.py").write_text("import a_package_that_nobody_has\n")
    monkeypatch.chdir(tmp_path)
    yield
    for name in ("a_users_zoo", "a_broken_zoo"):
        sys.modules.pop(name, None)


def test_the_default():
    loaded = load_model()
    assert isinstance(loaded.model, EfficientNetLite0)
    assert loaded.labels == imagenet_labels()
    assert loaded.preprocessing.size == (224, 224)
    assert not loaded.model.training


@pytest.mark.parametrize("spec", ["", "resnet50", ":", "torchvision:", ":resnet50", "a file.pt"])
def test_unknown_specs(spec):
    with pytest.raises(ValueError, match="expected 'default', 'torchvision:NAME'"):
        load_model(spec)


def test_the_default_takes_no_weights(tmp_path):
    with pytest.raises(ValueError, match="weights"):
        load_model("default", tmp_path / "weights.pt")


# --- torchvision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wrapped", "prefix"), [(None, ""), ("state_dict", "module."), ("model", "")])
def test_torchvision_with_a_state_dict(torchvision, tmp_path, wrapped, prefix):
    network = torchvision.models.shufflenet_v2_x0_5(num_classes=6)
    state = {prefix + key: value for key, value in network.state_dict().items()}
    torch.save({wrapped: state, "epoch": 3} if wrapped else state, tmp_path / "weights.pt")
    loaded = load_model("torchvision:shufflenet_v2_x0_5", tmp_path / "weights.pt")
    assert loaded.labels is None
    assert not loaded.model.training
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded.model(images), network.eval()(images))


def test_torchvisions_preprocessing_and_labels(torchvision, tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "weights.pt")
    loaded = load_model("torchvision:resnet18", tmp_path / "weights.pt")
    assert loaded.labels == imagenet_labels()
    assert loaded.preprocessing == Preprocessing(crop_fraction=224 / 256, interpolation="bilinear")


def test_an_unknown_torchvision_model(torchvision):
    with pytest.raises(ValueError, match=r"no classifier 'resnet51'; close to it: .*resnet50"):
        load_model("torchvision:resnet51")


def test_pretrained_weights_that_cannot_be_fetched(torchvision, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def refuse(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(RuntimeError, match=r"torchvision:resnet18.*no route to host.*--weights"):
        load_model("torchvision:resnet18")


def test_pretrained_weights_are_loaded_safely(torchvision, monkeypatch, tmp_path):
    """A file that is there already is loaded without running code, and ends in the model."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    network = torchvision.models.squeezenet1_1()
    name = torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url.rpartition("/")[2]
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    path = tmp_path / "hub" / "checkpoints" / name
    torch.save(network.state_dict(), path)
    loaded = load_model("torchvision:squeezenet1_1")
    assert torch.equal(loaded.model.features[0].weight, network.features[0].weight)

    path.write_bytes(malicious_pickle(tmp_path))
    with pytest.raises(RuntimeError, match="squeezenet1_1"):
        load_model("torchvision:squeezenet1_1")
    assert not (tmp_path / "ran").exists()


def test_weights_for_another_network(torchvision, tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="weights: they do not fit 'torchvision:resnet34'"):
        load_model("torchvision:resnet34", tmp_path / "weights.pt")


def test_without_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match="pip install torchvision"):
        load_model("torchvision:resnet18")


# --- files of weights -------------------------------------------------------------------------------------------------


class _Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def malicious_pickle(folder):
    return pickle.dumps({"weight": _Trap(folder / "ran")}, protocol=2)


def test_weights_never_run_code(tmp_path):
    (tmp_path / "weights.pt").write_bytes(malicious_pickle(tmp_path))
    with pytest.raises(ValueError, match="not a state dict that can be loaded safely"):
        load_model("torchvision:resnet18", tmp_path / "weights.pt")
    torch.save({"weight": _Trap(tmp_path / "ran")}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="not a state dict that can be loaded safely"):
        load_model("torchvision:resnet18", tmp_path / "weights.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(3), "holds Tensor, expected a state dict"),
        ({}, "expected a state dict"),
        ({"epoch": 3}, "more than tensors"),
        ([1, 2], "holds list"),
    ],
)
def test_files_that_hold_something_else(tmp_path, content, message):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=message):
        load_model("torchvision:resnet18", tmp_path / "weights.pt")


def test_files_that_are_missing_or_damaged(tmp_path):
    with pytest.raises(ValueError, match=r"weights: cannot read .*missing\.pt.*No such file"):
        load_model("torchvision:resnet18", tmp_path / "missing.pt")
    (tmp_path / "weights.pt").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(ValueError, match="not a state dict"):
        load_model("torchvision:resnet18", tmp_path / "weights.pt")


# --- timm -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def timm(monkeypatch):
    """A stand-in for timm with one network, since timm itself is not among the packages of the tests."""
    module, data = types.ModuleType("timm"), types.ModuleType("timm.data")
    config = {
        "input_size": (3, 96, 96),
        "crop_pct": 0.9,
        "mean": (0.5,) * 3,
        "std": (0.25,) * 3,
        "interpolation": "bicubic",
    }
    module.created = []

    def create_model(name, pretrained, num_classes=1000):
        module.created.append((name, pretrained, num_classes))
        network = small_network(num_classes)
        network.num_classes = num_classes
        return network

    module.list_models = lambda: ["small", "large"]
    module.create_model = create_model
    module.data = data
    data.resolve_model_data_config = lambda network: config
    monkeypatch.setitem(sys.modules, "timm", module)
    monkeypatch.setitem(sys.modules, "timm.data", data)
    return module


def test_timm_with_a_state_dict(timm, tmp_path):
    network = small_network(5)
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    loaded = load_model("timm:small", tmp_path / "weights.pt")
    assert timm.created == [("small", False, 5)]
    assert loaded.labels is None
    assert loaded.preprocessing == Preprocessing((96, 96), 0.9, (0.5,) * 3, (0.25,) * 3, "bicubic")
    assert torch.equal(loaded.model[0].weight, network[0].weight)


def test_timm_with_its_own_weights(timm):
    assert load_model("timm:small.with_a_tag").labels == imagenet_labels()
    assert timm.created == [("small.with_a_tag", True, 1000)]


def test_an_unknown_timm_model(timm):
    with pytest.raises(ValueError, match=r"no classifier 'smal'; close to it: small"):
        load_model("timm:smal")


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="pip install timm"):
        load_model("timm:small")


# --- functions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["plain", "nested.make"])
def test_a_function_of_a_module_in_the_current_folder(zoo, function):
    before = list(sys.path)
    loaded = load_model(f"a_users_zoo:{function}")
    assert sys.path == before
    assert loaded.preprocessing == Preprocessing()
    assert loaded.labels is None
    assert not any(module.training for module in loaded.model.modules())


def test_a_function_that_says_more_about_its_model(zoo):
    loaded = load_model("a_users_zoo:described")
    assert isinstance(loaded, LoadedModel)
    assert (loaded.preprocessing.size, loaded.labels) == ((32, 48), ("ant", "bee"))


def test_a_function_with_weights(zoo, tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2))
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    loaded = load_model("a_users_zoo:plain", tmp_path / "weights.pt")
    assert torch.equal(loaded.model[0].weight, network[0].weight)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("a_zoo_of_nobody:plain", ValueError, "no module 'a_zoo_of_nobody'"),
        ("a_users_zoo:missing", ValueError, "missing"),
        ("a_users_zoo:constant", TypeError, "is of type int, expected a function"),
        ("a_users_zoo:wrong", TypeError, "returned str, expected nn.Module"),
        ("a_broken_zoo:plain", ModuleNotFoundError, "a_package_that_nobody_has"),
    ],
)
def test_functions_that_do_not_work(zoo, spec, error, message):
    with pytest.raises(error, match=message):
        load_model(spec)
