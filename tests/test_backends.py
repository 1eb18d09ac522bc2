"""Which backend serves, how one is forced, and how the package gets by without what is missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import diffcam_fast as dcf
from diffcam_fast import backends, info
from diffcam_fast import numpy as functions
from diffcam_fast.backends import library, native

ROOT = Path(__file__).resolve().parent.parent
compiled = pytest.mark.skipif(native.absent_because is not None, reason=f"no compiled kernels: {native.absent_because}")


def _run(code: str, folder: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the reference implementations that served, in order."""
    calls: list[str] = []
    for name, reference in list(library.references.items()):

        def counting(*arguments: object, name: str = name, reference: object = reference) -> object:
            calls.append(name)
            return reference(*arguments)  # type: ignore[operator]

        monkeypatch.setitem(library.references, name, counting)
    return calls


@compiled
def test_a_forced_backend_serves_and_is_undone(counted: list[str]) -> None:
    activations, gradients = torch.rand(1, 4, 5, 5), torch.randn(1, 4, 5, 5)
    expected = dcf.cam(activations, gradients)
    assert counted == []
    assert backends.serving("cpu") == "cpu"
    with backends.use_backend("reference"):
        assert backends.serving("cpu") == backends.forced_backend() == "reference"
        torch.testing.assert_close(dcf.cam(activations, gradients), expected)
        assert counted == ["cam"]
        with backends.use_backend("cpu"):
            dcf.cam(activations, gradients)
            assert counted == ["cam"]
        dcf.cam(activations, gradients)
        assert counted == ["cam", "cam"]
    dcf.cam(activations, gradients)
    assert counted == ["cam", "cam"]
    assert backends.forced_backend() is None


@compiled
def test_a_forced_backend_is_undone_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), backends.use_backend("reference"):
        raise ZeroDivisionError
    assert backends.forced_backend() is None and backends.serving("cpu") == "cpu"


@compiled
def test_a_compiled_graph_honours_a_backend_forced_later(counted: list[str]) -> None:
    torch._dynamo.reset()
    explain = torch.compile(lambda a, g: dcf.cam(a, g), fullgraph=True)
    activations, gradients = torch.rand(1, 4, 5, 5), torch.randn(1, 4, 5, 5)
    expected = explain(activations, gradients)
    assert counted == []
    with backends.use_backend("reference"):
        torch.testing.assert_close(explain(activations, gradients), expected)
    assert counted == ["cam"]


def test_unknown_backend() -> None:
    with (
        pytest.raises(ValueError, match="backend: expected one of auto, reference, cpu, cuda, triton; got 'gpu'"),
        backends.use_backend("gpu"),
    ):
        pass


@compiled
def test_a_forced_backend_says_why_it_cannot_serve() -> None:
    """A device that only the reference serves, seen through the check that stands before it."""
    on_another_device = torch.empty(1, device="meta")
    with backends.use_backend("cpu"), pytest.raises(RuntimeError, match=r"'cpu' is forced .*::cam on meta"):
        backends._refuse("cam", (on_another_device, on_another_device))


@pytest.mark.parametrize(
    ("missing", "expected"), [((), "cuda"), (("cuda",), "triton"), (("cuda", "triton"), "reference")]
)
def test_the_best_backend_that_is_there_serves_a_gpu(
    monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...], expected: str
) -> None:
    reasons = {name: "not here" if name in missing else None for name in ("cuda", "triton")}
    monkeypatch.setattr(native, "cuda_absent_because", lambda: reasons["cuda"])
    monkeypatch.setattr(backends.triton, "absent_because", lambda: reasons["triton"])
    assert backends._chosen("CUDA", None) == expected
    assert backends._chosen("CUDA", "reference") == "reference"
    assert backends._chosen("CUDA", "cpu") is None
    for name, reason in reasons.items():
        assert backends._chosen("CUDA", name) == (None if reason else name)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_gpu_backend_that_cannot_be_forced_says_why(backend: str) -> None:
    with pytest.raises(RuntimeError, match=rf"backend '{backend}' is not available: ."), backends.use_backend(backend):
        pass
    assert backends.forced_backend() is None


@compiled
def test_environment_forces_a_backend() -> None:
    code = "import diffcam_fast as d; print(d.backends.forced_backend())"
    assert _run(code, DIFFCAM_BACKEND="reference").stdout.strip() == "reference"
    wrong = _run(code, DIFFCAM_BACKEND="gpu")
    assert wrong.stdout.strip() == "None"
    assert "DIFFCAM_BACKEND=gpu: backend: expected one of auto, reference, cpu, cuda, triton" in wrong.stderr


@compiled
@pytest.mark.parametrize("name", native.CPU_CAPABILITIES)
def test_environment_chooses_the_instruction_set(name: str) -> None:
    code = "from diffcam_fast.backends import native; from diffcam_fast import _C; "
    code += "print(native.cpu_capability(), _C.cpu_capability(), _C.best_cpu_capability())"
    in_use, in_numpy, best = _run(code, DIFFCAM_CPU_CAPABILITY=name).stdout.split()
    order = native.CPU_CAPABILITIES.index
    assert in_use == in_numpy == native.CPU_CAPABILITIES[min(order(name), order(best))]


