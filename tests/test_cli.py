"""The command line, from arguments to files."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("typer")
Image = pytest.importorskip("PIL.Image")

from diffcam_fast import cli, viz  # noqa: E402
from diffcam_fast.cli import photo_explainer  # noqa: E402
from diffcam_fast.cli.photos import find_photos  # noqa: E402
from diffcam_fast.cli.results import Results  # noqa: E402
from diffcam_fast.cli.text import displayed, one_line, safe_name  # noqa: E402
from diffcam_fast.explain import Explainer  # noqa: E402
from diffcam_fast.models import load_model  # noqa: E402
from diffcam_fast.ops.overlay import overlay  # noqa: E402
from tests.models.sample_photos import sample  # noqa: E402

ZOO = '''
import torch
from torch import nn
from diffcam_fast.models import LoadedModel, Preprocessing

class Tiny(nn.Module):
    """Three classes: how red, how green and how blue a photo is; `scale` makes answers that overflow."""
    def __init__(self, classes=3, scale=1.0):
        super().__init__()
        self.features = nn.Conv2d(3, 3, 1, bias=False)
        self.head = nn.Linear(3, classes, bias=False)
        with torch.no_grad():
            self.features.weight.copy_(torch.eye(3).view(3, 3, 1, 1))
            self.head.weight.copy_(scale * torch.eye(classes, 3))
    def forward(self, images):
        return self.head(self.features(images).relu().mean((2, 3)))

def colors():
    print("a model that talks")
    return LoadedModel("colors", Tiny(), Preprocessing((32, 32), 1.0, (0.0,) * 3, (1.0,) * 3), ("red", "green", "blue"))

def unnamed():
    return LoadedModel("unnamed", Tiny(2), Preprocessing((32, 32)))

def overflowing():
    return LoadedModel("overflowing", Tiny(scale=60000.0), Preprocessing((32, 32), 1.0, (0.0,) * 3, (0.2,) * 3))

class Picky(Tiny):
    """Fails on batches that hold a purely blue photo."""
    def forward(self, images):
        if (images[:, 2].amin((1, 2)) == 1).any():
            raise RuntimeError("out of blue")
        return super().forward(images)

def picky():
    return LoadedModel("picky", Picky(), Preprocessing((32, 32), 1.0, (0.0,) * 3, (1.0,) * 3), ("red", "green", "blue"))

def wrong_labels():
    return LoadedModel("wrong", Tiny(), Preprocessing((32, 32)), ("red",))
'''


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty current folder with the small models beside it."""
    (tmp_path / "zoo_of_the_test.py").write_text(ZOO)
    monkeypatch.setattr(viz, "_DOTS_PER_INCH", 40)  # a smaller panel is drawn sooner
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("zoo_of_the_test", None)


