"""From rows to a report: what belongs together, the tables, and the limits that are set for a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.gpu import device
from benchmarks.gpu.phases import Outcome
from benchmarks.report import Bar, Column, Report, Row, Table

#: The least share of the copy bandwidth, by method. No limit is set for the others.
SHARE_OF_COPY = {"gradcam": 0.85, "hirescam": 0.85, "layercam": 0.85, "gradcam++": 0.75, "xgradcam": 0.75}

ONE_IMAGE_MICROSECONDS = 6.0
CALL_VS_ADD = 2.0
VS_EAGER = 0.5

#: Columns that name a case of `cam`, by which what was measured beside torch.compile is joined.
KEY = ("method", "shape", "layout", "dtype")

COMPILED = {"compile": "cam", "compile_one_image": "one_image"}

PEER_TITLES = {
    "plain": "plain PyTorch",
    "torchcam": "torchcam",
    "captum": "captum",
    "pytorch_grad_cam": "pytorch-grad-cam",
}

INTRODUCTION = """\
Times are medians of the device's own events, with the 20th and 80th percentile in the CSV file; candidates alternate in
one process, and each was checked against the float64 reference before it was timed. *of copy*: the bytes that have to
be moved once, by the time, as a share of the bandwidth of a plain device-to-device copy (bytes read plus written) that
takes its turn in the same rounds. Inputs are random and rotate over buffers of several times the L2 cache. *vs ...*:
our time by theirs; **below 1 we are faster**. torch.compile: the reference, one graph, for exactly these inputs,
`max-autotune-no-cudagraphs`, compile time not counted. Microseconds of GPU time are those of one call among many in a
CUDA graph, gaps included. Explained inference: by the processor's clock, until the maps are there."""


def join(records: Iterable[dict[str, Any]]) -> tuple[list[Row], list[dict[str, Any]]]:
    """Rows, each with what was measured beside torch.compile in the same case; and what failed or was left out."""
    records = list(records)
    rows = [record for record in records if not {"failed", "left_out"} & record.keys()]
    missing = [record for record in records if {"failed", "left_out"} & record.keys()]
    found = [dict(row) for row in rows if row["benchmark"] not in COMPILED]
    by_case = {(row["benchmark"], *(row.get(key) for key in KEY)): row for row in found}
    for row in rows:
        if row["benchmark"] in COMPILED:
            key = (COMPILED[row["benchmark"]], *(row.get(name) for name in KEY))
            mine = by_case.get(key)
            if mine is None:
                # What it was to be joined to failed; it is a row of its own then.
                mine = {"benchmark": key[0]}
                found.append(mine)
            mine |= {name: value for name, value in row.items() if name != "benchmark"}
    return found, missing


def bars() -> list[Bar]:
    """The limits."""

    def of(benchmark: str, **wanted: Any) -> Any:
        return lambda row: row["benchmark"] == benchmark and all(row.get(key) == value for key, value in wanted.items())

    found = [
        Bar(
            f"{method}, 256 MB and more: at least {share:.0%} of copy bandwidth",
            "share_of_copy",
            share,
            at_least=True,
            applies=of("cam", method=method),
            show=".1%",
        )
        for method, share in SHARE_OF_COPY.items()
    ]
    for benchmark, name in (("cam", "cam, batches"), ("one_image", "cam, one image")):
        found += [
            Bar(f"{name}: faster than torch.compile (max-autotune)", "vs_compile", 1.0, applies=of(benchmark)),
            Bar(f"{name}: at most half of eager's time", "vs_eager", VS_EAGER, applies=of(benchmark)),
        ]
    return [
        *found,
        Bar(
            f"cam, one image, cold: at most {ONE_IMAGE_MICROSECONDS:g} microseconds of GPU time",
            "gpu_us",
            ONE_IMAGE_MICROSECONDS,
            applies=of("one_image"),
            show=".2f",
        ),
        Bar(
            "cam, one image: a whole call from Python within twice that of torch.add",
            "call_vs_add",
            CALL_VS_ADD,
            applies=of("one_image"),
            show=".2f",
        ),
        Bar(
            "logit_difference, 4096x1000 and 256x262144: 75% of copy bandwidth, or 8 microseconds where they are more",
            "vs_allowed",
            1.0,
            applies=of("logit_difference", judged=True),
            show=".2f",
        ),
    ]


