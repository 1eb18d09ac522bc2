#!/usr/bin/env bash
# Runs the op tests with kernels that the address sanitizer and the undefined-behaviour sanitizer watch.
# The instrumented library is built in a copy of the tree, so the one in use stays as it is.
set -euo pipefail

python=$(realpath --no-symlinks "$1")
root=$(cd "$(dirname "$0")/.." && pwd)
copy="$root/build/sanitize"
rm -rf "$copy"
mkdir -p "$copy"
cd "$root"
cp -r setup.py pyproject.toml README.md csrc diffcam_fast tests "$copy/"
rm -f "$copy"/diffcam_fast/*.so
cd "$copy"

# -O1: instrumented code is slow to compile at more, and finds no more. Checks that are called, not written out at each
# place, find the same, and the kernels compile sooner so. The parameter is gcc's.
flags="-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
called="--param=asan-instrumentation-with-call-threshold=0"
if "${CXX:-c++}" $called -x c++ -fsyntax-only /dev/null 2>/dev/null; then flags="$flags $called"; fi
# The CUDA kernels have their own run under sanitizers, in tests/cuda.
DIFFCAM_NATIVE=1 DIFFCAM_CUDA=0 CXXFLAGS="$flags" "$python" setup.py --quiet build_ext --inplace

library() { "${CXX:-c++}" -print-file-name="$1"; }
export LD_PRELOAD="$(library libasan.so) $(library libubsan.so) $(library libstdc++.so)"
# PyTorch and the interpreter keep memory until the process ends.
export ASAN_OPTIONS=detect_leaks=0
export PYTHONPATH="$copy"
"$python" -c "import diffcam_fast, sys; sys.exit(not diffcam_fast.__file__.startswith('$copy/'))"
# Without -s a report would be swallowed. Compiling is left out: inductor's compilers would inherit the preload.
OMP_WAIT_POLICY=passive "$python" -m pytest -s -q -p no:cacheprovider --numprocesses 2 tests/ops -k "not compile and not opcheck" "${@:2}"
