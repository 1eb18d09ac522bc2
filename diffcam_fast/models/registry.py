"""Fetching one file from the package index that pip is configured with, without letting pip run anything in it.

`pip download` runs the setup of a source distribution to learn its metadata. So only pip's configuration and its
network access (index, mirrors, proxies, certificates, credentials) are used here; finding the file on the index's
page and reading it are done by this module.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit, urlunsplit
from urllib.request import url2pathname

_PAGE_TYPES = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
_MAX_PAGE_BYTES = 64 * 2**20
_CHUNK = 2**16


class FetchRefusedError(RuntimeError):
    """No configured place served the file: it could not be reached, refused, or does not have it."""


@dataclass(frozen=True)
class _Sources:
    """What pip is configured with: its network access, index pages by project, and further places with links."""

    network: Any
    indexes: list[str]
    find_links: list[str]


def fetch_archive(project: str, filename: str, size: int, *, progress: bool = True) -> bytes:
    """Fetch a file of a project. The caller checks its hash.

    Args:
        project: the package's name.
        filename: of the wheel or source distribution.
        size: in bytes; more than that is never read.
        progress: show a progress bar on the standard error.

    Raises:
        FetchRefusedError: no configured place served the file; the message says what each of them answered.
        ImportError: pip or tqdm is missing.
    """
    refusals = []
    with _sources() as sources:
        for place in _places(sources, project):
            try:
                link = _find_link(sources.network, place, filename)
                if link is None:
                    refusals.append(f"{_without_credentials(place)}: not offered")
                    continue
                return _read(sources.network, link, size, filename if progress else None)
            except OSError as error:  # network errors of pip's network access are OSErrors too
                refusals.append(f"{_without_credentials(place)}: {_without_credentials(str(error))}")
    listing = "; ".join(refusals) or "pip is configured without any index"
    raise FetchRefusedError(f"{filename} could not be fetched ({listing})")


def _import_pip() -> None:
    # Before Python 3.12 setuptools, where it is, watches for pip and hands distutils back to the standard library for
    # good when that is imported: setuptools itself cannot be imported any more, and torch.compile needs it.
    watching = [finder for finder in sys.meta_path if type(finder).__module__ == "_distutils_hack"]
    for finder in watching:
        sys.meta_path.remove(finder)
    try:
        importlib.import_module("pip")
    finally:
        sys.meta_path[:0] = watching


@contextmanager
def _sources() -> Iterator[_Sources]:
    try:
        _import_pip()
        from pip._internal.commands import create_command
    except ImportError as error:
        raise ImportError("fetching sample photos needs pip in this environment: python -m ensurepip") from error
    command: Any = create_command("download")
    with command.main_context():
        options, _ = command.parse_args(["--no-input"])
        indexes = [] if options.no_index else [options.index_url, *options.extra_index_urls]
        network = command.get_default_session(options)
        yield _Sources(network, [index for index in indexes if index], list(options.find_links or []))


def _places(sources: _Sources, project: str) -> Iterator[str]:
    """Pages or folders that may link to the project's files, in pip's own order of mention."""
    normalized = re.sub(r"[-_.]+", "-", project).lower()
    yield from sources.find_links
    for index in sources.indexes:
        yield f"{index.rstrip('/')}/{normalized}/"


def _find_link(network: Any, place: str, filename: str) -> str | None:
    """Address of the file that a page or folder offers, or None where it does not."""
    folder = _local_path(place)
    if folder is not None and folder.is_dir():
        if (folder / filename).is_file():
            return (folder / filename).resolve().as_uri()
        folder = folder / "index.html"
    if folder is not None:
        if not folder.is_file():
            return None
        return _parse_html(folder.read_text("utf-8", "replace"), folder.resolve().as_uri()).get(filename)
    with _get(network, place, _PAGE_TYPES) as response:
        page = _read_limited(response, _MAX_PAGE_BYTES).decode("utf-8", "replace")
        parse = _parse_json if "json" in response.headers.get("Content-Type", "") else _parse_html
        return parse(page, response.url).get(filename)


def _read(network: Any, link: str, size: int, label: str | None) -> bytes:
    path = _local_path(link)
    if path is not None:
        with path.open("rb") as file:
            return file.read(size + 1)
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("the progress bar needs tqdm: pip install 'diffcam_fast[cli]'") from error
    with (
        _get(network, link, "*/*") as response,
        tqdm(total=size, desc=label, unit="B", unit_scale=True, disable=None if label else True, leave=False) as bar,
    ):
        return _read_limited(response, size, bar)


def _get(network: Any, address: str, accept: str) -> Any:
    """The response to a request; whatever goes wrong is an OSError."""
    from pip._internal.exceptions import PipError

    headers = {"Accept": accept, "Accept-Encoding": "identity"}
    try:
        response = network.get(address, headers=headers, stream=True)
    except PipError as error:
        raise OSError(" ".join(str(getattr(error, "context", None) or error).split())) from error
    response.raise_for_status()
    return response


def _read_limited(response: Any, limit: int, bar: Any = None) -> bytes:
    """The body of a response, cut off once it is longer than the limit."""
    content = bytearray()
    for chunk in response.iter_content(_CHUNK):
        content += chunk
        if bar is not None:
            bar.update(len(chunk))
        if len(content) > limit:
            break
    return bytes(content[: limit + 1])


class _Links(HTMLParser):
    """The links of a simple index page (PEP 503), by the file name that each shows."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self.base = address
        self.links: dict[str, str] = {}
        self._target: str | None = None
        self._text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        target = dict(attrs).get("href")
        if tag == "base" and target:
            self.base = urljoin(self.base, target)
        elif tag == "a":
            self._target, self._text = target, []

    def handle_data(self, data: str) -> None:
        self._text.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag == "a" and self._target:
            self.links["".join(self._text).strip()] = urljoin(self.base, self._target)
            self._target = None


def _parse_html(page: str, address: str) -> dict[str, str]:
    parser = _Links(address)
    parser.feed(page)
    return parser.links


def _parse_json(page: str, address: str) -> dict[str, str]:
    """The same of a page in JSON (PEP 691)."""
    try:
        files = json.loads(page)["files"]
        return {file["filename"]: urljoin(address, file["url"]) for file in files}
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(f"not a page of a package index ({type(error).__name__}: {error})") from error


def _local_path(place: str) -> Path | None:
    """The path that a place stands for, or None for an address on the network."""
    parts = urlsplit(place)
    if parts.scheme == "file":
        return Path(url2pathname(parts.path))
    # A scheme of one letter is the drive of a Windows path.
    return Path(place) if len(parts.scheme) <= 1 else None


def _without_credentials(text: str) -> str:
    """The text with user names and passwords taken out of the addresses in it."""
    if "://" in text and " " not in text:
        parts = urlsplit(text)
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    return re.sub(r"(?<=://)[^\s/@]+@", "", text)