def tables(rows: Sequence[Row]) -> list[Table]:
    """Those that have rows."""

    def of(benchmark: str, **wanted: Any) -> list[Row]:
        return [
            row
            for row in rows
            if row["benchmark"] == benchmark and all(row.get(key) == value for key, value in wanted.items())
        ]

    place = [Column("shape", "shape"), Column("layout", "layout"), Column("dtype", "dtype")]
    versus = [
        Column("compile ms", "compile_ms", ".3g"),
        Column("vs compile", "vs_compile", ".2f"),
        Column("vs eager", "vs_eager", ".3f"),
    ]
    bandwidth = [
        Column("ms", "ms", ".4g"),
        Column("GB/s", "gb_per_s", ".0f"),
        Column("of copy", "share_of_copy", ".1%"),
    ]
    found = [
        Table(
            f"cam: {method}",
            of("cam", method=method),
            [
                *place,
                *bandwidth,
                Column("Triton ms", "triton_ms", ".4g"),
                Column("of copy", "triton_share", ".1%"),
                *versus,
            ],
        )
        for method in dict.fromkeys(row["method"] for row in of("cam"))
    ]
    found += [
        Table(
            "cam: one image",
            of("one_image"),
            [
                Column("method", "method"),
                *place[1:],
                Column("GPU us, cold", "gpu_us", ".2f"),
                Column("warm", "warm_gpu_us", ".2f"),
                Column("compile us", "compile_gpu_us", ".2f"),
                Column("vs compile", "vs_compile", ".2f"),
                Column("vs eager", "vs_eager", ".3f"),
                Column("call us", "call_us", ".1f"),
                Column("torch.add us", "add_us", ".1f"),
                Column("vs add", "call_vs_add", ".2f"),
            ],
        ),
        Table(
            "logit_difference",
            of("logit_difference"),
            [
                Column("shape", "shape"),
                Column("baseline", "baseline"),
                Column("dtype", "dtype"),
                Column("GPU us", "gpu_us", ".2f"),
                Column("of copy", "share_of_copy", ".1%"),
                Column("allowed us", "allowed_us", ".1f"),
                Column("vs allowed", "vs_allowed", ".2f"),
                Column("vs eager", "vs_eager", ".3f"),
            ],
        ),
        Table("overlay", of("overlay"), [*place, Column("blend", "blend"), *bandwidth, versus[2]]),
        Table(
            "saliency_contrast",
            of("saliency_contrast"),
            [*place, Column("energy", "energy"), *bandwidth, versus[2]],
        ),
        _end_to_end(of("end_to_end")),
    ]
    return [table for table in found if table.rows]


def _end_to_end(rows: list[Row]) -> Table:
    present = [name for name in PEER_TITLES if any(f"{name}_multiple" in row for row in rows)]
    return Table(
        "Explained inference, as a multiple of plain inference",
        rows,
        [
            Column("network", "network"),
            Column("batch", "batch", "d"),
            Column("inference ms", "inference_ms", ".3g"),
            Column("ours", "multiple", ".3f"),
            Column("inference as a graph, ms", "inference_graph_ms", ".3g"),
            Column("ours as a graph", "graph_multiple", ".3f"),
            *(Column(PEER_TITLES[name], f"{name}_multiple", ".2f") for name in present),
        ],
    )


def label(row: Row) -> str:
    """Names a row where it is listed."""
    keys = ("method", "network", "shape", "layout", "baseline", "blend", "dtype")
    parts = [str(row[key]) for key in keys if key in row]
    return ", ".join(
        [row["benchmark"].replace("_", " "), *parts, *([f"batch {row['batch']}"] if "batch" in row else [])]
    )


def report(
    records: Iterable[dict[str, Any]], outcomes: Sequence[Outcome], found: dict[str, Any], details: dict[str, Any]
) -> Report:
    """Everything that one run found out.

    Args:
        records: rows, and what failed or was left out, as the benchmarks wrote them.
        outcomes: of all phases.
        found: the device, as `device.describe` has it.
        details: of the tests and tools, for the JSON file.
    """
    rows, missing = join(records)
    name = found.get("name")
    lines = [*device.lines(found), *(f"- {outcome.line()}" for outcome in outcomes)]
    lines += ["", INTRODUCTION]
    if missing:
        lines += ["", "Not measured:", "", *_missing_lines(missing)]
    absent = _absent_peers(rows)
    if absent:
        lines += ["", "Peers that could not be compared with:", "", *absent]
    return Report(
        name=device.file_stem(name),
        title=f"On a GPU: {name or 'none'}",
        introduction="\n".join(lines),
        rows=rows,
        tables=tables(rows),
        bars=bars(),
        label=label,
        details={
            "device": found,
            "phases": [outcome.record() for outcome in outcomes],
            "not_measured": missing,
            **details,
        },
    )


def _missing_lines(missing: Sequence[dict[str, Any]]) -> list[str]:
    found = [
        f"- {record['benchmark']}, {record['failed']}: **failed**: {record['reason']}"
        for record in missing
        if "failed" in record
    ]
    late: dict[tuple[str, str], list[str]] = {}
    for record in missing:
        if "left_out" in record:
            late.setdefault((record["benchmark"], record["reason"]), []).append(record["left_out"])
    found += [f"- {benchmark}, {reason}: {'; '.join(cases)}" for (benchmark, reason), cases in late.items()]
    return found


def _absent_peers(rows: Sequence[Row]) -> list[str]:
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, title in PEER_TITLES.items():
            if f"{name}_absent" in row:
                case = f"{row['network']}, batch {row['batch']}"
                reasons.setdefault((title, row[f"{name}_absent"]), []).append(case)
    return [f"- {title}: {reason} ({'; '.join(cases)})" for (title, reason), cases in reasons.items()]