@compiled
def test_an_unknown_instruction_set_is_reported() -> None:
    result = _run("import diffcam_fast as d; print(d.backends.absent_because('cpu'))", DIFFCAM_CPU_CAPABILITY="sse9")
    assert "DIFFCAM_CPU_CAPABILITY must be one of default, avx2, avx512; got 'sse9'" in result.stdout
    with pytest.raises(ValueError, match="name: expected one of default, avx2, avx512; got 'sse9'"):
        native.set_cpu_capability("sse9")


def test_importing_needs_torch_and_numpy_alone() -> None:
    code = (
        "import sys; import torch, numpy; before = set(sys.modules); import diffcam_fast; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(name for name in new if name not in sys.stdlib_module_names))"
    )
    result = _run(code)
    assert result.returncode == 0, result.stderr
    # What torch itself loads late does not count.
    loaded = set(json.loads(result.stdout.replace("'", '"')))
    assert "diffcam_fast" in loaded
    assert not loaded & {
        "matplotlib",
        "PIL",
        "typer",
        "tqdm",
        "torchvision",
        "timm",
        "scipy",
        "pip",
        "ninja",
        "pybind11",
        "triton",
    }


def test_import_leaves_global_state_alone() -> None:
    code = (
        "import torch; torch.manual_seed(3); state = torch.get_rng_state(); threads = torch.get_num_threads(); "
        "import diffcam_fast; "
        "assert torch.equal(state, torch.get_rng_state()) and threads == torch.get_num_threads() and "
        "torch.is_grad_enabled()"
    )
    assert _run(code).returncode == 0


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"DIFFCAM_NATIVE": "0"}, "DIFFCAM_NATIVE=0 asked for no native build"),
        ({"CXX": "no-such-compiler"}, "no C++ compiler: no-such-compiler not found on PATH"),
    ],
)
def test_without_a_compiler_the_package_builds_and_works(
    tmp_path: Path, environment: dict[str, str], reason: str
) -> None:
    _copy_package(tmp_path)
    built = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert built.returncode == 0, built.stderr
    assert reason in built.stdout
    code = (
        "import torch, diffcam_fast as d; from diffcam_fast import info; "
        "print(d.__file__); print(float(d.cam(torch.rand(1, 2, 3, 3), torch.ones(1, 2)).max())); "
        "print(d.numpy.cam(torch.rand(1, 2, 3, 3).numpy(), torch.ones(1, 2).numpy()).shape); "
        "print(info.format_report(info.report()))"
    )
    used = _run(code, tmp_path)
    assert used.returncode == 0, used.stderr
    lines = used.stdout.splitlines()
    assert lines[0].startswith(str(tmp_path))
    assert float(lines[1]) == pytest.approx(1, abs=1e-5)
    assert lines[2] == "(1, 3, 3)"
    assert f"absent: the build left it out: {reason}" in used.stdout
    forced = _run("import diffcam_fast", tmp_path, DIFFCAM_BACKEND="cpu")
    assert forced.returncode == 0 and "backend 'cpu' is not available: the build left it out" in forced.stderr


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        (
            {"DIFFCAM_NATIVE": "1", "CXX": "no-such-compiler"},
            "DIFFCAM_NATIVE=1, but the native part cannot be built: no C++ compiler",
        ),
        (
            {"DIFFCAM_CUDA": "1", "CUDA_HOME": "", "NVCC": "", "PATH": "{tools}"},
            "DIFFCAM_CUDA=1, but the CUDA kernels cannot be built: no CUDA compiler",
        ),
        ({"DIFFCAM_CUDA": "yes"}, "DIFFCAM_CUDA: expected auto, 0 or 1; got 'yes'"),
    ],
)
def test_what_is_missing_is_an_error_when_asked_for(tmp_path: Path, environment: dict[str, str], reason: str) -> None:
    _copy_package(tmp_path)
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("c++", "ninja"):
        found = shutil.which(tool, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
        if found is not None:
            (tools / tool).symlink_to(found)
    built = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tmp_path,
        env={**os.environ, **{name: value.format(tools=tools) for name, value in environment.items()}},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert built.returncode != 0
    assert reason in built.stderr


def _copy_package(folder: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    for path in (ROOT / "diffcam_fast").rglob("*"):
        if path.suffix in (".py", ".pyi", ".json") and path.name != "_build.json":
            target = folder / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())


def test_report_is_complete_and_readable() -> None:
    report = info.report()
    json.dumps(report)
    assert set(report["backends"]) == set(backends.BACKENDS)
    for state in report["backends"].values():
        assert state["available"] == (state["reason"] is None)
    text = info.format_report(report)
    assert torch.__version__ in text
    for name in backends.BACKENDS:
        assert f"  {name}" in text
    assert report["direct_calls"]["available"] == (report["direct_calls"]["reason"] is None)
    assert "  direct calls" in text


def test_what_was_built_is_in_use() -> None:
    """Tests of compiled kernels are skipped where nothing was built, and nowhere else."""
    record = native.build_record()
    assert record is not None, "run the tests after make build"
    if record["native"]["built"]:
        assert backends.absent_because("cpu") is None
        assert functions.absent_because() is None


@compiled
def test_build_record_and_module_agree() -> None:
    from diffcam_fast import _C

    record = native.build_record()
    assert record is not None and record["native"] == {"built": True, "reason": None}
    assert record["cpu_variants"] == _C.build_information()["cpu_variants"]
