"""What `make gpu` does around the GPU: limits to time, crashes, logs, tables. None of it needs one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import environment, report
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import device, measure, phases, results, sanitizer
from benchmarks.gpu.case import Case
from benchmarks.gpu.phases import Command, Outcome, Phase
from benchmarks.gpu.timing import Settings
from tests.gpu import __main__ as runner

ENVIRONMENT = environment.describe("a test")
QUICK = Settings("cpu", quick=True)


# --- time


def _phase(limit: float, least: float) -> Phase:
    return Phase((Command("any", []),), limit, least)


@pytest.mark.parametrize(
    ("index", "left", "expected"),
    [
        (0, 500.0, 100.0),  # its limit
        (0, 120.0, 70.0),  # what later phases need at least stays theirs
        (0, 40.0, 40.0),  # not enough for all: the first comes first
        (0, 5.0, 0.0),
        (2, 25.0, 25.0),
        (2, 19.0, 0.0),
    ],
)
def test_a_phase_gets_what_later_ones_can_spare(index: int, left: float, expected: float) -> None:
    planned = [_phase(100, 10), _phase(200, 30), _phase(300, 20)]
    assert phases.allowance(planned, index, left) == expected


def _python(name: str, code: str, **options: Any) -> Command:
    return Command(name, [sys.executable, "-c", textwrap.dedent(code)], **options)


def test_what_hangs_or_fails_stops_nothing_else(tmp_path: Path) -> None:
    hanging = """
        import subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print(child.pid, flush=True)
        time.sleep(600)
    """
    began = time.monotonic()
    found = phases.run(
        [
            Phase((_python("hangs", hanging), _python("passes", "print('side by side')")), limit=3, least=1),
            Phase((_python("fails", "import sys; print('the reason'); sys.exit(4)"),), limit=20, least=1),
            Phase((Command("absent", ["no-such-program"]),), limit=5, least=1),
            Phase((_python("told", "import sys; print(sys.argv)", told_seconds=True),), limit=10, least=1),
        ],
        60,
        tmp_path,
        lambda text: None,
    )
    assert time.monotonic() - began < 50
    states = {outcome.name: outcome.state for outcome in found}
    assert states == {
        "hangs": "out of time", "passes": "passed", "fails": "failed", "absent": "failed", "told": "passed"
    }  # fmt: skip
    details = {outcome.name: outcome.detail for outcome in found}
    assert details["fails"] == "the reason" and "no-such-program" in details["absent"]
    assert "--seconds" in (tmp_path / "told.log").read_text()
    # What a command started ends with it.
    child = int((tmp_path / "hangs.log").read_text())
    stat = Path(f"/proc/{child}/stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z"


def test_without_time_nothing_is_begun(tmp_path: Path) -> None:
    (outcome,) = phases.run([Phase((_python("late", "1 / 0"),), 10, 5)], 1, tmp_path, lambda text: None)
    assert (outcome.state, outcome.bad) == ("not run", False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_nothing_is_run_or_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--output", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().out and not any(tmp_path.iterdir())


def test_the_plan_is_said_and_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--plan"]) == 0
    said = capsys.readouterr().out
    assert all(f"measure {name} --rows" in said for name in measure.BENCHMARKS)


def test_the_plan_fits_into_nine_minutes(tmp_path: Path) -> None:
    planned = command.plan(tmp_path, "cuda", quick=False)
    assert command.SECONDS <= 540
    assert sum(phase.least for phase in planned) <= command.SECONDS
    names = [name.name for phase in planned for name in phase.commands]
    assert names[:3] == ["build", "device", "tests"]
    assert set(measure.BENCHMARKS) <= set(names)


# --- measuring


def test_a_case_that_fails_is_recorded_and_the_next_one_measured() -> None:
    def fail() -> report.Row:
        raise ValueError("wrong")

    records: list[dict[str, Any]] = []
    chosen = [Case("first", fail), Case("second", lambda: {"ms": 1.0}), Case("third", lambda: {"ms": float("nan")})]
    assert measure.run("cam", chosen, QUICK, records.append) == 2
    assert records == [
        {"benchmark": "cam", "failed": "first", "reason": "ValueError: wrong"},
        {"benchmark": "cam", "ms": 1.0},
        {"benchmark": "cam", "failed": "third", "reason": "ValueError: ms: not a finite number"},
    ]


def test_cases_without_time_are_listed() -> None:
    records: list[dict[str, Any]] = []
    late = Settings("cpu", quick=True, deadline=time.monotonic() + 1)
    chosen = [Case("short", lambda: {"ms": 1.0}, 0.0), Case("long", lambda: {}, 9.0), Case("next", lambda: {}, 0.0)]
    assert measure.run("compile", chosen, late, records.append) == 0
    assert [record.get("left_out") for record in records] == [None, "long", "next"]


@pytest.mark.parametrize("name", ["cam", "one_image", "logit_difference", "overlay", "saliency_contrast"])
def test_a_smoke_run_gives_rows_for_the_tables(name: str, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    assert measure.main([name, "--device", "cpu", "--quick", "--rows", str(rows)]) == 0
    records = command.read_records(rows)
    assert records and not any("failed" in record for record in records)
    (table, *_) = results.tables(records)
    for column in table.columns:
        beside_others = column.key.startswith(("triton", "compile", "vs_compile"))
        assert beside_others or all(column.key in row for row in table.rows), column
    for row in records:
        assert row["error"] < 2e-3
        if "share_of_copy" in row:
            assert row["share_of_copy"] == pytest.approx(row["gb_per_s"] / row["copy_gb_per_s"])


def test_a_wrong_kernel_gives_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu import cam_inputs

    right = cam_inputs.dcf.cam
    monkeypatch.setattr(cam_inputs.dcf, "cam", lambda *arguments: 1.001 * right(*arguments))
    records: list[dict[str, Any]] = []
    assert measure.run("cam", measure.cases("cam", QUICK), QUICK, records.append) == 2
    assert all("error 0.001 where at most" in record["reason"] for record in records)


# --- results


def _cam(share: float, **columns: Any) -> report.Row:
    row = {"benchmark": "cam", "method": "gradcam", "shape": "668x2048x7x7", "layout": "contiguous", "dtype": "float32"}
    return row | {"ms": 0.1, "gb_per_s": 100.0, "share_of_copy": share, "vs_eager": 0.1, **columns}


RECORDS = [
    _cam(0.9),
    _cam(0.7, layout="channels-last"),
    _cam(0.8, method="xgradcam"),
    _cam(0.1, method="elementwise"),
    {**{key: _cam(1.0)[key] for key in results.KEY}, "benchmark": "compile", "compile_ms": 0.09, "vs_compile": 1.1},
    {"benchmark": "compile", "left_out": "xgradcam, 1", "reason": "no time left"},
    {"benchmark": "compile", "left_out": "xgradcam, 2", "reason": "no time left"},
    {"benchmark": "overlay", "failed": "256x3", "reason": "RuntimeError: out of memory"},
    {
        "benchmark": "end_to_end", "network": "vit_b_16", "batch": 1, "dtype": "bfloat16",
        "inference_ms": 2.0, "multiple": 1.2, "torchcam_multiple": 2.0, "captum_absent": "it does not make these maps",
    },
    {"benchmark": "logit_difference", "shape": "1x1000", "baseline": "max", "dtype": "float32", "vs_allowed": 2.0,
     "judged": False},
]  # fmt: skip
DEVICE = {
    "name": "NVIDIA H200", "capability": "9.0", "multiprocessors": 132, "l2_bytes": 60 << 20,
    "memory_bytes": 140 << 30, "driver": {"driver": "580.1"}, "busy": {"sm_clock_mhz": "1980"},
    "versions": {"torch": "2.11", "cuda": "13.0", "triton": None},
}  # fmt: skip


def _found(outcomes: list[Outcome] | None = None) -> report.Report:
    return results.report(RECORDS, outcomes or [], DEVICE, {"tests": {}})


def test_limits_are_for_the_rows_that_they_are_set_for() -> None:
    missed = {(bar.column, results.label(row)) for bar, row in _found().missed()}
    assert missed == {
        ("share_of_copy", "cam, gradcam, 668x2048x7x7, channels-last, float32"),
        ("vs_compile", "cam, gradcam, 668x2048x7x7, contiguous, float32"),
    }


def test_the_table_says_what_was_measured_on_what_and_what_was_not(tmp_path: Path) -> None:
    outcomes = [Outcome("build", "passed", 61.0), Outcome("memcheck", "failed", 20.0, "1 findings")]
    found = _found(outcomes)
    assert found.name == "gpu-nvidia-h200"
    report.write(found, ENVIRONMENT, tmp_path)
    text = (tmp_path / "gpu-nvidia-h200.md").read_text()
    for line in (
        "- device: NVIDIA H200, capability 9.0, 132 multiprocessors, L2 60 MiB, 140 GiB",
        "- driver 580.1; multiprocessors 1980 MHz while copying",
        "- torch 2.11, cuda 13.0\n",
        "- build: passed in 61 s\n- memcheck: **failed** in 20 s: 1 findings",
        "- overlay, 256x3: **failed**: RuntimeError: out of memory",
        "- compile, no time left: xgradcam, 1; xgradcam, 2",
        "- captum: it does not make these maps (vit_b_16, batch 1)",
        "| 668x2048x7x7 | channels-last | float32 | 0.1 | 100 | **70.0% missed** |",
        "gradcam, 256 MB and more: at least 85% of copy bandwidth: **missed in 1 of 2 rows**",
        "hirescam, 256 MB and more: at least 85% of copy bandwidth: no row to judge",
        "| vit_b_16 | 1 | 2 | 1.200 | - | - | 2.00 |",
    ):
        assert line in text, line
    stored = json.loads((tmp_path / "gpu-nvidia-h200.json").read_text())
    assert stored["details"]["device"]["driver"] == {"driver": "580.1"}
    assert len(stored["details"]["not_measured"]) == 3
    assert stored["environment"]["commit"] == ENVIRONMENT["commit"]


def test_what_was_measured_beside_torch_compile_alone_is_kept() -> None:
    rows, _ = results.join([RECORDS[4]])
    assert rows[0]["benchmark"] == "cam" and rows[0]["vs_compile"] == 1.1


def test_rows_written_before_a_benchmark_was_stopped_are_read(tmp_path: Path) -> None:
    (tmp_path / "rows").write_text('{"benchmark": "cam", "ms": 1}\n{"benchmark": "cam", "m')
    assert command.read_records(tmp_path / "rows") == [{"benchmark": "cam", "ms": 1}]
    assert command.read_records(tmp_path / "none") == []


def test_the_commit_may_be_given_where_there_is_no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_git", lambda *arguments: None)
    monkeypatch.delenv(command.COMMIT, raising=False)
    assert command.environment_of("a test")["commit"] is None
    monkeypatch.setenv(command.COMMIT, "abc123")
    assert {"commit": "abc123", "clean": True}.items() <= command.environment_of("a test").items()
    monkeypatch.setenv(command.COMMIT, "abc123-dirty")
    assert {"commit": "abc123", "clean": False}.items() <= command.environment_of("a test").items()


def test_a_gpu_without_our_kernels_is_a_failure() -> None:
    outcomes: list[Outcome] = []
    backends = {"cuda": {"available": False, "reason": "no nvcc"}, "triton": {"available": True, "reason": None}}
    command.require_backends({"library": {"backends": backends}}, outcomes)
    assert [(outcome.name, outcome.detail, outcome.bad) for outcome in outcomes] == [("cuda backend", "no nvcc", True)]


def test_the_driver_is_asked_for_what_it_knows() -> None:
    answer = "580.159.03, 345, 3201, 1980, 3201, 700.00, 31, [N/A]\n580.159.03, 1, 2\n"
    found = device.parse_answers(answer)
    assert found["driver"] == "580.159.03" and found["most_sm_clock_mhz"] == "1980" and "ecc" not in found
    assert device.parse_answers("") == {}


# --- compute-sanitizer

CLEAN = "========= COMPUTE-SANITIZER\nswept 132 calls\n========= ERROR SUMMARY: 0 errors\n"
FINDING = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at diffcam::cam_kernel(float*)+0x90
========= ERROR SUMMARY: 3 errors
"""
RACE = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at a and Read access at b [4 hazards]
swept 132 calls
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