def picture(path, color="red", size=(40, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, "PNG")
    return path


def explain(*arguments, model="zoo_of_the_test:colors"):
    return cli.main(["explain", *map(str, arguments), "--model", model, "--output", "out"])


def record(name, output="out"):
    return json.loads(Path(output, name, "explanation.json").read_text())


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


# --- what is written --------------------------------------------------------------------------------------------------


def test_every_photo_gets_a_panel_an_overlay_and_a_record(folder, capsys):
    picture(folder / "a.png", "red")
    picture(folder / "b.png", "green", (60, 40))
    assert explain("a.png", "b.png") == 0
    assert files("out") == [
        "a/explanation.json",
        "a/overlay-0-red.png",
        "a/panel.png",
        "b/explanation.json",
        "b/overlay-1-green.png",
        "b/panel.png",
    ]
    assert Image.open("out/a/overlay-0-red.png").size == (32, 32)
    assert min(Image.open("out/a/panel.png").size) > 250
    out = capsys.readouterr().out.splitlines()
    assert out[-2].startswith("a.png: red (")
    assert out[-1].endswith(os.path.join("out", "b", "panel.png"))


def test_the_record(folder):
    picture(folder / "photo.png", (250, 100, 0), (80, 40))
    assert explain("photo.png", "--class", "blue", "--class", "0", "--top-k", "2", "--fit", "crop") == 0
    found = record("photo")
    assert set(found) == {"photo", "source", "seen", "settings", "prediction", "rivals", "classes", "panel"}
    assert found["photo"] == "photo.png"
    assert found["source"] == str(folder / "photo.png")
    assert found["seen"] == {"photo_size": [80, 40], "fit": "crop", "box": [20, 0, 60, 40], "input_size": [32, 32]}
    assert found["settings"] == {
        "model": "zoo_of_the_test:colors",
        "weights": None,
        "layers": ["features"],
        "tokens": None,
        "method": "gradcam",
        "target": "difference",
        "baseline": "logsumexp",
        "temperature": 1.0,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "dtype": "float32",
    }
    logits = torch.tensor([250 / 255, 100 / 255, 0.0], dtype=torch.float64)
    assert found["prediction"]["name"] == "red"
    assert found["prediction"]["score"] == pytest.approx(float(logits[0] - logits[1:].logsumexp(0)), abs=1e-5)
    assert [rival["name"] for rival in found["rivals"]] == ["green", "blue"]
    assert [rival["difference"] for rival in found["rivals"]] == pytest.approx([150 / 255, 250 / 255], abs=1e-5)
    assert [entry["index"] for entry in found["classes"]] == [2, 0]
    for entry in [found["prediction"], *found["rivals"], *found["classes"]]:
        assert entry["logit"] == pytest.approx(float(logits[entry["index"]]), abs=1e-5)
        assert entry["probability"] == pytest.approx(float(logits.softmax(0)[entry["index"]]), abs=1e-5)
    for name in [found["panel"], *(entry["overlay"] for entry in found["classes"])]:
        assert Path("out/photo", name).is_file()


def test_json_for_machines(folder, capsys):
    picture(folder / "a.png")
    assert explain("a.png", "missing.png", "--json") == 1
    captured = capsys.readouterr()
    printed = json.loads(captured.out)  # and nothing else, although the model talks
    assert set(printed) == {"output", "explained", "failed"}
    assert printed["failed"] == [{"photo": "missing.png", "error": "no such file or directory"}]
    (entry,) = printed["explained"]
    assert Path(entry["panel"]).is_file()
    assert Path(entry["classes"][0]["overlay"]).is_file()
    written = record("a")
    assert {**entry, "panel": 0, "classes": 0} == {**written, "panel": 0, "classes": 0}


def test_the_overlay_lies_on_what_the_model_saw():
    path = sample("chelsea.png")
    assert (
        cli.main(["explain", str(path), "-o", "out", "-c", "Egyptian cat", "--opacity", "0.7", "--colormap", "hot"])
        == 0
    )
    loaded = load_model()
    from diffcam_fast.models import read_photo

    pixels = loaded.preprocessing.pixels(read_photo(path))[None]
    explanation = Explainer(loaded.model)(loaded.preprocessing.normalize(pixels), [[285]])
    expected = overlay(explanation.maps, pixels, colormap="hot", opacity=0.7, normalize=None)[0, 0].int()
    written = torch.from_numpy(np.array(Image.open("out/chelsea/overlay-285-Egyptian_cat.png"))).int()
    assert (written - expected).abs().max() <= 1


def test_a_real_photo_is_told_from_its_real_rivals():
    assert cli.main(["explain", str(sample("chelsea.png")), "-o", "out"]) == 0
    found = record("chelsea")
    assert found["prediction"]["name"] == "tiger cat"
    assert [rival["name"] for rival in found["rivals"]] == ["Egyptian cat", "tabby", "lynx"]
    assert found["settings"]["layers"] == ["head_activation"]


@pytest.mark.parametrize(
    "options",
    [
        ["--target", "finer"],
        ["--target", "logit"],
        ["--target", "probability"],
        ["--target", "log-probability"],
        ["--baseline", "max"],
        ["--baseline", "expected", "--temperature", "2"],
        ["--method", "layercam", "--layer", "features"],
        ["--dtype", "float64", "--device", "cpu"],
        ["--dtype", "bfloat16"],
        ["--batch-size", "1", "--fit", "stretch", "--colormap", "viridis", "-k", "1"],
    ],
)
def test_options_do_what_they_say(folder, options):
    picture(folder / "a.png", (250, 100, 0))
    if "finer" in options:
        options = [*options, "--model", "default"]
    assert (
        explain("a.png", *options) == 0
        if "finer" not in options
        else cli.main(["explain", "a.png", "-o", "out", *options]) == 0
    )
    settings = record("a")["settings"]
    for option, key in (
        ("--target", "target"),
        ("--baseline", "baseline"),
        ("--method", "method"),
        ("--dtype", "dtype"),
    ):
        if option in options:
            assert settings[key] == options[options.index(option) + 1]


def test_targets_score_differently(folder):
    picture(folder / "a.png", (250, 100, 0))
    scores = {}
    for target in ("difference", "logit", "probability", "log-probability"):
        assert explain("a.png", "--target", target) == 0
        scores[target] = record("a")["prediction"]["score"]
    prediction = record("a")["prediction"]
    assert scores["logit"] == pytest.approx(prediction["logit"], abs=1e-5)
    assert scores["probability"] == pytest.approx(prediction["probability"], abs=1e-5)
    assert scores["log-probability"] == pytest.approx(np.log(prediction["probability"]), abs=1e-5)
    assert scores["difference"] == pytest.approx(np.log(scores["probability"] / (1 - scores["probability"])), abs=1e-4)


def test_batches_give_what_single_photos_give(folder):
    for index in range(5):
        picture(folder / "in" / f"{index}.png", (200, 40 * index, 10))
    assert explain("in", "--batch-size", "1") == 0
    alone = [record(str(index)) for index in range(5)]
    shutil.rmtree("out")
    assert explain("in", "--batch-size", "3") == 0
    assert [record(str(index)) for index in range(5)] == alone


def test_two_classes_have_one_rival(folder):
    picture(folder / "a.png")
    assert explain("a.png", model="zoo_of_the_test:unnamed") == 0
    assert len(record("a")["rivals"]) == 1
    assert record("a")["prediction"]["name"] in ("class 0", "class 1")


# --- photos that fail -------------------------------------------------------------------------------------------------


def png_bomb():
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_bad_photos_are_named_and_the_rest_goes_on(folder, capsys):
    picture(folder / "in" / "good.png")
    (folder / "in" / "bad.png").write_bytes(b"nothing")
    (folder / "in" / "bomb.png").write_bytes(png_bomb())
    (folder / "in" / "cut.png").write_bytes(picture(folder / "whole").read_bytes()[:50])
    (folder / "in" / "notes.txt").write_text("not searched for")
    assert explain("missing.png", "in") == 1
    error = capsys.readouterr().err
    assert "4 of 5 could not be explained" in error
    for name, reason in (
        ("missing.png", "no such file"),
        ("bad.png", "not an image"),
        ("bomb.png", "more than the 89478485 pixels"),
        ("cut.png", "damaged image"),
    ):
        (line,) = [line for line in error.splitlines() if name in line]
        assert reason in line
    assert "notes.txt" not in error
    assert files("out") == ["good/explanation.json", "good/overlay-0-red.png", "good/panel.png"]


def test_a_photo_that_the_model_fails_on_does_not_take_its_batch_along(folder, capsys):
    for name, color in (("a", "red"), ("b", "blue"), ("c", "lime")):
        picture(folder / f"{name}.png", color)
    assert explain("a.png", "b.png", "c.png", model="zoo_of_the_test:picky") == 1
    assert "b.png: out of blue" in capsys.readouterr().err
    assert sorted(os.listdir("out")) == ["a", "c"]


def test_an_answer_that_is_not_finite_is_a_failure(folder, capsys):
    picture(folder / "a.png", "black")
    picture(folder / "b.png", "white")
    assert explain("a.png", "b.png", "--dtype", "float16", model="zoo_of_the_test:overflowing") == 1
    assert "b.png: the model's answer is not finite in float16" in capsys.readouterr().err
    assert os.listdir("out") == ["a"]


def test_folders_without_photos(folder, capsys):
    (folder / "empty").mkdir()
    assert explain("empty") == 1
    assert "empty: no photo" in capsys.readouterr().err


def test_results_that_cannot_be_written_are_failures(folder, capsys, monkeypatch):
    picture(folder / "a.png")
    picture(folder / "b.png")
    write = Results.write

    def full(self, photo, pictures, record):
        if photo.name == "a.png":
            raise OSError("no space left on device")
        return write(self, photo, pictures, record)

    monkeypatch.setattr(Results, "write", full)
    assert explain("a.png", "b.png") == 1
    assert "a.png: results not written: no space left" in capsys.readouterr().err
    assert os.listdir("out") == ["b"]


# --- where results go -------------------------------------------------------------------------------------------------


def test_photos_of_the_same_name_keep_apart(folder):
    first, second = picture(folder / "x" / "cat.png", "red"), picture(folder / "y" / "cat.png", "lime")
    third = picture(folder / "x" / "cat.jpg", "blue")
    assert explain(first, second, third) == 0
    names = sorted(os.listdir("out"))
    assert len(names) == 3
    predictions = {record(name)["source"]: record(name)["prediction"]["name"] for name in names}
    assert predictions == {str(first): "red", str(second): "green", str(third): "blue"}
    assert explain(third, second) == 0  # in another order, and without the first
    assert sorted(os.listdir("out")) == names
    assert {record(name)["source"]: record(name)["prediction"]["name"] for name in names} == predictions


def test_names_that_differ_in_case_keep_apart(folder):
    assert explain(picture(folder / "x" / "Cat.png"), picture(folder / "y" / "cat.png")) == 0
    assert len({name.casefold() for name in os.listdir("out")}) == 2


def test_a_second_run_replaces_the_first(folder):
    picture(folder / "a.png", "red")
    assert explain("a.png", "--class", "green", "--class", "blue") == 0
    Path("out/a/notes.txt").write_text("mine")
    picture(folder / "a.png", "lime")
    assert explain("a.png") == 0
    assert files("out/a") == ["explanation.json", "notes.txt", "overlay-1-green.png", "panel.png"]
    assert record("a")["prediction"]["name"] == "green"


def test_what_an_interrupted_run_left_is_taken_over(folder):
    picture(folder / "a.png")
    Path("out/a").mkdir(parents=True)
    Path("out/a/overlay-2-blue.png").write_bytes(b"old")
    assert explain("a.png") == 0
    assert files("out") == ["a/explanation.json", "a/overlay-0-red.png", "a/panel.png"]


def test_a_users_own_folder_is_left_alone(folder):
    picture(folder / "a.png")
    Path("out/a").mkdir(parents=True)
    Path("out/a/thesis.txt").write_text("mine")
    assert explain("a.png") == 0
    assert os.listdir("out/a") == ["thesis.txt"]
    assert len(os.listdir("out")) == 2


def test_nothing_is_written_through_links(folder):
    picture(folder / "a.png")
    (folder / "elsewhere").mkdir()
    (folder / "out").mkdir()
    (folder / "out" / "a").symlink_to(folder / "elsewhere")
    assert explain("a.png") == 0
    assert os.listdir("elsewhere") == []
    (name,) = [name for name in os.listdir("out") if name != "a"]
    (folder / "precious").write_text("mine")
    (folder / "out" / name / "panel.png").unlink()
    (folder / "out" / name / "panel.png").symlink_to(folder / "precious")
    assert explain("a.png") == 0
    assert (folder / "precious").read_text() == "mine"
    assert not (folder / "out" / name / "panel.png").is_symlink()


@pytest.mark.skipif(os.name == "nt", reason="such names do not exist there")
@pytest.mark.parametrize(
    "name",
    [
        "new\nline.png",
        "\x1b[2Jescape.png",
        "..png",
        "... .png",
        "-o.png",
        "$(reboot).png",
        "a" * 240 + ".png",
        "\u5199\u771f" * 40 + ".png",
        os.fsdecode(b"\xff\xfe.png"),
        "CON.png",
        "\u202egnp.png",
    ],
)
def test_hostile_names(folder, capsys, name):
    picture(folder / "in" / name)
    assert explain("in") == 0
    assert [path for path in os.listdir(folder) if path not in ("in", "out", "zoo_of_the_test.py", "__pycache__")] == []
    (result,) = os.listdir("out")
    assert result == safe_name(result, "")
    assert record(result)["prediction"]["name"] == "red"
    captured = capsys.readouterr().out
    assert "\x1b" not in captured
    assert "\u202e" not in captured
    assert captured.count("\n") == 2  # the model's own line, and one for the photo


def test_a_run_on_the_current_folder_does_not_explain_its_own_results(folder):
    picture(folder / "a.png")
    assert explain(".") == 0
    before = files("out")
    assert explain(".") == 0
    assert files("out") == before


def test_photos_are_found_once_and_in_order(folder):
    for name in ("b.PNG", "a.jpg", "deep/er/c.webp", ".hidden.gif"):
        picture(folder / "in" / name)
    (folder / "in" / "loop").symlink_to(folder / "in")
    photos, failures = find_photos([Path("in/b.PNG"), Path("in"), Path("in")], Path("out"))
    assert [path.name for path in photos] == ["b.PNG", ".hidden.gif", "a.jpg", "c.webp"]
    assert failures == []


# --- what is asked for ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing command"),
        (["explain"], "Missing argument"),
        (["explain", "a.png", "--bogus"], "--bogus"),
        (["nonsense"], "nonsense"),
        (["explain", "a.png", "-k", "three"], "--top-k"),
        (["explain", "a.png", "-k", "0"], "--top-k: got 0"),
        (["explain", "a.png", "-k", "3"], "--top-k: got 3, but a prediction has 2 rivals"),
        (["explain", "a.png", "-k", "16"], "--top-k: got 16"),
        (["explain", "a.png", "--batch-size", "0"], "--batch-size: got 0"),
        (["explain", "a.png", "--class", "puce"], "no class is called 'puce'"),
        (["explain", "a.png", "--class", "7"], "expected 0 to 2"),
        (["explain", "a.png", "--method", "voodoo"], "method"),
        (["explain", "a.png", "--target", "voodoo"], "--target"),
        (["explain", "a.png", "--baseline", "voodoo"], "baseline"),
        (["explain", "a.png", "--target", "logit", "--baseline", "max"], "--baseline: only for"),
        (["explain", "a.png", "--target", "finer", "--temperature", "2"], "--temperature: only for"),
        (["explain", "a.png", "--baseline", "max", "--temperature", "2"], "temperature"),
        (["explain", "a.png", "--layer", "nowhere"], "nowhere"),
        (["explain", "a.png", "--tokens", "1"], "tokens_to_positions"),
        (["explain", "a.png", "--device", "abacus"], "--device: 'abacus'"),
        (["explain", "a.png", "--device", "meta"], "meta"),
        (["explain", "a.png", "--dtype", "int8"], "--dtype: got 'int8'"),
        (["explain", "a.png", "--fit", "squeeze"], "--fit: got 'squeeze'"),
        (["explain", "a.png", "--colormap", "voodoo"], "got 'voodoo'"),
        (["explain", "a.png", "--opacity", "2"], "--opacity: got 2.0"),
        (["explain", "a.png", "--weights", "missing.pt"], "cannot read 'missing.pt'"),
        (["explain", "a.png", "--output", "a.png"], "a.png"),
        (["explain", "a.png", "--model", "voodoo"], "expected 'default'"),
        (["explain", "a.png", "--model", "zoo_of_the_test:wrong_labels"], "1 labels for 3 classes"),
    ],
)
def test_what_makes_no_sense_takes_one_line(folder, capsys, arguments, message):
    picture(folder / "a.png")
    if "explain" in arguments and "--model" not in arguments:
        arguments = [*arguments, "--model", "zoo_of_the_test:colors"]
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("diffcam: ")
    assert captured.err.count("\n") == 1
    assert not Path("out").exists()
    assert not Path("diffcam-results").exists()


