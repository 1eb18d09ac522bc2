"""nvcc compiles every kernel for every architecture, and none spills."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cuda.resources import Resources, parse, table
from tests.cuda_host.build import INCLUDE, KERNELS, ROOT

ARCHITECTURES = ("80", "90", "100")
FLAGS = (
    "-O3",
    "-std=c++17",
    "-Xptxas=-v",
    *(f"-gencode=arch=compute_{architecture},code=sm_{architecture}" for architecture in ARCHITECTURES),
    f"-gencode=arch=compute_{ARCHITECTURES[-1]},code=compute_{ARCHITECTURES[-1]}",
)
SOURCES = sorted(KERNELS.glob("*.cu"))
CACHE = ROOT / "build" / "cuda_gate"


@pytest.fixture(scope="session")
def nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    candidates = (os.environ.get("NVCC"), home and str(Path(home) / "bin" / "nvcc"), "nvcc")
    path = next((found for name in candidates if name and (found := shutil.which(name))), None)
    if path is None:
        reason = "nvcc is neither on PATH nor found through NVCC or CUDA_HOME"
        if os.environ.get("DIFFCAM_REQUIRE_NVCC") == "1":
            pytest.fail(f"DIFFCAM_REQUIRE_NVCC=1, but {reason}")
        pytest.skip(reason)
    return path


def compile_(nvcc: str, source: Path, flags: tuple[str, ...] = FLAGS) -> str:
    """What nvcc and ptxas say; kept in build/ under the hash of all that goes in.

    Raises:
        RuntimeError: it does not compile.
    """
    command = [nvcc, *flags, f"-I{INCLUDE}", f"-I{KERNELS}", "-c", str(source)]
    digest = hashlib.sha256(" ".join(command).encode())
    digest.update(subprocess.run([nvcc, "--version"], capture_output=True, check=True).stdout)
    for path in (source, *sorted(KERNELS.glob("*.h")), *sorted(INCLUDE.rglob("*.h"))):
        digest.update(path.read_bytes())
    log = CACHE / f"{source.stem}-{digest.hexdigest()[:16]}.log"
    if not log.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        done = subprocess.run([*command, "-o", os.devnull], capture_output=True, text=True)
        if done.returncode != 0:
            # A line of nvcc's own code can be endless.
            said = "\n".join(line[:300] for line in done.stderr.splitlines()[:40])
            raise RuntimeError(f"{' '.join(command)}\n{said}")
        for old in CACHE.glob(f"{source.stem}-*.log"):
            old.unlink(missing_ok=True)
        log.write_text(done.stdout + done.stderr)
    return log.read_text()


def said_in_the_build(source: Path) -> str | None:
    """What nvcc and ptxas said when the library was built; None where it was not, from older files, or for others."""
    built = sorted((ROOT / "build").glob(f"native-*/{source.stem}_cuda.o.log"), key=lambda log: log.stat().st_mtime)
    if not built:
        return None
    inputs = (source, *KERNELS.glob("*.h"), *INCLUDE.rglob("*.h"))
    log = built[-1].read_text()
    newer = built[-1].stat().st_mtime > max(path.stat().st_mtime for path in inputs)
    return log if newer and {kernel.architecture for kernel in parse(log)} == set(ARCHITECTURES) else None


@pytest.fixture(scope="module")
def logs(nvcc):
    """A future for each source; the longest start first."""

    def log(source: Path) -> str:
        return said_in_the_build(source) or compile_(nvcc, source)

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        longest_first = sorted(SOURCES, key=lambda source: -source.stat().st_size)
        yield {source: pool.submit(log, source) for source in longest_first}


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_compiles_without_spills(logs, source, capsys):
    kernels = parse(logs[source].result())
    if not kernels:
        assert "__global__" not in source.read_text()
        return
    with capsys.disabled():
        print(f"\n{source.name}\n{table(kernels)}")
    assert {kernel.architecture for kernel in kernels} == set(ARCHITECTURES)
    spilling = [kernel for kernel in kernels if kernel.uses_local_memory]
    assert not spilling, table(spilling)


SPILLING = """
__global__ void many_values(const float* in, float* out) {
    float values[64];
#pragma unroll
    for (int i = 0; i < 64; ++i) values[i] = in[i * 32 + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 64; ++i) out[i * 32 + threadIdx.x] = values[i] * values[63 - i];
}
"""


def test_a_spill_is_seen(nvcc, tmp_path):
    source = tmp_path / "spilling.cu"
    source.write_text(SPILLING)
    few = ("-O3", "-Xptxas=-v", "-arch=sm_90", "-maxrregcount=24")
    (kernel,) = parse(compile_(nvcc, source, few))
    assert kernel.kernel.startswith("many_values") and kernel.architecture == "90"
    assert kernel.uses_local_memory and kernel.spill_stores > 0
    (kernel,) = parse(compile_(nvcc, source, few[:-1]))
    assert not kernel.uses_local_memory


ENTRY = """ptxas info    : Compiling entry function 'chain' for 'sm_{}'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 64 registers
"""


def test_what_the_build_said_counts_where_it_built_this(monkeypatch, tmp_path):
    source = SOURCES[0]
    monkeypatch.setattr("tests.cuda.test_build.ROOT", tmp_path)
    assert said_in_the_build(source) is None
    log = tmp_path / "build" / "native-0" / f"{source.stem}_cuda.o.log"
    log.parent.mkdir(parents=True)
    log.write_text("".join(map(ENTRY.format, ARCHITECTURES)))
    assert said_in_the_build(source) == log.read_text()
    os.utime(log, (0, 0))
    assert said_in_the_build(source) is None
    log.write_text(ENTRY.format("90"))
    assert said_in_the_build(source) is None


def test_what_ptxas_says_is_read():
    log = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN7diffcam12_GLOBAL__N_15chainIfLi4EEEvPKT_i' for 'sm_100'
ptxas info    : Function properties for _ZN7diffcam12_GLOBAL__N_15chainIfLi4EEEvPKT_i
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 8 bytes cumulative stack size, 1528 bytes cmem[0]
"""
    (kernel,) = parse(log)
    assert kernel[1:] == ("100", 64, 8, 4, 12) and "chain" in kernel.kernel
    assert "SPILLS sm_100: (8, 4, 12)" in table([kernel])
    assert "SPILLS" not in table([Resources("chain", "80", 32, 0, 0, 0)])
    with pytest.raises(ValueError, match="expected an entry of ptxas"):
        parse(log.replace("stack frame", "frame"))
