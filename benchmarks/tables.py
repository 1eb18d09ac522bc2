"""Tables in the documentation made from the committed results: `python -m benchmarks.tables [--check]`.

A table stands between two comments, the first of which names it:

    <!-- results: cam -->
    <!-- end -->

What is between them is replaced; a result that is not there leaves nothing between them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import environment
from benchmarks.report import Column, Row, Table, table_lines
from benchmarks.studies import STUDIES
from benchmarks.studies.report import VERDICTS
from diffcam_fast.benchmark import peers

README = environment.ROOT / "README.md"
PAGES = (README, environment.ROOT / "docs" / "migration.md")

_PLACE = re.compile(r"(<!-- results: ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)

Content = dict[str, Any]


def cam(content: Content) -> list[str]:
    """Milliseconds by shape for each dtype and layout, with our time as a share of torch.compile's."""
    threads = max(row["threads"] for row in content["rows"])
    rows: dict[str, Row] = {}
    kinds = {}
    for row in content["rows"]:
        if (row["method"], row["threads"], row["cache"]) == ("gradcam", threads, "cold"):
            kind = f"{row['dtype']}, {row['layout']}"
            kinds[kind] = (row["dtype"] != "float32", row["layout"] != "contiguous")
            cells = rows.setdefault(row["shape"], {"shape": row["shape"]})
            cells[kind] = f"{row['ms']:.3g} ({row['vs_compile']:.2f})"
    columns = [Column(kind, kind, "s") for kind in sorted(kinds, key=kinds.__getitem__)]
    return table_lines(Table("", list(rows.values()), [Column("activations", "shape"), *columns]))


def end_to_end(content: Content) -> list[str]:
    """Multiples of plain inference, ours, the floor and the peers'; misses in bold."""
    present = [name for name in peers.PEERS if any(name in row for row in content["rows"])]
    rows = [_marked(row, present, content["bars"]) for row in content["rows"] if "layers" in row]
    columns = [
        Column("work", "work"),
        Column("network, batch", "place"),
        Column("diffcam_fast", "ours", "s"),
        Column("floor", "floor", ".2f"),
        *([Column("channels-last", "channels_last", ".2f")] if any("channels_last" in row for row in rows) else []),
        *(Column(peers.PEERS[name].title, name, "s") for name in present),
    ]
    return table_lines(Table("", rows, columns))


def _marked(row: Row, present: Sequence[str], bars: Sequence[Content]) -> Row:
    place = f"{row['network']}, {row['batch']}"
    label = f"{row['work']}, {row['network']}, batch {row['batch']}"
    missed = any(label in bar["missed"] for bar in bars if bar["column"] in ("multiple", "vs_floor"))
    found = {"work": row["work"], "place": place, "floor": row["floor"]}
    if "channels_last" in row:
        found["channels_last"] = row["channels_last"]
    found["ours"] = f"**{row['multiple']:.3f}, missed**" if missed else f"{row['multiple']:.3f}"
    for name in present:
        if name in row:
            # For a part of the work alone.
            least = "over " if f"{name}_classes" in row else ""
            found[name] = f"{least}{row[name]:.2f}"
    return found


def compat(content: Content) -> list[str]:
    """How many times faster each class of a drop-in is than the original's, by network and batch; misses in bold."""
    missed = {label for bar in content["bars"] for label in bar["missed"]}
    rows: dict[tuple[str, str], Row] = {}
    places = {}
    for row in content["rows"]:
        place = f"{row['network']}, {row['batch']}"
        places[place] = None
        cells = rows.setdefault((row["library"], row["class"]), {"class": f"{row['library']} `{row['class']}`"})
        label = f"{row['library']} {row['class']}, {row['network']}, batch {row['batch']}"
        cells[place] = f"**{row['faster']:.2f}, missed**" if label in missed else f"{row['faster']:.2f}"
    columns = [Column(place, place, "s") for place in places]
    return table_lines(Table("", list(rows.values()), [Column("class", "class"), *columns]))


def bars(content: Content) -> list[str]:
    """Each limit of a result, and how many rows miss it."""
    lines = []
    for bar in content["bars"]:
        if bar["rows"]:
            missed = f"**missed in {len(bar['missed'])} of {bar['rows']} rows**"
            lines.append(f"- {bar['bar']}: {missed if bar['missed'] else 'kept in all ' + str(bar['rows']) + ' rows'}")
    return lines


def studies(contents: Content) -> list[str]:
    """For each study how many of the claims put to the test held."""
    rows: list[Row] = []
    for name in STUDIES:
        if name in contents:
            content = contents[name]
            verdicts = [claim["holds"] for claim in content["claims"]]
            row: Row = {"study": f"`{name}`", "title": content["title"], "minutes": content["duration_s"] / 60}
            rows.append(row | {word: verdicts.count(holds) for holds, word in VERDICTS.items()})
    columns = [Column("study", "study"), Column("", "title"), Column("minutes", "minutes", ".0f")]
    return table_lines(Table("", rows, [*columns, *(Column(word, word, "d") for word in VERDICTS.values())]))


TABLES: dict[str, Callable[[Content], list[str]]] = {
    "cam": cam,
    "end_to_end": end_to_end,
    "compat": compat,
    "studies": studies,
}
"""By the benchmark whose results they show. Its limits: the name with "bars" behind it, for any benchmark."""


def render(text: str, folder: Path = environment.RESULTS) -> str:
    """A text with its tables as the results have them.

    Args:
        text: Markdown with marked places.
        folder: where the results are.

    Raises:
        ValueError: a place for a table that there is not.
    """

    def filled(place: re.Match[str]) -> str:
        name, _, kind = place[2].partition(" ")
        make = bars if kind == "bars" else TABLES.get(name) if not kind else None
        if make is None:
            raise ValueError(f"results: expected {', '.join(TABLES)}, or a benchmark with 'bars'; got {place[2]!r}")
        content = _results(folder / name)
        lines = make(content) if content else []
        return place[1] + "".join(f"{line}\n" for line in lines) + place[3]

    return _PLACE.sub(filled, text)


def _results(path: Path) -> Content:
    """A result, or all that a folder holds by name; nothing where there is none."""
    if path.is_dir():
        return {file.stem: json.loads(file.read_text()) for file in path.glob("*.json")}
    file = path.with_suffix(".json")
    return json.loads(file.read_text()) if file.is_file() else {}


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite the pages; with --check only say whether that would change them, as 1."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description="Tables in the documentation.")
    parser.add_argument("--check", action="store_true", help="change nothing; 1 where the tables are not up to date")
    options = parser.parse_args(arguments)
    status = 0
    for page in PAGES:
        text = page.read_text()
        found = render(text)
        if found == text:
            continue
        if options.check:
            print(f"{page.name}: tables differ from the results: python -m benchmarks.tables", file=sys.stderr)
            status = 1
        else:
            page.write_text(found)
            print(f"written: {page}")
    return status


if __name__ == "__main__":
    sys.exit(main())