def test_without_the_extra_one_line_names_it(monkeypatch, capsys):
    find_spec = cli.importlib.util.find_spec
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name == "typer" else find_spec(name))
    assert cli.main(["info"]) == 2
    error = capsys.readouterr().err
    assert "needs typer: pip install 'diffcam_fast[cli]'" in error
    assert error.count("\n") == 1


def test_a_bug_is_not_dressed_up_as_a_wrong_option(folder, monkeypatch):
    picture(folder / "a.png")
    monkeypatch.setattr(photo_explainer.viz, "panel", lambda *arguments, **options: [][0])
    with pytest.raises(IndexError):
        explain("a.png")


def test_help(capsys):
    assert cli.main(["--help"]) == 0
    assert cli.main(["explain", "--help"]) == 0
    shown = capsys.readouterr().out
    for option in (
        "--class",
        "--top-k",
        "--layer",
        "--method",
        "--baseline",
        "--batch-size",
        "--device",
        "--dtype",
        "--json",
    ):
        assert option in shown


def test_info(capsys):
    assert cli.main(["info"]) == 0
    assert "Backends" in capsys.readouterr().out
    assert cli.main(["info", "--json"]) == 0
    assert "backends" in json.loads(capsys.readouterr().out)


def test_as_a_program(folder):
    picture(folder / "a.png")
    command = [
        sys.executable,
        "-m",
        "diffcam_fast.cli",
        "explain",
        "a.png",
        "b.png",
        "-m",
        "zoo_of_the_test:colors",
        "--json",
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    result = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert result.returncode == 1
    assert len(json.loads(result.stdout)["explained"]) == 1


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("cat", "cat"),
        ("a b/c\\d:e", "a_b_c_d_e"),
        ("..", "photo"),
        ("", "photo"),
        ("-rf", "rf"),
        ("nul", "nul_"),
        ("Com1.tar", "Com1.tar_"),
        ("\u00e9t\u00e9", "\u00e9t\u00e9"),
        ("e\u0301te\u0301", "\u00e9t\u00e9"),
        ("\udcff", "photo"),
    ],
)
def test_safe_names(text, name):
    assert safe_name(text, "photo") == name


def test_safe_names_are_short():
    assert len(safe_name("\u5199" * 500, "photo").encode()) <= 60


def test_displayed_text_only_reads():
    assert displayed("a\nb\x1b\udcff\u202e") == "a\\nb\\x1b\\udcff\\u202e"
    assert one_line("a\n  b\tc") == "a b c"
