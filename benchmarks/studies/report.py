"""One page of every study whose results lie in a folder: HTML that holds its pictures, and Markdown that links to them.

    python -m benchmarks.studies.report FOLDER

The HTML page loads nothing and runs nothing. What comes out of files is escaped.
"""

from __future__ import annotations

import base64
import json
import re
import sys
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.studies import STUDIES
from diffcam_fast.benchmark import machine
from diffcam_fast.models.files import write_atomically

PAGE = "report.html"
SUMMARY = "report.md"
VERDICTS = {True: "holds", False: "does not hold", None: "cannot be told"}

_PICTURE = re.compile(r"[a-z0-9_-]+\.png")
_TABLE = re.compile(r"[a-z0-9_-]+\.csv")
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MAX_BYTES = 16 * 2**20
_SHORT = 12

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
body { color: #1b1b1b; background: #fff; }
h1, h2, h3 { line-height: 1.2; }
h2 { margin-top: 3rem; border-bottom: 2px solid #ccc; }
h3 { margin-top: 2rem; }
nav a { margin-right: 1rem; }
p, li { max-width: 48rem; }
.origin, figcaption, .note { color: #555; font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: left; }
td.number, th.number { text-align: right; }
th { position: sticky; top: 0; background: #f3f3f3; }
figure { margin: 1.5rem 0; }
img { max-width: 100%; height: auto; }
summary { cursor: pointer; }
.quick { background: #fff4cf; padding: .5rem 1rem; }
.verdict { font-weight: 600; padding: 0 .4rem; border-radius: .2rem; }
.holds { background: #d6f0dc; }
.does-not-hold { background: #f8d7d4; }
.cannot-be-told { background: #e8e8e8; }
"""


def write(folder: Path) -> Path:
    """Make both pages from the studies in a folder, and write them there; returns the HTML page's path.

    Raises:
        ValueError: a file of results is not one, or is larger than 16 MiB.
    """
    studies = sorted((_read(path) for path in sorted(folder.glob("*.json"))), key=_place)
    pages = {PAGE: page(studies, folder), SUMMARY: summary(studies)}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pages.items():
        write_atomically(folder / name, text.encode())
    return folder / PAGE


def page(studies: list[dict[str, Any]], folder: Path) -> str:
    """The page's HTML; pictures are taken out of the folder."""
    links = " ".join(f'<a href="#{escape(study["study"])}">{escape(study["title"])}</a>' for study in studies)
    sections = "\n".join(_section(study, folder) for study in studies)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>How far explanations can be trusted</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>How far explanations can be trusted</h1>\n<nav>{links}</nav>\n{sections}\n</body>\n</html>\n"
    )


def summary(studies: list[dict[str, Any]]) -> str:
    """What came out, in Markdown, with links to the pictures and tables beside it."""
    lines = ["# How far explanations can be trusted"]
    for study in studies:
        lines += [
            "",
            f"## {escape(study['title'])}",
            "",
            escape(study["question"], quote=False),
            "",
            _origin(study),
            "",
        ]
        for claim in study["claims"]:
            said, found = (escape(claim[part], quote=False) for part in ("says", "found"))
            lines.append(f"- **{VERDICTS[claim['holds']]}:** {said} {found}")
        for figure in study["figures"]:
            lines += [
                "",
                f"![{escape(figure['title'])}]({_picture(figure)})",
                "",
                escape(figure["caption"], quote=False),
            ]
        files = ", ".join(f"[{escape(table['title'])}]({_named(table, _TABLE)})" for table in study["tables"])
        lines += ["", f"Tables: {files}"]
    return "\n".join(lines) + "\n"


def _place(study: dict[str, Any]) -> int:
    return STUDIES.index(study["study"]) if study["study"] in STUDIES else len(STUDIES)


def _section(study: dict[str, Any], folder: Path) -> str:
    parts = [
        f'<section id="{escape(study["study"])}">',
        f"<h2>{escape(study['title'])}</h2>",
        f"<p>{escape(study['question'])}</p>",
    ]
    if study["settings"]["size"] == "quick":
        parts.append('<p class="quick">Quick size: it shows that the study runs; its figures mean little.</p>')
    parts.append(f'<p class="origin">{_origin(study)}</p>')
    if study["claims"]:
        parts += ["<h3>What came out</h3>", "<ul>", *(_claim(claim) for claim in study["claims"]), "</ul>"]
    parts += [_figure(figure, folder) for figure in study["figures"]]
    parts += [_table(table) for table in study["tables"]]
    parts.append("</section>")
    return "\n".join(parts)


def _origin(study: dict[str, Any]) -> str:
    """Where the results come from, as HTML."""
    settings, environment = study["settings"], study["environment"]
    network = f", network {settings['network']}" if settings["network"] else ""
    return (
        f"<code>{escape(environment['command'])}</code>, {escape(environment['date'])}, seed {settings['seed']}"
        f"{escape(network)}, {settings['size']} size, {study['duration_s']:.0f} s on {escape(settings['device'])}. "
        f"Commit: {escape(machine.commit_line(environment))}. {escape(machine.one_line(environment))}."
    )


def _claim(claim: dict[str, Any]) -> str:
    verdict = VERDICTS[claim["holds"]]
    mark = f'<span class="verdict {verdict.replace(" ", "-")}">{verdict}</span>'
    return f"<li>{mark} {escape(claim['says'])} <em>{escape(claim['found'])}</em></li>"


def _figure(figure: dict[str, Any], folder: Path) -> str:
    name = _picture(figure)
    data = _content(folder / name)
    if not data.startswith(_SIGNATURE):
        raise ValueError(f"{name}: not a PNG file")
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return (
        f"<h3>{escape(figure['title'])}</h3>\n"
        f'<figure><img src="{source}" alt="{escape(figure["title"])}">'
        f"<figcaption>{escape(figure['caption'])}</figcaption></figure>"
    )


def _picture(figure: dict[str, Any]) -> str:
    return _named(figure, _PICTURE)


def _named(part: dict[str, Any], names: re.Pattern[str]) -> str:
    name = part["file"]
    if not isinstance(name, str) or not names.fullmatch(name):
        raise ValueError(f"file: got {name!r}; expected the name of a PNG or CSV file beside the results")
    return name


def _table(table: dict[str, Any]) -> str:
    rows, formats = table["rows"], table["formats"]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    numbers = {
        column
        for column in columns
        if all(isinstance(row.get(column), (int, float, type(None))) for row in rows)
        and not any(isinstance(row.get(column), bool) for row in rows)
    }
    head = "".join(f"<th{_aligned(column in numbers)}>{escape(column)}</th>" for column in columns)
    body = "\n".join(
        "<tr>"
        + "".join(
            f"<td{_aligned(column in numbers)}>{escape(_cell(row.get(column), formats.get(column, '')))}</td>"
            for column in columns
        )
        + "</tr>"
        for row in rows
    )
    note = f'<p class="note">{escape(table["note"])}</p>\n' if table["note"] else ""
    content = f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
    if len(rows) > _SHORT:
        content = f"<details><summary>{len(rows)} rows</summary>\n{content}\n</details>"
    return f"<h3>{escape(table['title'])}</h3>\n{note}{content}"


def _aligned(number: bool) -> str:
    return ' class="number"' if number else ""


def _cell(value: Any, show: str) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:{show}}" if isinstance(value, (int, float)) else str(value)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_content(path))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path.name}: not JSON: {error}") from error
    expected = {"study", "title", "question", "settings", "duration_s", "environment", "claims", "tables", "figures"}
    if not isinstance(content, dict) or not expected <= content.keys():
        raise ValueError(f"{path.name}: not the results of a study; expected the keys {', '.join(sorted(expected))}")
    return content


def _content(path: Path) -> bytes:
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path.name}: got {path.stat().st_size} bytes; expected at most {_MAX_BYTES}")
    return path.read_bytes()


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
