"""What a benchmark hands back, and its files: JSON, CSV, a Markdown table and figures, each written atomically."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffcam_fast.benchmark import machine
from diffcam_fast.models.files import write_atomically

Row = dict[str, Any]


@dataclass(frozen=True)
class Bar:
    """A limit that a column of the results has to keep, and the rows it is for."""

    text: str
    column: str
    limit: float
    at_least: bool = False
    applies: Callable[[Row], bool] = lambda row: True
    show: str = ".3f"

    reason: str = ""
    """Why rows miss it, where that is known; shown beneath them."""

    def covers(self, row: Row) -> bool:
        """Whether the bar is for this row."""
        return row.get(self.column) is not None and self.applies(row)

    def missed(self, row: Row) -> bool:
        """Whether the row is one that the bar is for, and does not keep it."""
        if not self.covers(row):
            return False
        value = row[self.column]
        return not (value >= self.limit if self.at_least else value <= self.limit)

    def because(self, rows: Sequence[Row], reason: Callable[[list[Row]], str]) -> Bar:
        """The same, with the reason why some of the rows miss it, found from those that do."""
        missed = [row for row in rows if self.missed(row)]
        return replace(self, reason=reason(missed)) if missed else self


@dataclass(frozen=True)
class Column:
    """One column of a Markdown table: a heading, the row's key, and how its value is written."""

    heading: str
    key: str
    show: str = ""


@dataclass(frozen=True)
class Table:
    """Some of the rows, under a title."""

    title: str
    rows: Sequence[Row]
    columns: Sequence[Column]


@dataclass
class Report:
    """The outcome of one benchmark."""

    name: str
    """Stem of the files."""

    title: str
    introduction: str
    rows: list[Row]
    tables: list[Table]
    bars: list[Bar]
    label: Callable[[Row], str]
    """Names a row where it is listed."""

    details: dict[str, Any] = field(default_factory=dict)
    """How the measurement was set up and whatever else belongs in the JSON file."""

    figures: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    """File name to caption and PNG."""

    def missed(self) -> list[tuple[Bar, Row]]:
        """Every row that does not keep a bar."""
        return [(bar, row) for bar in self.bars for row in self.rows if bar.missed(row)]


def write(report: Report, environment: dict[str, Any], folder: Path) -> list[Path]:
    """Write a report's files, each complete or not at all; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        f"{report.name}.json": as_json(report, environment).encode(),
        f"{report.name}.csv": as_csv(report.rows).encode(),
        f"{report.name}.md": as_markdown(report, environment).encode(),
        **{name: picture for name, (_, picture) in report.figures.items()},
    }
    for name, content in contents.items():
        write_atomically(folder / name, content)
    return [folder / name for name in contents]


def as_json(report: Report, environment: dict[str, Any]) -> str:
    """Everything, for machines."""
    content = {
        "benchmark": report.name,
        "environment": environment,
        "details": report.details,
        "figures": {name: caption for name, (caption, _) in report.figures.items()},
        "bars": [
            {
                "bar": bar.text,
                "column": bar.column,
                "rows": sum(bar.covers(row) for row in report.rows),
                "missed": [report.label(row) for row in report.rows if bar.missed(row)],
                **({"reason": bar.reason} if bar.reason else {}),
            }
            for bar in report.bars
        ],
        "rows": report.rows,
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def as_csv(rows: Sequence[Row]) -> str:
    """The rows; a column is the union of what rows have."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_markdown(report: Report, environment: dict[str, Any]) -> str:
    """Tables for people, with the missed bars marked in the cells and listed beneath."""
    lines = [
        f"# {report.title}",
        "",
        f"- machine and versions: {machine.one_line(environment)}",
        *([f"- commit: {machine.commit_line(environment)}"] if "commit" in environment else []),
        f"- command: `{environment['command']}`, {environment['date']}, "
        f"load average at the start {environment['machine']['load_average_at_start']}",
        "",
        report.introduction,
    ]
    for table in report.tables:
        lines += ["", f"## {table.title}", "", *table_lines(table, report.bars)]
    for name, (caption, _) in report.figures.items():
        lines += ["", f"![{caption}]({name})", "", caption]
    if report.bars:
        lines += ["", "## Bars", "", *bar_lines(report)]
    return "\n".join(lines) + "\n"


def bar_lines(report: Report) -> list[str]:
    """For each bar whether it is kept, and every row that misses it."""
    lines = []
    for bar in report.bars:
        covered = [row for row in report.rows if bar.covers(row)]
        missed = [row for row in covered if bar.missed(row)]
        if not covered:
            lines.append(f"- {bar.text}: no row to judge")
        elif not missed:
            lines.append(f"- {bar.text}: kept in all {len(covered)} rows")
        else:
            lines.append(f"- {bar.text}: **missed in {len(missed)} of {len(covered)} rows**")
            lines += [f"    - {report.label(row)}: {row[bar.column]:{bar.show}}" for row in missed]
            lines += [f"    - why: {bar.reason}"] * bool(bar.reason)
    return lines


def table_lines(table: Table, bars: Sequence[Bar] = ()) -> list[str]:
    """A table in Markdown, without its title."""
    lines = [
        "| " + " | ".join(column.heading for column in table.columns) + " |",
        "|" + "|".join("---:" if column.show else "---" for column in table.columns) + "|",
    ]
    for row in table.rows:
        cells = [_cell(row, column, bars) for column in table.columns]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def text_lines(table: Table) -> list[str]:
    """A table for a terminal, without its title: columns aligned by blanks."""
    cells = [[column.heading for column in table.columns]]
    cells += [[_cell(row, column, ()) for column in table.columns] for row in table.rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if column.show else cell.ljust(width)
            for cell, width, column in zip(line, widths, table.columns, strict=True)
        ).rstrip()
        for line in cells
    ]


def _cell(row: Row, column: Column, bars: Sequence[Bar]) -> str:
    value = row.get(column.key)
    if value is None:
        return "-"
    text = f"{value:{column.show}}"
    missed = any(bar.column == column.key and bar.missed(row) for bar in bars)
    return f"**{text} missed**" if missed else text
