"""What a benchmark hands back, and its files; see `diffcam_fast.benchmark.report`."""

from diffcam_fast.benchmark.report import (
    Bar,
    Column,
    Report,
    Row,
    Table,
    as_csv,
    as_json,
    as_markdown,
    bar_lines,
    table_lines,
    write,
)

__all__ = [
    "Bar",
    "Column",
    "Report",
    "Row",
    "Table",
    "as_csv",
    "as_json",
    "as_markdown",
    "bar_lines",
    "table_lines",
    "write",
]
