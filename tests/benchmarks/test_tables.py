"""The tables in the README and on the migration page are those of the committed results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import environment, report, tables
from benchmarks.speed import bench_end_to_end
from benchmarks.speed.bench_end_to_end import ALL, ONE, OVERHEAD
from tests.benchmarks.test_end_to_end import result_row

PLACES = "# Title\n<!-- results: end_to_end -->\nold\n<!-- end -->\nprose\n<!-- results: cam bars -->\n<!-- end -->\n"


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_the_pages_show_the_committed_results(page: Path) -> None:
    text = page.read_text()
    assert text.count("<!-- results: ") >= 1
    assert tables.render(text) == text


def test_results_fill_their_places(tmp_path: Path) -> None:
    rows = [
        result_row(ONE, "resnet50", 1, multiple=1.234, channels_last=0.75),
        result_row(ALL, "resnet50", 8, classes=1000, torchcam_classes=50, torchcam_layers=1),
        result_row(OVERHEAD, "small network", 1, multiple=3.0),
    ]
    del rows[2]["layers"]  # the one row that is not about a network's layers
    report.write(bench_end_to_end.report(rows, {}), environment.describe("a test"), tmp_path)

    text = tables.render(PLACES, tmp_path)

    assert "old" not in text and "\nprose\n" in text
    assert "| one class, last layer | resnet50, 1 | **1.234, missed** | 1.00 | 0.75 | 2.00 | 2.00 |" in text
    assert "| all 1000 classes | resnet50, 8 | 1.000 | 1.00 | - | 2.00 | over 2.00 |" in text
    assert "small network" not in text
    assert text.endswith("<!-- results: cam bars -->\n<!-- end -->\n")  # there is no result of that name
    assert tables.render(text, tmp_path) == text
    limits = tables.render("<!-- results: end_to_end bars -->\n<!-- end -->", tmp_path)
    assert "- one class, pooled heads, batch 1: at most 1.03 times inference: **missed in 1 of 1 rows**\n" in limits
    assert "- less than torchcam: kept in all 2 rows\n" in limits


def test_studies_are_counted_by_their_verdicts(tmp_path: Path) -> None:
    (tmp_path / "studies").mkdir()
    content = {"title": "Fooled?", "duration_s": 150.0, "claims": [{"holds": holds} for holds in (True, False, False)]}
    (tmp_path / "studies" / "fooling.json").write_text(json.dumps(content))
    text = tables.render("<!-- results: studies -->\n<!-- end -->", tmp_path)
    assert "| study |  | minutes | holds | does not hold | cannot be told |" in text
    assert "| `fooling` | Fooled? | 2 | 1 | 2 | 0 |" in text


def test_a_place_for_no_table_is_refused() -> None:
    with pytest.raises(ValueError, match="got 'camm'"):
        tables.render("<!-- results: camm -->\n<!-- end -->")


def test_check_tells_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("<!-- results: cam -->\nstale\n<!-- end -->\n")
    monkeypatch.setattr(tables, "PAGES", (readme,))
    assert tables.main(["--check"]) == 1
    assert "tables differ" in capsys.readouterr().err
    assert "stale" in readme.read_text()
    assert tables.main([]) == 0
    assert "| 32x2048x7x7 |" in readme.read_text()
    assert tables.main(["--check"]) == 0
