"""Compiles CUDA kernels as host code, against the shim of this folder."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
KERNELS = ROOT / "csrc" / "cuda"
INCLUDE = ROOT / "csrc" / "include"
CACHE = ROOT / "build" / "cuda_host"
KEEP_S = 24 * 3600

FLAGS = ("-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")
# nvcc's pragmas and attributes mean nothing to a host compiler.
FOREIGN = ("-Wno-unknown-pragmas", "-Wno-attributes")
# -Og takes half as long to compile as -O1, and finds the same.
SANITIZE = ("-Og", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")


def build_op(op: str, sanitize: bool = False, kernels: Path = KERNELS) -> Path:
    """The library with the harness of `op` and its kernels, from another folder than csrc/cuda where one is given."""
    return build([kernels / f"{op}.cu", HERE / f"harness_{op}.cpp"], op, sanitize)


def build(sources: Sequence[Path], name: str, sanitize: bool = False, folders: Sequence[Path] = ()) -> Path:
    """A shared library made of `sources`, compiled unless one from the same sources and headers is there.

    Headers are looked for beside the first source, then in `folders`, then where those of every kernel are.

    Raises:
        RuntimeError: the compiler failed; with its output.
    """
    folders = (sources[0].parent, *folders, INCLUDE, HERE)
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, *FLAGS, *FOREIGN, *(SANITIZE if sanitize else ()), "-shared", "-x", "c++"]
    command += [str(source) for source in sources] + [f"-I{folder}" for folder in folders]
    digest = hashlib.sha256(" ".join(command).encode())
    digest.update(subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout)
    for source in sources:
        for path in dependencies(source, folders):
            digest.update(path.name.encode() + path.read_bytes())
    library = CACHE / f"{name}-{'sanitize-' if sanitize else ''}{digest.hexdigest()[:16]}.so"
    if library.exists():
        library.touch()
        return library

    CACHE.mkdir(parents=True, exist_ok=True)
    # Libraries of sources that have changed since; another process may still want a recent one.
    for old in CACHE.glob("*.so"):
        if time.time() - old.stat().st_mtime > KEEP_S:
            old.unlink(missing_ok=True)
    # Under another name first: a process that finds the library finds all of it.
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        unfinished = Path(folder) / library.name
        done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        unfinished.replace(library)
    return library


def dependencies(source: Path, folders: Sequence[Path] = (KERNELS, INCLUDE, HERE)) -> list[Path]:
    """The source and all headers of this repository that it includes."""
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, "-std=c++17", "-x", "c++", "-MM", "-MG", *(f"-I{folder}" for folder in folders), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    paths = done.stdout.split(":", 1)[1].replace("\\\n", " ").split()
    return sorted({Path(path).resolve() for path in paths if Path(path).is_absolute()})


def preload_sanitizers() -> dict[str, str]:
    """The environment in which an uninstrumented Python loads an instrumented library."""
    compiler = os.environ.get("CXX", "c++")
    names = ("libasan.so", "libubsan.so", "libstdc++.so")
    paths = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in names
    ]
    # PyTorch and the interpreter keep memory until the process ends.
    return {**os.environ, "LD_PRELOAD": " ".join(paths), "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": str(ROOT)}
