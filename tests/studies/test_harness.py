"""What studies hand back becomes files that are complete, and a page that shows them and runs nothing."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure as Drawing
from PIL import Image
from scipy import stats

from benchmarks.studies import __main__ as command
from benchmarks.studies import report, study
from benchmarks.studies.statistics import mean_interval
from benchmarks.studies.study import Claim, Figure, Findings, Settings, Table
from diffcam_fast.models.registry import FetchRefusedError

ORIGIN = {
    "command": "python -m benchmarks.studies <b>",
    "date": "2026-01-01T00:00:00+00:00",
    "machine": {"cpu": "a", "processors": 2, "caches": {}, "memory_gib": 1.0, "load_average_at_start": 0.0},
    "versions": {"diffcam_fast": "0", "torch": "0", "numpy": "0", "python": "0"},
    "cpu_capability": None,
    "commit": None,
    "clean": None,
}


class Example:
    """A study; what it hands back is exchanged by tests."""

    NAME = "example"
    TITLE = "An <example>"
    QUESTION = "Is <script>alert(1)</script> run?"

    def __init__(self, findings: Findings) -> None:
        self.findings = findings

    def run(self, settings: Settings) -> Findings:
        return self.findings


def settings(**changed: object) -> Settings:
    values = dict(
        quick=True, seed=3, device=torch.device("cpu"), network=None, cache=Path("unused"), progress=False, **changed
    )
    return Settings(**values)


def drawing() -> Drawing:
    figure = Drawing(figsize=(2, 1), facecolor="#1f77b4")
    figure.add_subplot().plot([0, 1], [0, 1])
    return figure


def findings() -> Findings:
    rows = [{"network": "<i>a</i>", "ssim": 0.123456, "kept": True}, {"network": "b", "ssim": math.nan, "kept": False}]
    return Findings(
        [Table("main", "A table", rows, "In <words>.", {"ssim": ".2f"})],
        [Figure("curve", "A figure", "What it shows.", drawing())],
        [Claim("It holds.", True, "0.9"), Claim("It <does not>.", False, "0.1"), Claim("It may.", None, "nothing")],
        {"images": 4},
    )


def write(folder: Path, found: Findings | None = None) -> list[Path]:
    return study.write(Example(found or findings()), found or findings(), settings(), ORIGIN, 1.25, folder)


def test_files_hold_what_was_found(tmp_path: Path) -> None:
    assert [path.name for path in write(tmp_path)] == ["example-main.csv", "example-curve.png", "example.json"]
    content = json.loads((tmp_path / "example.json").read_text())
    assert content["settings"] == {"size": "quick", "seed": 3, "device": "cpu", "network": None}
    assert content["duration_s"] == 1.2 and content["details"] == {"images": 4}
    # A number that JSON does not have is no number.
    assert [row["ssim"] for row in content["tables"][0]["rows"]] == [0.123456, None]
    assert [claim["holds"] for claim in content["claims"]] == [True, False, None]
    rows = list(csv.DictReader((tmp_path / "example-main.csv").open()))
    assert [row["ssim"] for row in rows] == ["0.123456", ""]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["example-curve.png", "example-main.csv", "example.json"]


def test_pictures_of_few_and_of_many_colours_keep_white_and_what_is_drawn() -> None:
    noise = np.random.default_rng(0).random((64, 64, 3))
    few, many = Drawing(figsize=(2, 1)), Drawing(figsize=(2, 1))
    few.add_subplot().axhspan(0, 1, color="#ff0000")
    many.add_subplot().imshow(noise)
    for figure in (few, many):
        pixels = np.asarray(Image.open(io.BytesIO(study._png(figure))).convert("RGB")).astype(int)
        assert (pixels[0, 0] == 255).all()
        assert (figure is few) == (np.abs(pixels - [255, 0, 0]).sum(2) < 8).any()
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) <= 256


@pytest.mark.parametrize("name", ["../evil", "Upper", "a b", ""])
def test_names_that_could_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="name: got"):
        write(tmp_path, Findings([Table(name, "", [])], [], []))
    assert not list(tmp_path.iterdir())


def test_a_name_is_given_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected each once"):
        write(tmp_path, Findings([Table("a", "", []), Table("a", "", [])], [], []))


def test_page_escapes_everything_and_loads_nothing(tmp_path: Path) -> None:
    write(tmp_path)
    text = report.write(tmp_path).read_text()
    assert "<script" not in text and "http://" not in text and "https://" not in text
    for raw in ("<i>a", "<does not>", "<words>", "An <example>", "<b>"):
        assert raw not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert text.count("<td") == 6 and "0.12</td>" in text and ">yes<" in text and ">-<" in text
    assert text.count("data:image/png;base64,") == 1
    assert [text.count(f">{verdict}</span>") for verdict in report.VERDICTS.values()] == [1, 1, 1]


def test_summary_links_to_what_lies_beside_it(tmp_path: Path) -> None:
    write(tmp_path)
    report.write(tmp_path)
    text = (tmp_path / report.SUMMARY).read_text()
    assert "- **does not hold:** It &lt;does not&gt;. 0.1\n" in text
    assert "![A figure](example-curve.png)" in text and "[A table](example-main.csv)" in text
    assert "<script" not in text and "quick size" in text


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content["figures"][0].update(file="../secret.png"), "expected the name of a PNG"),
        (lambda content: content["figures"][0].update(file="example-main.png"), "not a PNG"),
        (lambda content: content["tables"][0].update(file="../../secret.csv"), "expected the name of a PNG or CSV"),
        (lambda content: content.pop("claims"), "not the results of a study"),
    ],
)
def test_results_are_not_trusted(tmp_path: Path, damage, message: str) -> None:
    write(tmp_path)
    (tmp_path / "example-main.png").write_text("GIF")
    content = json.loads((tmp_path / "example.json").read_text())
    damage(content)
    (tmp_path / "example.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        report.write(tmp_path)
    assert not (tmp_path / report.PAGE).exists()


def test_page_in_a_browser(tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
    if browser is None:
        pytest.skip("no headless browser is installed")
    write(tmp_path)
    page = report.write(tmp_path)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
    flags += ["--no-first-run", "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}"]
    shot = [f"--screenshot={tmp_path / 'page.png'}", "--window-size=800,1200", "--hide-scrollbars", "--dump-dom"]
    done = subprocess.run(
        [browser, *flags, *shot, page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    # As the browser understood it: one picture, one row a row, and the script is text.
    assert done.stdout.count("<img") == 1 and done.stdout.count("<tr>") == 3 and "<script" not in done.stdout
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("RGB"))
    colours = {tuple(colour) for colour in pixels.reshape(-1, 3)[::7]}
    # The marks of the verdicts, and the figure's ground.
    assert {(0xD6, 0xF0, 0xDC), (0xF8, 0xD7, 0xD4), (0x1F, 0x77, 0xB4)} <= colours


def test_command_goes_on_after_a_refused_fetch(tmp_path: Path, monkeypatch, capsys) -> None:
    refused = Example(findings())
    refused.run = lambda given: (_ for _ in ()).throw(FetchRefusedError("not offered"))
    modules = {"benchmarks.studies.fooling": refused, "benchmarks.studies.adversarial": Example(findings())}
    monkeypatch.setattr(command.importlib, "import_module", modules.__getitem__)
    before = torch.get_rng_state()
    assert command.main(["fooling", "adversarial", "--quick", "--output", str(tmp_path)]) == command.REFUSED
    assert torch.equal(before, torch.get_rng_state())
    printed = capsys.readouterr()
    assert "fooling: no results: not offered" in printed.err
    assert "does not hold: It <does not>. 0.1" in printed.out
    assert (tmp_path / "example.json").is_file() and (tmp_path / report.PAGE).is_file()


def test_a_study_that_lacks_a_package_is_an_error(tmp_path: Path, monkeypatch, capsys) -> None:
    refused, broken = Example(findings()), Example(findings())
    refused.run = lambda given: (_ for _ in ()).throw(FetchRefusedError("not offered"))
    broken.run = lambda given: (_ for _ in ()).throw(ImportError("no such package"))
    modules = {"benchmarks.studies.fooling": broken, "benchmarks.studies.adversarial": refused}
    monkeypatch.setattr(command.importlib, "import_module", modules.__getitem__)
    assert command.main(["fooling", "adversarial", "--quick", "--output", str(tmp_path)]) == 1
    assert "fooling: no results: no such package" in capsys.readouterr().err


def test_command_refuses_what_it_does_not_know(capsys) -> None:
    for arguments, message in ((["nothing"], "unknown study nothing"), (["--device", "nowhere"], "--device: nowhere")):
        with pytest.raises(SystemExit):
            command.main(arguments)
        assert message in capsys.readouterr().err


def test_mean_interval_is_students() -> None:
    values = torch.tensor([0.2, 0.5, 0.9, 0.4])
    interval = mean_interval(torch.cat([values, torch.tensor([math.nan])]))
    low, high = stats.t.interval(0.95, 3, loc=values.mean().item(), scale=stats.sem(values.double().numpy()))
    assert interval.count == 4
    assert (interval.mean, interval.low, interval.high) == pytest.approx((0.5, low, high), abs=1e-6)


def test_mean_interval_of_few_values() -> None:
    one, none = mean_interval([0.5]), mean_interval([])
    assert one.mean == 0.5 and math.isnan(one.low) and str(one) == "0.500 (one value)"
    assert none.count == 0 and math.isnan(none.mean) and str(none) == "no values"
    with pytest.raises(ValueError, match="one dimension"):
        mean_interval(torch.zeros(2, 2))


def test_seeds_repeat() -> None:
    draws = [torch.rand(2, generator=settings().generator(offset)) for offset in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_track_hands_on_every_item() -> None:
    assert list(settings().track(range(3), "counting")) == [0, 1, 2]


@pytest.mark.parametrize("network", ["bogus", "torchvision:nosuch"])
def test_command_says_which_network_there_is_not(tmp_path: Path, capsys, network: str) -> None:
    pytest.importorskip("tests.helpers.torchvision_cpu")
    assert command.main(["logit_shift", "--quick", "--network", network, "--output", str(tmp_path)]) == 1
    assert "logit_shift: no results: network: " in capsys.readouterr().err