@pytest.mark.parametrize(
    ("tool", "status", "log", "state", "detail"),
    [
        ("memcheck", 0, CLEAN, "passed", "0 findings, 132 calls"),
        (
            "memcheck",
            sanitizer.FOUND,
            FINDING,
            "failed",
            "3 findings, the calls were not finished: Invalid __global__ read",
        ),
        ("racecheck", sanitizer.FOUND, RACE, "failed", "1 findings, 132 calls: Error: Race reported"),
        # A clean summary of a program that crashed, or did nothing, is none.
        ("memcheck", -11, CLEAN.replace("swept 132 calls\n", ""), "failed", "ended with status -11"),
        ("memcheck", 0, CLEAN.replace("swept 132 calls\n", ""), "failed", "the calls were not finished"),
        ("memcheck", 1, CLEAN.replace("swept", "AssertionError"), "failed", "ended with status 1"),
        ("racecheck", 0, CLEAN, "failed", "ended with status 0"),
        ("memcheck", None, "========= COMPUTE-SANITIZER\n", "not run", "out of time"),
        ("memcheck", None, FINDING, "failed", "3 findings"),
        ("memcheck", 1, "========= Error: Device not supported. Please refer to\n", "not run", "Device not supported"),
    ],
)
def test_what_a_sanitizer_log_says(tool: str, status: int | None, log: str, state: str, detail: str) -> None:
    verdict = sanitizer.read(tool, status, log)
    assert verdict.state == state and detail in verdict.detail


