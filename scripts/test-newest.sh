#!/usr/bin/env bash
# Run the tests on Python 3.12 or 3.13, for which pip installs the newest supported Megatron-Core, with the newest transformers of the
# package index. `make test` covers the oldest Megatron-Core and the pinned transformers.
# Arguments go to pytest; default: the whole suite.
#
# The interpreter is NEWEST_PYTHON if it is set, else one on the PATH, else one of pyenv. On a Debian machine without one, root can
# run the tests in a Debian 13 tree, which debootstrap makes in .cache-newest/.
#
#   DEBIAN_MIRROR        mirror for debootstrap; default: the first one in this machine's apt sources
#   FORCE_DEBOOTSTRAP=1  do not look for an interpreter
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TREE=$PWD/.cache-newest/debian13
LOG=$PWD/.cache-newest/debootstrap.log
SUITE=trixie
if [ $# = 0 ]; then set -- tests; fi
export CUDA_VISIBLE_DEVICES= # GPU tests are `make test-gpu`
export NEWEST_TRANSFORMERS=1

say() { echo "test-newest: $*"; }
fail() {
    echo "test-newest: error: $*" >&2
    exit 1
}

# A candidate must run: version managers leave shims without a version behind them.
usable() { "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] not in ((3, 12), (3, 13)))' >/dev/null 2>&1; }

find_python() {
    local candidate version
    if [ -n "${NEWEST_PYTHON:-}" ]; then
        usable "$NEWEST_PYTHON" || fail "NEWEST_PYTHON=$NEWEST_PYTHON does not run, is not Python 3.12 or 3.13, or lacks venv"
        echo "$NEWEST_PYTHON"
        return
    fi
    for candidate in $(type -ap python3.13 python3.12 python3); do
        usable "$candidate" && echo "$candidate" && return
    done
    command -v pyenv >/dev/null || return 0
    for version in $(pyenv versions --bare | grep -E '^3\.1[23]\.[0-9]+$' | sort -rV); do
        candidate=$(pyenv prefix "$version")/bin/python3
        usable "$candidate" && echo "$candidate" && return
    done
    return 0
}

run_with() {
    VENV=.venv-newest PYTHON=$1 scripts/setup.sh
    shift
    exec .venv-newest/bin/python -m pytest -q "$@"
}

apt_mirror() {
    local sources=/etc/apt/sources.list parts=/etc/apt/sources.list.d
    {
        sed -nE 's/^deb +(\[[^]]*\] +)?([^ ]+).*/\2/p' $sources $parts/debian.list 2>/dev/null
        sed -nE 's/^URIs: *([^ ]+).*/\1/p' $parts/debian.sources 2>/dev/null
        sed -nE 's/^deb +(\[[^]]*\] +)?([^ ]+).*/\2/p' $parts/*.list 2>/dev/null
        sed -nE 's/^URIs: *([^ ]+).*/\1/p' $parts/*.sources 2>/dev/null
    } | grep -m 1 -E '^https?:' || true
}

make_tree() {
    local mirror=${DEBIAN_MIRROR:-}
    [ ! -e "$TREE.complete" ] || return 0
    if [ -z "$mirror" ] && grep -q '^ID=debian' /etc/os-release; then mirror=$(apt_mirror); fi
    [ -n "$mirror" ] || fail "no Debian mirror found in the apt sources; set DEBIAN_MIRROR"
    command -v debootstrap >/dev/null || {
        say "installing debootstrap"
        { apt-get update && apt-get install -y debootstrap; } >"$LOG" 2>&1 || fail "could not install debootstrap; see $LOG"
    }
    say "no Python 3.12 or 3.13 here: making a Debian 13 tree in .cache-newest (about a minute, once)"
    if [ -z "${http_proxy:-}" ]; then eval "$(apt-config shell http_proxy Acquire::http::Proxy)"; fi
    rm -rf --one-file-system "$TREE"
    http_proxy=${http_proxy:-} unshare --mount debootstrap --variant=minbase \
        --include=python3,python3-venv,python3-dev,ca-certificates,g++,make "$SUITE" "$TREE" "$mirror" >"$LOG" 2>&1 || {
        tail -n 3 "$LOG" >&2
        fail "debootstrap failed; see $LOG"
    }
    touch "$TREE.complete"
}

# Copy this machine's network settings and the checkout into the tree.
fill_tree() {
    local file
    for file in /etc/resolv.conf /etc/hosts /etc/pip.conf /etc/xdg/pip/pip.conf ~/.pip/pip.conf ~/.config/pip/pip.conf \
        /etc/ssl/certs/ca-certificates.crt "${PIP_CONFIG_FILE:-}" "${PIP_CERT:-}" "${SSL_CERT_FILE:-}" "${REQUESTS_CA_BUNDLE:-}"; do
        if [ -f "$file" ]; then install -D -m 644 "$file" "$TREE$file"; fi
    done
    rm -rf "$TREE/checkout"
    mkdir "$TREE/checkout"
    tar --exclude='./.git' --exclude='./.venv*' --exclude='./.cache-newest' --exclude='./runs' --exclude='__pycache__' -cf - . |
        tar --no-same-owner -xf - -C "$TREE/checkout"
}

run_in_tree() {
    [ "$(id -u)" = 0 ] || fail "no working Python 3.12 or 3.13 found, and only root can make a Debian tree with one; install one, or set NEWEST_PYTHON"
    command -v apt-get >/dev/null || fail "no working Python 3.12 or 3.13 found; install one, or set NEWEST_PYTHON"
    unshare --mount true 2>/dev/null || fail "no working Python 3.12 or 3.13 found, and this machine does not allow mounts; install one, or set NEWEST_PYTHON"
    mkdir -p "$(dirname "$TREE")"
    make_tree
    fill_tree
    # The mounts are private to this process, so they end with it.
    # shellcheck disable=SC2016  # expanded inside the tree
    exec unshare --mount bash -euc '
        tree=$1
        shift
        for dir in proc sys dev; do mount --rbind "/$dir" "$tree/$dir"; done
        exec env LC_ALL=C.UTF-8 PIP_NO_CACHE_DIR=1 PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin PYTHON=/usr/bin/python3 VENV=/opt/venv \
            chroot "$tree" bash -euc "cd /checkout && scripts/setup.sh && exec /opt/venv/bin/python -m pytest -q \"\$@\"" bash "$@"
    ' bash "$TREE" "$@"
}

if [ "${FORCE_DEBOOTSTRAP:-0}" != 1 ]; then
    python=$(find_python)
    if [ -n "$python" ]; then run_with "$python" "$@"; fi
fi
run_in_tree "$@"
