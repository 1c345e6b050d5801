#!/usr/bin/env bash
# Build the site in build/site, in an environment of its own that needs neither PyTorch nor Megatron-Core.
#
#   PYTHON  interpreter; default: python3.11, else python3
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=.venv-docs
PYTHON=${PYTHON:-$(command -v python3.11 || command -v python3)}
VERSIONS=$(cat setup.py constraints.txt scripts/docs.sh | cksum)
if [ "$(cat $VENV/complete 2>/dev/null)" != "$VERSIONS" ]; then
    "$PYTHON" -m venv --clear $VENV
    # The packages of setup.py's extra `docs` alone: installing the extra would install flextron_mcore and PyTorch, too.
    mapfile -t packages < <(sed -n 's/^DOCS = \[\(.*\)\]/\1/p' setup.py | tr -d '" ' | tr ',' '\n')
    [ ${#packages[@]} -gt 0 ] || { echo "docs: setup.py has no line DOCS = [...]" >&2; exit 1; }
    $VENV/bin/python -m pip install --quiet --no-input --disable-pip-version-check -c constraints.txt "${packages[@]}" >$VENV/pip.log 2>&1 ||
        { grep '^ *ERROR' $VENV/pip.log >&2 || true; echo "docs: error: could not install ${packages[*]}; see $VENV/pip.log" >&2; exit 1; }
    echo "$VERSIONS" >$VENV/complete
fi
NO_MKDOCS_2_WARNING=1 $VENV/bin/mkdocs build --quiet --strict --clean
echo "docs: build/site/index.html"