def test_an_absent_sanitizer_is_said_to_be_absent() -> None:
    outcomes: list[Outcome] = []
    command.judge(outcomes)
    assert [outcome.line() for outcome in outcomes] == [
        f"{tool}: not run: compute-sanitizer is not installed" for tool in sanitizer.TOOLS
    ]


# --- the runner of tests/gpu


class _Scripted(runner.Unit):
    """Cases that do what their names say."""

    CODE = """
        import json, os, sys, time
        file, start, names = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
        if "broken import" in names:
            sys.exit("ImportError: broken")
        for index, name in enumerate(names[start:], start):
            with open(file, "a") as output:
                print(json.dumps({"started": index, "name": name}), file=output, flush=True)
                if name == "crash":
                    os.abort()
                if name == "hang":
                    time.sleep(600)
                outcome = "failed" if name in ("fail", "lose the device") else "passed"
                record = {"index": index, "name": name, "outcome": outcome, "message": name, "seconds": 0.0}
                print(json.dumps(record), file=output, flush=True)
            if name == "lose the device":
                sys.exit(3)
    """

    def command(self) -> list[str]:
        return [sys.executable, "-c", textwrap.dedent(self.CODE), str(self.file), str(len(self.results)), *self.names]


def _run(tmp_path: Path, *names: str, seconds: float = 60.0) -> dict[str, Any]:
    units = [_Scripted("any", None, tmp_path / "any.jsonl", list(names))]
    runner.run(units, jobs=2, seconds=seconds, case_seconds=3)
    return runner.summary(units)


