"""`diffcam bench`, on a network that costs nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("typer")

import diffcam_fast
from diffcam_fast import cli
from diffcam_fast.benchmark.measure import threads

ZOO = """
import torch
from torch import nn
from diffcam_fast.models import LoadedModel, Preprocessing

def small():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU())
    model = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    model[3].weight.data.mul_(100)
    return LoadedModel("small", model, Preprocessing((24, 20)))
"""
QUICK = ["bench", "--quick", "--model", "zoo_of_the_bench:small", "--device", "cpu"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder with the network beside it, and one thread: what else runs then matters less."""
    (tmp_path / "zoo_of_the_bench.py").write_text(ZOO)
    monkeypatch.chdir(tmp_path)
    with threads(1):
        yield tmp_path
    sys.modules.pop("zoo_of_the_bench", None)


def test_tables_and_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*QUICK, "-b", "1", "-b", "3", "--output", "measured"]) == 0
    printed = capsys.readouterr().out
    assert "served by the" in printed and "of read" in printed and "1x2048x7x7  channels-last" in printed
    assert "at layer 0" in " ".join(printed.split()) and "vs floor" in printed
    names = {f"{name}.{kind}" for name in ("kernels", "end_to_end") for kind in ("json", "csv", "md")}
    assert {path.name for path in (folder / "measured").iterdir()} == names
    found = json.loads((folder / "measured" / "end_to_end.json").read_text())
    assert [row["batch"] for row in found["rows"]] == [1, 3]
    assert all(row["multiple"] > 0 and row["error"] < 1e-4 for row in found["rows"])
    assert found["environment"]["command"] == "diffcam " + " ".join([*QUICK, "-b 1 -b 3 --output measured"])
    assert "commit" not in found["environment"]


def test_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*QUICK, "-b", "2", "--layer", "0.0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"kernels", "end_to_end"}
    (row,) = found["end_to_end"]["rows"]
    assert (row["layer"], row["batch"]) == ("0.0", 2)
    assert len(found["kernels"]["rows"]) == 4
    assert {path.name for path in folder.iterdir()} <= {"zoo_of_the_bench.py", "__pycache__"}


def test_a_wrong_kernel_is_not_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = diffcam_fast.cam
    monkeypatch.setattr(diffcam_fast, "cam", lambda *arguments: 1.01 * right(*arguments))
    assert cli.main([*QUICK, "-b", "1"]) == 1
    assert "ours: error 0.01 where at most 0.0001 is allowed; not timed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "0"], "--batch-size: got 0, expected at least 1"),
        (["--layer", "nowhere"], "layers: the model has no layer 'nowhere'"),
        (["--device", "tpu"], "--device: 'tpu' is not to be had here"),
        (["--model", "nothing"], "model: got 'nothing'"),
        (["--output", "zoo_of_the_bench.py"], "File exists"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_measured(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*QUICK, *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
