"""Builds the compiled parts with ninja: the op library (`_ops.so`, LibTorch Stable ABI) and the NumPy module (`_C`).

Flags differ per file (one kernel body is compiled once per instruction set), which setuptools cannot express, so this
writes a `build.ninja` and runs it. Everything else about the package is in pyproject.toml.

Environment:
    DIFFCAM_NATIVE      auto (default): build when a compiler, ninja, pybind11 and PyTorch are there, and otherwise
                        install the package on its reference backend; 1: a missing tool is an error; 0: build nothing.
    DIFFCAM_CUDA        the same for the CUDA kernels, which need nvcc 12.8 or newer, but neither a GPU nor a CUDA
                        build of PyTorch.
    DIFFCAM_CUDA_ARCHS  compute capabilities to compile for, and PTX for the last: "80;90;100" (default).
    CXX                 the C++ compiler. Default: the first of c++, g++, clang++.
    CXXFLAGS            further flags for compiling and linking C++, such as -fsanitize=address.
    NVCC                the CUDA compiler. Default: that of CUDA_HOME, then nvcc on PATH.
    MAX_JOBS            compilers run at the same time. Default: one per processor.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

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


CUDA_FLAGS = ["-O3", "-std=c++17", "-Xptxas=-v", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
DEFAULT_CUDA_ARCHS = "80;90;100"
# The first that compiles for capability 10.0.
MINIMUM_NVCC = (12, 8)


class Unavailable(Exception):
    """The native part, or its CUDA kernels, cannot be built here; the message says what is missing."""


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
    if importlib.util.find_spec("pybind11"):
        import pybind11

        return pybind11.get_include()
    # PyTorch carries a copy for its own extensions.
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        include = Path(spec.origin).parent / "include"
        if (include / "pybind11" / "pybind11.h").is_file():
            return str(include)
    raise Unavailable("pybind11 is not installed: pip install pybind11")


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


class Nvcc(NamedTuple):
    """The CUDA compiler and what comes with it."""

    path: str
    version: str
    libraries: Path
    architectures: list[str]

    def flags(self) -> list[str]:
        targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in self.architectures]
        newest = self.architectures[-1]
        return [*CUDA_FLAGS, *targets, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def find_nvcc() -> Nvcc:
    home = os.environ.get("CUDA_HOME")
    candidates = [os.environ.get("NVCC"), home and str(Path(home) / "bin" / "nvcc"), "nvcc"]
    path = next((found for name in candidates if name and (found := shutil.which(name))), None)
    if path is None:
        raise Unavailable("no CUDA compiler: nvcc not found on PATH, nor through NVCC or CUDA_HOME")
    told = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", told)
    if release is None:
        raise Unavailable(f"{path} --version does not say which release it is")
    version = ".".join(release.groups())
    if tuple(int(part) for part in release.groups()) < MINIMUM_NVCC:
        raise Unavailable(f"nvcc {version} is older than {'.'.join(map(str, MINIMUM_NVCC))}")
    # What is on PATH can be a script that calls the compiler elsewhere: the compiler itself says where it is.
    dry = subprocess.run([path, "--dryrun", "-c", "any.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.*)$", dry, re.MULTILINE)
    root = Path(top.group(1)) if top else Path(path).resolve().parent.parent
    for folder in (root / "lib64", root / "lib", root / "targets" / f"{platform.machine()}-linux" / "lib"):
        if (folder / "libcudart_static.a").is_file():
            break
    else:
        raise Unavailable(f"the CUDA runtime (libcudart_static.a) is not under {root}")
    wanted = os.environ.get("DIFFCAM_CUDA_ARCHS", DEFAULT_CUDA_ARCHS)
    architectures = [part.strip() for part in wanted.split(";") if part.strip()]
    if not architectures or not all(re.fullmatch(r"\d{2,3}a?", part) for part in architectures):
        sys.exit(f"DIFFCAM_CUDA_ARCHS: expected numbers such as {DEFAULT_CUDA_ARCHS!r}; got {wanted!r}")
    return Nvcc(path, version, folder.resolve(), architectures)


def choice(variable: str) -> str:
    wanted = os.environ.get(variable, "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"{variable}: expected auto, 0 or 1; got {wanted!r}")
    return wanted


def quote(arguments: list[str]) -> str:
    return " ".join(shlex.quote(argument) for argument in arguments)


class Ninja:
    """Collects compile and link steps, then writes and runs them."""

    def __init__(self, folder: Path, compiler: str, further_flags: list[str], nvcc: Nvcc | None) -> None:
        self.folder = folder
        self.nvcc = nvcc
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
        if nvcc is not None:
            # With a launcher or flags in CXX, such as "ccache g++", nvcc's own choice of host compiler stands.
            host = f" -ccbin {shlex.quote(compiler)}" if len(shlex.split(compiler)) == 1 else ""
            self.lines += [
                "rule compile_cuda",
                # What ptxas says of every kernel stays beside the object, for the tests, and out of sight.
                f"  command = {shlex.quote(nvcc.path)}{host} -MMD -MF $out.d $flags -c $in -o $out > $out.log 2>&1; "
                "code=$$?; grep -v -e 'ptxas info' -e 'bytes stack frame' $out.log; exit $$code",
                "  depfile = $out.d",
                "  deps = gcc",
                "  description = $out",
            ]

    def compile(self, source: Path, name: str, flags: list[str]) -> str:
        self.lines += [
            f"build {name}.o: compile {self.escape(source)}",
            f"  flags = {quote([*flags, *self.further_flags])}",
        ]
        return f"{name}.o"

    def compile_cuda(self, source: Path, name: str, flags: list[str]) -> str:
        self.lines += [f"build {name}.o: compile_cuda {self.escape(source)}", f"  flags = {quote(flags)}"]
        return f"{name}.o"

    @staticmethod
    def escape(path: Path) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

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
        wanted = choice("DIFFCAM_NATIVE")
        wanted_cuda = choice("DIFFCAM_CUDA")
        self.nvcc = None
        cuda_reason = None
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
        try:
            if wanted_cuda == "0":
                raise Unavailable("DIFFCAM_CUDA=0 asked for no CUDA kernels")
            if reason is not None:
                raise Unavailable(reason)
            self.nvcc = find_nvcc()
        except Unavailable as missing:
            if wanted_cuda == "1":
                sys.exit(f"DIFFCAM_CUDA=1, but the CUDA kernels cannot be built: {missing}")
            cuda_reason = str(missing)
            if reason is None:
                print(f"diffcam_fast: no CUDA kernels. Reason: {cuda_reason}")
        super().run()
        self.write_record(reason, cuda_reason)

    def build_extensions(self) -> None:
        if not self.extensions:
            return
        compiler, ninja_path, pybind11_include, torch_folder, torch_version = self.tools
        variants = list(VARIANT_FLAGS) if platform.machine() in ("x86_64", "AMD64") else ["standard"]
        print(
            f"diffcam_fast: native build with {compiler_version(compiler)}, against PyTorch {torch_version}, "
            f"CPU variants {', '.join(variants)}"
        )
        if self.nvcc is not None:
            print(
                f"diffcam_fast: CUDA kernels with nvcc {self.nvcc.version}, for compute capabilities "
                f"{', '.join(self.nvcc.architectures)} and PTX for the last"
            )
        include = [f"-I{SOURCES / 'include'}", f"-I{SOURCES}"]
        ninja = Ninja(
            self.objects_folder(),
            compiler,
            shlex.split(os.environ.get("CXXFLAGS", "")),
            self.nvcc,
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
        cuda_kernels, cuda_defines, cuda_libraries = [], [], []
        if self.nvcc is not None:
            flags = [*self.nvcc.flags(), *include]
            cuda_kernels = [
                ninja.compile_cuda(source, f"{source.stem}_cuda", flags)
                for source in sorted((SOURCES / "cuda").glob("*.cu"))
            ]
            cuda_defines = ["-DDIFFCAM_HAS_CUDA"]
            # The static runtime: the library then loads where there is no CUDA at all.
            cuda_libraries = [f"-L{self.nvcc.libraries}", "-lcudart_static", "-lrt", "-ldl", "-pthread"]
        torch_ops = ninja.compile(
            SOURCES / "bindings" / "torch_ops.cpp",
            "torch_ops",
            [
                *COMMON_FLAGS,
                "-std=c++20",
                f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
                *cuda_defines,
                *include,
                f"-isystem{torch_folder / 'include'}",
            ],
        )
        python_flags = [
            *COMMON_FLAGS,
            "-std=c++17",
            *include,
            *defines,
            f"-isystem{pybind11_include}",
            f"-isystem{sysconfig.get_path('include')}",
        ]
        for_python = [
            ninja.compile(SOURCES / "bindings" / f"{name}.cpp", name, python_flags)
            for name in ("numpy_module", "direct", "training_flags")
        ]
        # A symbol that is missing shall stop the build, not the import.
        torch_libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10", *cuda_libraries, "-Wl,-z,defs"]
        if self.nvcc is not None:
            # Nothing here is defined in libtorch itself, but with a CUDA build of PyTorch it brings libtorch_cuda,
            # where the weak reference to the current stream is found.
            torch_libraries += ["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"]
        built = {
            # No name of the CUDA runtime inside may meet that of PyTorch's own.
            "diffcam_fast._ops": ninja.link(
                "ops.so", [torch_ops, *kernels, *cuda_kernels], [*torch_libraries, "-Wl,--exclude-libs,ALL"]
            ),
            "diffcam_fast._C": ninja.link("C.so", [*for_python, *kernels], ["-pthread"]),
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

    def objects_folder(self) -> Path:
        """Where ninja finds what was compiled before: setuptools' own folder is gone after an editable install.

        Ninja knows flags and files, but not which versions of the tools it was that made them.
        """
        compiler, _, _, _, torch_version = self.tools
        tools = [compiler_version(compiler), torch_version, sys.version, self.nvcc.version if self.nvcc else ""]
        return ROOT / "build" / f"native-{hashlib.sha256(repr(tools).encode()).hexdigest()[:12]}"

    def write_record(self, reason: str | None, cuda_reason: str | None) -> None:
        cuda = {"built": cuda_reason is None, "reason": cuda_reason}
        if self.nvcc is not None:
            cuda |= {"nvcc": self.nvcc.version, "architectures": self.nvcc.architectures}
        record = {
            "native": {"built": reason is None, "reason": reason},
            "cuda": cuda,
            **getattr(self, "record", {}),
        }
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
