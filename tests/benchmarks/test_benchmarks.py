"""The benchmarks run, refuse to time what is wrong, and show a missed bar."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

import diffcam_fast
from benchmarks import environment, report, run
from benchmarks.speed import bench_cam, bench_memory
from benchmarks.speed.measure import QUICK, Candidate, NotCompiled, WrongResult, compare, require_compiled
from diffcam_fast.backends import absent_because, use_backend

ENVIRONMENT = environment.describe("a test")


def _files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("name", run.BENCHMARKS)
def test_quick_run_writes_results_with_their_origin(name: str, tmp_path: Path) -> None:
    if name in ("cam", "logit_difference", "overlay", "saliency_contrast") and absent_because("cpu") is not None:
        pytest.skip(f"no compiled kernels: {absent_because('cpu')}")
    if name in ("end_to_end", "growth", "compat", "memory_format"):
        pytest.importorskip("tests.helpers.torchvision_cpu")
    threads = torch.get_num_threads()

    assert run.main([name, "--quick", "--output", str(tmp_path)]) == 0

    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert _files(tmp_path) == {f"{name}.json", f"{name}.csv", f"{name}.md", *found["figures"]}
    assert all((tmp_path / figure).read_bytes().startswith(b"\x89PNG") for figure in found["figures"])
    assert found["environment"]["machine"]["cpu"]
    assert found["environment"]["versions"]["torch"] == torch.__version__
    assert found["environment"]["command"].startswith(f"python -m benchmarks.run {name} --quick")
    assert {"commit", "clean"} <= found["environment"].keys()
    with (tmp_path / f"{name}.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(found["rows"]) > 0
    table = (tmp_path / f"{name}.md").read_text()
    assert all(bar["bar"] in table for bar in found["bars"])
    assert torch.get_num_threads() == threads


def test_times_are_those_of_the_table(tmp_path: Path) -> None:
    if absent_because("cpu") is not None:
        pytest.skip(f"no compiled kernels: {absent_because('cpu')}")
    found = bench_cam.run(quick=True)

    for row in found.rows:
        assert 0 < row["ms_min"] <= row["ms_p20"] <= row["ms"] <= row["ms_p80"]
        assert row["vs_compile"] == pytest.approx(row["ms"] / row["compile_ms"])
        assert row["vs_dot"] == pytest.approx(row["ms"] / row["dot_ms"])
        assert row["gb_per_s"] == pytest.approx(2 * 4 * 2048 * 49 / (row["ms"] * 1e6))
        assert row["error"] < 1e-5
    cold, warm = found.rows
    assert cold["share_of_read"] > 0
    assert "share_of_read" not in warm


def test_quick_run_writes_nothing_unasked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment, "RESULTS", tmp_path)
    monkeypatch.setitem(run.BENCHMARKS, "memory", lambda quick: _report(1.0))
    assert run.main(["memory", "--quick"]) == 0
    assert _files(tmp_path) == set()
    assert run.main(["memory"]) == 0
    assert _files(tmp_path) == {"example.json", "example.csv", "example.md"}


@pytest.mark.parametrize("wrong", [1.01, float("nan")])
def test_a_wrong_result_is_not_timed(wrong: float) -> None:
    calls = {"right": 0, "wrong": 0}

    def candidate(name: str, value: float) -> Candidate:
        def function(copy: int) -> float:
            calls[name] += 1
            return value

        return Candidate(function, lambda found: abs(found - 1), 1e-3)

    with pytest.raises(WrongResult, match=r"example: wrong: error .* not timed"):
        compare({"right": candidate("right", 1.0), "wrong": candidate("wrong", wrong)}, what="example", effort=QUICK)
    assert calls == {"right": 1, "wrong": 1}


def test_a_wrong_kernel_gives_no_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if absent_because("cpu") is not None:
        pytest.skip(f"no compiled kernels: {absent_because('cpu')}")
    right = diffcam_fast.cam
    monkeypatch.setattr(diffcam_fast, "cam", lambda *arguments: 1.001 * right(*arguments))

    assert run.main(["cam", "--quick", "--output", str(tmp_path)]) == 1

    assert "gradcam, 1x2048x7x7, channels-last, float32, 1 thread, cold: ours: error" in capsys.readouterr().err
    assert _files(tmp_path) == set()


def test_the_reference_is_not_compared_with_itself() -> None:
    with use_backend("reference"), pytest.raises(NotCompiled, match="served by the reference backend"):
        require_compiled("cam")


def test_candidates_take_turns_over_all_copies() -> None:
    seen: list[tuple[str, int]] = []

    def candidate(name: str) -> Candidate:
        return Candidate(lambda copy: seen.append((name, copy)), lambda found: 0.0, 0.0)

    timings, _ = compare(
        {"a": candidate("a"), "b": candidate("b"), "c": candidate("c")}, what="example", copies=4, effort=QUICK
    )

    turns = seen[3:]  # after one check each
    assert [copy for _, copy in turns] == [(1 + turn) % 4 for turn in range(len(turns))]
    rounds = [tuple(name for name, _ in turns[start : start + 3]) for start in range(0, len(turns), 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len(set(rounds)) > 1
    assert all(timing.rounds == len(rounds) - 2 for timing in timings.values())


def _report(value: float) -> report.Report:
    rows = [{"name": "one", "ratio": 0.5}, {"name": "two", "ratio": value}]
    columns = [report.Column("name", "name"), report.Column("ratio", "ratio", ".2f")]
    return report.Report(
        name="example",
        title="Example",
        introduction="An example.",
        rows=rows,
        tables=[report.Table("All", rows, columns)],
        bars=[report.Bar("no slower than the other", "ratio", 1.0)],
        label=lambda row: row["name"],
    )


@pytest.mark.parametrize("value", [1.004, float("inf")])
def test_a_missed_bar_is_shown_in_its_cell_and_beneath(value: float) -> None:
    text = report.as_markdown(_report(value), ENVIRONMENT)
    assert f"| two | **{value:.2f} missed** |" in text
    assert "no slower than the other: **missed in 1 of 2 rows**\n    - two: " in text
    assert "| one | 0.50 |" in text


def test_the_reason_comes_from_the_rows_that_miss_a_bar() -> None:
    missing, kept = _report(1.2), _report(0.9)
    for each in (missing, kept):
        each.bars = [bar.because(each.rows, lambda missed: f"{len(missed)}: {missed[0]['name']}") for bar in each.bars]
    assert "    - two: 1.200\n    - why: 1: two" in report.as_markdown(missing, ENVIRONMENT)
    assert "why" not in report.as_markdown(kept, ENVIRONMENT)


def test_reasons_for_less_than_the_bandwidth() -> None:
    def row(method: str, dtype: str, share: float, ms: float) -> report.Row:
        place = {"method": method, "shape": "32x8x7x7", "layout": "contiguous", "threads": 2, "cache": "cold"}
        return {**place, "dtype": dtype, "share_of_read": share, "ms": ms, "bytes": 8_000_000, "vs_dot": 1.2}

    found = [
        row("gradcam", "bfloat16", 0.6, 0.4),
        row("gradcam", "float32", 0.9, 0.5),
        row("xgradcam", "float32", 0.5, 1.0),
    ]
    half, _, other = found
    assert "10.0 to 10.0 a nanosecond in these rows, 4.0 to 4.0 in those of float32" in bench_cam._why(found, [half])
    assert "75% to 75% of read bandwidth" in bench_cam._why(found, [other])
    assert bench_cam._why(found, [half, other]).startswith("torch.dot of the same inputs reaches 60% to 72% of read")


def test_who_is_no_faster_than_compile_by_less_than_the_spread_is_said_to_be() -> None:
    even = {"ms_p20": 1.8, "ms_p80": 2.0, "compile_ms_p20": 1.7, "compile_ms_p80": 1.9}
    slower = even | {"ms_p20": 1.95}
    assert bench_cam._why_not_faster([even, slower]).endswith("overlap in 1 of 2: 1.8 to 2 ms beside 1.7 to 1.9")
    assert bench_cam._why_not_faster([slower]) == ""


def test_a_kept_bar_is_shown_too() -> None:
    text = report.as_markdown(_report(1.0), ENVIRONMENT)
    assert "no slower than the other: kept in all 2 rows" in text
    assert "missed" not in text


def test_growth_of_memory_is_found() -> None:
    def samples(kb_per_explanation: float) -> list[report.Row]:
        return [
            {"explanations": count, "resident_kb": 300_000.0 + kb_per_explanation * count}
            for count in range(0, 100_001, 1_000)
        ]

    settings = {"backend": "cpu", "threads": 1}
    leaking = bench_memory.report(samples(0.1), settings, every=1_000)
    flat = bench_memory.report(samples(0.0), settings, every=1_000)

    assert leaking.rows[0]["growth_kb_per_100000"] == pytest.approx(10_000)
    assert len(leaking.missed()) == 1
    assert flat.rows[0]["growth_kb_per_100000"] == pytest.approx(0, abs=1e-3)
    assert flat.missed() == []


def test_results_are_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    report.write(_report(1.0), ENVIRONMENT, tmp_path)
    before = (tmp_path / "example.json").read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        report.write(_report(float("nan")), ENVIRONMENT, tmp_path)
    assert (tmp_path / "example.json").read_bytes() == before
    assert _files(tmp_path) == {"example.json", "example.csv", "example.md"}
