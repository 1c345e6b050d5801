#!/usr/bin/env bash
# Create or update a virtual environment with this package (editable) and its development tools.
#
#   PYTHON           interpreter to use; default: python3.11, else python3 if it is 3.11 or newer
#   VENV             directory of the environment; default: .venv
#   NEWEST_TRANSFORMERS  1: install the newest transformers of the package index instead of the pinned one
#   TORCH_INDEX_URL  package index for PyTorch's CPU builds, tried on a machine without CUDA when pip's own indexes lack them;
#                    default: pytorch.org's; empty: pip's own indexes only
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${VENV:-.venv}
TORCH_INDEX_URL=${TORCH_INDEX_URL-https://download.pytorch.org/whl/cpu}
LOG=$VENV/setup.log
MADE_FOR=$VENV/made-for       # interpreter and checkout; written when the environment is created
COMPLETE=$VENV/setup-complete # checksum of the files that say what to install; written at the end

say() { echo "setup: $*"; }
fail() {
    echo "setup: error: $*" >&2
    exit 1
}

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
has_venv() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }
has_virtualenv() { command -v virtualenv >/dev/null && virtualenv --version >/dev/null 2>&1; }

# Print the first interpreter that is new enough and can make environments, else the first that is new enough.
find_python() {
    local candidate first=
    if [ -n "${PYTHON:-}" ]; then
        new_enough "$PYTHON" || fail "PYTHON=$PYTHON does not run, or is older than Python 3.11: name another"
        echo "$PYTHON"
        return
    fi
    for candidate in $(type -ap python3.11 python3); do
        new_enough "$candidate" || continue
        first=${first:-$candidate}
        has_venv "$candidate" && echo "$candidate" && return
    done
    [ -n "$first" ] || fail "no Python 3.11 or newer found; install one, or name it: make setup PYTHON=/path/to/python3.11"
    echo "$first"
}

# pip's output goes to the log.
pip_install() {
    "$VENV/bin/python" -m pip install --quiet --no-input --disable-pip-version-check -c "$CONSTRAINTS" "$@" >"$LOG" 2>&1
}

# install WHAT PIP_ARGUMENTS...: WHAT is the name in the error message.
install() {
    local what=$1
    shift
    pip_install "$@" && return
    grep '^ *ERROR' "$LOG" | tail -n 5 >&2 || true
    if grep -q 'Retrying' "$LOG"; then fail "could not install $what: the package index does not answer; see $LOG"; fi
    fail "could not install $what; see $LOG"
}

installed() { "$VENV/bin/python" -c "import importlib.metadata as m; print(m.version('$1'))" 2>/dev/null; }

PYTHON=$(find_python)
PYTHON_AND_PLACE="$PYTHON $PWD"
VERSIONS=$({ cat setup.py pyproject.toml constraints.txt scripts/setup.sh; echo "${NEWEST_TRANSFORMERS:-}"; } | cksum)
reuse=no
if [ "$(cat "$MADE_FOR" 2>/dev/null)" = "$PYTHON_AND_PLACE" ] && "$VENV/bin/python" -c '' 2>/dev/null; then
    if [ "$(cat "$COMPLETE" 2>/dev/null)" = "$VERSIONS" ]; then
        say "$VENV is up to date"
        exit 0
    fi
    reuse=yes
fi

started=$SECONDS
cuda=no
if [[ "$(nvidia-smi -L 2>/dev/null || true)" = GPU* ]]; then cuda=yes; fi
# NVIDIA's containers have their own build of PyTorch, which is kept.
system_torch=no
if [ $cuda = yes ] && "$PYTHON" -c 'import torch' 2>/dev/null; then system_torch=yes; fi

create_venv() {
    local system_site=()
    if [ -e "$VENV" ]; then
        [ -e "$VENV/pyvenv.cfg" ] || fail "$VENV exists and is not a virtual environment; move it away, or set VENV to another name"
        rm -rf "$VENV"
    fi
    if [ $system_torch = yes ]; then system_site=(--system-site-packages); fi
    say "creating $VENV with $("$PYTHON" -V) ($PYTHON)"
    if has_venv "$PYTHON"; then
        "$PYTHON" -m venv "${system_site[@]}" "$VENV" || fail "$PYTHON -m venv $VENV failed"
    elif has_virtualenv; then
        virtualenv --quiet --python "$PYTHON" "${system_site[@]}" "$VENV" || fail "virtualenv failed for $PYTHON"
    else
        fail "$PYTHON cannot make virtual environments; on Debian or Ubuntu: apt-get install python3-venv"
    fi
    echo "$PYTHON_AND_PLACE" >"$MADE_FOR"
}
if [ $reuse = yes ]; then say "updating $VENV"; else create_venv; fi

CONSTRAINTS=constraints.txt
if [ $system_torch = yes ]; then
    # Installed packages are left out of the constraints, so that pip may keep their versions. torch, megatron-core and numpy are
    # pinned to the installed versions.
    CONSTRAINTS=$VENV/constraints.txt
    unset PIP_CONSTRAINT
    "$PYTHON" - <<'EOF' >"$CONSTRAINTS"
import importlib.metadata
import re

for line in open("constraints.txt"):
    name = re.match(r"[A-Za-z0-9._-]*", line).group()
    try:
        version = name and importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        print(line, end="")
    else:
        if name in ("torch", "megatron-core", "numpy"):
            print(f"{name}=={version}")
EOF
fi
install "pip and setuptools" --upgrade pip setuptools

torch=$(sed -n 's/^torch==\([^ ;]*\).*/\1/p' constraints.txt)
if [ $system_torch = yes ]; then
    say "using the PyTorch $(installed torch) of this system"
elif [[ "$(installed torch)" = "$torch"* ]]; then
    :
elif [ $cuda = yes ]; then
    say "installing PyTorch $torch for CUDA (several GB)"
    install PyTorch "torch==$torch"
else
    say "installing PyTorch $torch for CPU (about 200 MB)"
    pip_install "torch==$torch+cpu" ||
        { [ -n "$TORCH_INDEX_URL" ] && pip_install --index-url "$TORCH_INDEX_URL" "torch==$torch+cpu"; } ||
        {
            say "no CPU build found for this Python; installing the general build, which is larger (several GB with its libraries)"
            install PyTorch "torch==$torch"
        }
fi

say "installing flextron_mcore and its dependencies"
install flextron_mcore --no-build-isolation -e '.[dev]'
if [ -n "${NEWEST_TRANSFORMERS:-}" ]; then
    # Take the pins off transformers and off the packages whose versions it decides; all other pins stay.
    grep -vE '^(transformers|tokenizers|huggingface[-_]hub|safetensors)==' "$CONSTRAINTS" >"$VENV/newest.txt"
    CONSTRAINTS=$VENV/newest.txt
    install "the newest transformers" --upgrade transformers
fi
"$VENV/bin/python" -W ignore -c 'import flextron_mcore, megatron.core' >"$LOG" 2>&1 || {
    tail -n 3 "$LOG" >&2
    fail "flextron_mcore is installed, but Megatron-Core cannot be imported; see $LOG"
}
echo "$VERSIONS" >"$COMPLETE"
say "done in $((SECONDS - started)) s: PyTorch $(installed torch), Megatron-Core $(installed megatron-core), transformers $(installed transformers)"
