#!/usr/bin/env bash
# Build llama.cpp for the CPU and install it into the environment as the Python package llama_cpp, for tests/exports/test_gguf.py.
# PyPI has only its sources, so this needs a C++ compiler; pip installs cmake and ninja if they are missing.
# Does nothing if this version is installed.
#
#   VENV                        directory of the environment; default: .venv
#   CMAKE_BUILD_PARALLEL_LEVEL  number of parallel compilers; default: 2
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VERSION=0.3.36
VENV=${VENV:-.venv}
LOG=$VENV/llama-cpp.log

say() { echo "llama-cpp: $*"; }
fail() {
    echo "llama-cpp: error: $*" >&2
    exit 1
}

[ -x "$VENV/bin/python" ] || fail "no environment in $VENV; create it with: make setup"
if [ "$("$VENV/bin/python" -c 'import llama_cpp; print(llama_cpp.__version__)' 2>/dev/null)" = "$VERSION" ]; then
    say "version $VERSION is in $VENV"
    exit 0
fi
command -v c++ >/dev/null || command -v g++ >/dev/null || fail "no C++ compiler found; on Debian or Ubuntu: apt-get install g++"

# Build the library only, without parts for its programs and without optional speed-ups: half of the work. LLAMA_BUILD_COMMON can
# only be switched off by a file that cmake includes when it enters llama.cpp's project. GGML_NATIVE=OFF does not tune to this CPU:
# pip caches the wheel, and another CPU may get it.
OVERRIDE=$(cd "$VENV" && pwd)/llama-cpp.cmake
echo 'set(LLAMA_BUILD_COMMON OFF)' >"$OVERRIDE"
export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-2}
export SKBUILD_BUILD_TARGETS=llama
export CMAKE_ARGS="-DCMAKE_PROJECT_llama.cpp_INCLUDE=$OVERRIDE -DLLAVA_BUILD=OFF -DLLAMA_OPENSSL=OFF
    -DGGML_NATIVE=OFF -DGGML_OPENMP=OFF -DGGML_LLAMAFILE=OFF -DGGML_CPU_REPACK=OFF"
say "building llama-cpp-python $VERSION (some minutes, once)"
started=$SECONDS
"$VENV/bin/python" -m pip install --verbose --no-input --disable-pip-version-check -c constraints.txt \
    --no-binary llama-cpp-python "llama-cpp-python==$VERSION" >"$LOG" 2>&1 || {
    grep -E '^ *(ERROR|error)|CMake Error|: error:' "$LOG" | tail -n 5 >&2 || true
    fail "could not build llama-cpp-python $VERSION; see $LOG"
}
"$VENV/bin/python" -c 'import llama_cpp' || fail "llama-cpp-python is built, but llama_cpp cannot be imported; see $LOG"
say "done in $((SECONDS - started)) s"