def test_a_crash_a_hang_and_a_lost_device_cost_one_case_each(tmp_path: Path) -> None:
    found = _run(tmp_path, "pass", "crash", "fail", "lose the device", "hang", "pass too")
    assert (found["passed"], found["failed"], found["not_run"]) == (2, 4, 0)
    messages = {failure["name"]: failure["message"] for failure in found["failures"]}
    assert "ended with status -6" in messages["crash"]
    assert messages["hang"] == "no answer within 3 s"
    assert messages["lose the device"] == "lose the device"


def test_a_module_that_does_not_load_is_not_tried_for_every_case(tmp_path: Path) -> None:
    found = _run(tmp_path, "broken import", *("pass",) * 50)
    assert (tmp_path / "any.log").read_text().count("ImportError") == 1
    assert (found["failed"], found["not_run"]) == (51, 0)
    assert "ImportError: broken" in found["failures"][0]["message"]


def test_cases_beyond_the_time_are_counted(tmp_path: Path) -> None:
    found = _run(tmp_path, "pass", "hang", "pass too", seconds=2)
    assert (found["passed"], found["failed"], found["not_run"]) == (1, 0, 2)
    assert "not reached in the time given: hang and the 1 after it" in runner.show(found)


def test_the_gpu_tests_can_fail(tmp_path: Path) -> None:
    """A result that is off by a thousandth is found, on the CPU in place of a GPU, by torch and nothing else."""
    code = """
        import sys
        for name in ("pytest", "hypothesis", "tqdm", "matplotlib", "expecttest"):
            sys.modules[name] = None
        import torch
        from tests.gpu import cases, test_cam
        from tests.gpu.runner import Case, run
        right = test_cam.OP
        given = {"backend": "cpu" if cases.absent_because("cpu") is None else "reference", "method": "hirescam"}
        chosen = [Case("bits", test_cam.test_many_images_and_targets, given)]
        run(chosen, 0, sys.stdout)
        test_cam.OP = lambda *arguments: 1.001 * right(*arguments)
        run(chosen, 0, sys.stdout)
    """
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=environment.ROOT,
        env={**os.environ, "DIFFCAM_TEST_DEVICE": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == 0, found.stderr
    outcomes = [json.loads(line) for line in found.stdout.splitlines()]
    assert [outcome.get("outcome") for outcome in outcomes] == [None, "passed", None, "failed"]
    assert "error 0.001, allowed" in outcomes[3]["message"]
