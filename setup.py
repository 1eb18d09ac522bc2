"""Builds the compiled parts with ninja: the op library (`_ops.so`, LibTorch Stable ABI) and the NumPy module (`_C`).

Flags differ per file (one kernel body is compiled once per instruction set), which setuptools cannot express, so this
writes a `build.ninja` and runs it. Everything else about the package is in pyproject.toml.

Environment:
    DIFFCAM_NATIVE  auto (default): build when a compiler, ninja, pybind11 and PyTorch are there, and otherwise install
                    the package on its reference backend; 1: a missing tool is an error; 0: build nothing.
    CXX             the C++ compiler. Default: the first of c++, g++, clang++.
    CXXFLAGS        further flags for compiling and linking, such as -fsanitize=address.
    MAX_JOBS        compilers run at the same time. Default: one per processor.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc"
MINIMUM_TORCH = (2, 10)
# Calls newer than this are not compiled in, so that one library serves every later PyTorch.
TORCH_TARGET_VERSION = "0x020a000000000000"

COMMON_FLAGS = ["-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror=return-type"]
# GCC's own AVX headers start from undefined registers, which -Wall takes for a mistake.
KERNEL_FLAGS = [
    *COMMON_FLAGS,
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
    "-std=c++17",
    "-fno-math-errno",
    "-fno-trapping-math",
]
VARIANT_FLAGS = {
    "standard": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
}


class Unavailable(Exception):
    """The native part cannot be built here; the message says what is missing."""


def find_compiler() -> str:
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["c++", "g++", "clang++"]:
        if shutil.which(shlex.split(name)[0]):
            return name
    raise Unavailable(f"no C++ compiler: {wanted or 'c++, g++ and clang++'} not found on PATH")


def find_ninja() -> str:
    if importlib.util.find_spec("ninja"):
        import ninja

        found = shutil.which("ninja", path=ninja.BIN_DIR)
        if found:
            return found
    found = shutil.which("ninja")
    if found:
        return found
    raise Unavailable("ninja is not installed: pip install ninja")


def find_pybind11() -> str:
    if not importlib.util.find_spec("pybind11"):
        raise Unavailable("pybind11 is not installed: pip install pybind11")
    import pybind11

    return pybind11.get_include()


def find_torch() -> tuple[Path, str]:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise Unavailable(
            "PyTorch is not installed in the build environment: install torch, then build with --no-build-isolation"
        )
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < MINIMUM_TORCH:
        raise Unavailable(f"PyTorch {version} is older than {'.'.join(map(str, MINIMUM_TORCH))}")
    return Path(spec.origin).parent, version


def compiler_version(compiler: str) -> str:
    result = subprocess.run([*shlex.split(compiler), "--version"], capture_output=True, text=True, check=True)
    return result.stdout.splitlines()[0]


def quote(arguments: list[str]) -> str:
    return " ".join(shlex.quote(argument) for argument in arguments)


class Ninja:
    """Collects compile and link steps, then writes and runs them."""

    def __init__(self, folder: Path, compiler: str, further_flags: list[str]) -> None:
        self.folder = folder
        self.further_flags = further_flags
        self.lines = [
            "ninja_required_version = 1.3",
            f"compiler = {compiler}",
            "rule compile",
            "  command = $compiler -MMD -MF $out.d $flags -x c++ -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = $out",
            "rule link",
            "  command = $compiler -shared $in -o $out $flags",
            "  description = $out",
        ]

    def compile(self, source: Path, name: str, flags: list[str]) -> str:
        escaped = str(source).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
        self.lines += [
            f"build {name}.o: compile {escaped}",
            f"  flags = {quote([*flags, *self.further_flags])}",
        ]
        return f"{name}.o"

    def link(self, name: str, objects: list[str], flags: list[str]) -> Path:
        self.lines += [
            f"build {name}: link {' '.join(objects)}",
            f"  flags = {quote([*flags, *self.further_flags])}",
        ]
        return self.folder / name

    def run(self, ninja: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        text = "\n".join(self.lines) + "\n"
        (self.folder / "build.ninja").write_text(text, encoding="utf-8")
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        if subprocess.run([ninja, "-C", str(self.folder), "-j", jobs]).returncode:
            sys.exit("diffcam_fast: the native build failed; the compiler's messages are above")


class BuildNative(build_ext):
    """`build_ext` that runs ninja once for both modules and records what was built, or why not."""

    def get_ext_filename(self, fullname: str) -> str:
        # The op library has no Python in it, so its name carries no Python version.
        if fullname.endswith("_ops"):
            return str(Path(*fullname.split("."))) + ".so"
        return super().get_ext_filename(fullname)

    def run(self) -> None:
        wanted = os.environ.get("DIFFCAM_NATIVE", "auto")
        if wanted not in ("auto", "0", "1"):
            sys.exit(f"DIFFCAM_NATIVE: expected auto, 0 or 1; got {wanted!r}")
        try:
            if wanted == "0":
                raise Unavailable("DIFFCAM_NATIVE=0 asked for no native build")
            if platform.system() != "Linux":
                raise Unavailable(f"the native build is for Linux; this is {platform.system()}")
            self.tools = (find_compiler(), find_ninja(), find_pybind11(), *find_torch())
            reason = None
        except Unavailable as missing:
            if wanted == "1":
                sys.exit(f"DIFFCAM_NATIVE=1, but the native part cannot be built: {missing}")
            reason = str(missing)
            self.extensions = []
            print(f"diffcam_fast: no native build, the reference backend will serve. Reason: {reason}")
        super().run()
        self.write_record(reason)

    def build_extensions(self) -> None:
        if not self.extensions:
            return
        compiler, ninja_path, pybind11_include, torch_folder, torch_version = self.tools
        variants = list(VARIANT_FLAGS) if platform.machine() in ("x86_64", "AMD64") else ["standard"]
        print(
            f"diffcam_fast: native build with {compiler_version(compiler)}, against PyTorch {torch_version}, "
            f"CPU variants {', '.join(variants)}"
        )
        include = [f"-I{SOURCES / 'include'}", f"-I{SOURCES}"]
        # Absolute: ninja runs in its own folder.
        ninja = Ninja(
            (ROOT / self.build_temp / "native").resolve(),
            compiler,
            shlex.split(os.environ.get("CXXFLAGS", "")),
        )
        defines = [f"-DDIFFCAM_HAS_{name.upper()}" for name in variants]
        kernels = [
            ninja.compile(source, f"{source.stem}_driver", [*KERNEL_FLAGS, *include, *defines])
            for source in sorted((SOURCES / "cpu").glob("*.cpp"))
        ]
        kernels += [
            ninja.compile(
                source,
                f"{source.stem}_{name}",
                [*KERNEL_FLAGS, *include, *VARIANT_FLAGS[name], f"-DDIFFCAM_CAPABILITY={name}"],
            )
            for source in sorted((SOURCES / "cpu").glob("*.inc"))
            for name in variants
        ]
        torch_ops = ninja.compile(
            SOURCES / "bindings" / "torch_ops.cpp",
            "torch_ops",
            [
                *COMMON_FLAGS,
                "-std=c++20",
                f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
                *include,
                f"-isystem{torch_folder / 'include'}",
            ],
        )
        numpy_module = ninja.compile(
            SOURCES / "bindings" / "numpy_module.cpp",
            "numpy_module",
            [
                *COMMON_FLAGS,
                "-std=c++17",
                *include,
                *defines,
                f"-isystem{pybind11_include}",
                f"-isystem{sysconfig.get_path('include')}",
            ],
        )
        # A symbol that is missing shall stop the build, not the import.
        torch_libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10", "-Wl,-z,defs"]
        built = {
            "diffcam_fast._ops": ninja.link("ops.so", [torch_ops, *kernels], torch_libraries),
            "diffcam_fast._C": ninja.link("C.so", [numpy_module, *kernels], ["-pthread"]),
        }
        ninja.run(ninja_path)
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            # A running process may have the old file mapped: replace it, never write into it.
            temporary = target.with_name(target.name + ".new")
            shutil.copy2(built[extension.name], temporary)
            os.replace(temporary, target)
        self.record = {
            "compiler": compiler_version(compiler),
            "torch": torch_version,
            "python": platform.python_version(),
            "cpu_variants": ["default" if name == "standard" else name for name in variants],
        }

    def write_record(self, reason: str | None) -> None:
        record = {"native": {"built": reason is None, "reason": reason}, **getattr(self, "record", {})}
        folders = [Path(self.build_lib) / "diffcam_fast"]
        if self.inplace or getattr(self, "editable_mode", False):
            folders.append(ROOT / "diffcam_fast")
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "_build.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            if reason is not None:
                # What an earlier build left would be loaded though this one says that nothing is there.
                for stale in [*folder.glob("_ops.so"), *folder.glob("_C.*.so")]:
                    stale.unlink()

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), str(Path(self.build_lib) / "diffcam_fast" / "_build.json")]


setup(
    # Sources are listed by build.ninja; setuptools only needs the names.
    ext_modules=[Extension("diffcam_fast._ops", []), Extension("diffcam_fast._C", [])],
    cmdclass={"build_ext": BuildNative},
)
