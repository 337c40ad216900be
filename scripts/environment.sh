# shellcheck shell=bash
# Sourced by the other scripts. Gives REPOSITORY (the root of this project) and ensure_environment:
#
#     . scripts/environment.sh
#     ensure_environment test        # or: quickstart, dev
#     "$VENV_PYTHON" -m pytest
#
# The environment is .venv in the root (use_environment FOLDER: another), made with PYTHON (default: python3) where there
# is none yet.

REPOSITORY="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

use_environment() {
    VENV="$1"
    VENV_PYTHON="$VENV/bin/python"
}
use_environment "$REPOSITORY/.venv"

# Prints a hash of all that decides what an install gives. Fails where the environment has no working Python >= 3.11.
# The path is part of it, since an editable install of a project that has moved points to its old place.
_environment_fingerprint() {
    "$VENV_PYTHON" - "$REPOSITORY" 2>/dev/null <<'PYTHON_CODE'
import hashlib
import pathlib
import sys

assert sys.version_info >= (3, 11)
root = pathlib.Path(sys.argv[1])
parts = [sys.version.encode(), bytes(root), *((root / name).read_bytes() for name in ("pyproject.toml", "constraints.txt"))]
print(hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest())
PYTHON_CODE
}

# Makes the environment, or mends one whose making was cut short.
_make_venv() {
    local python="${PYTHON:-python3}"
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "error: Python >= 3.11 is needed, '$python' is not: set PYTHON=/path/to/python3.11 (or newer)" >&2
        return 2
    fi
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        echo "error: '$python' cannot make a virtual environment: install its venv package (Debian: apt install python3-venv)" >&2
        return 2
    fi
    if ! "$python" -m venv "$VENV" || ! _environment_fingerprint >/dev/null; then
        echo "error: $VENV has no usable Python >= 3.11: delete that folder and run this again" >&2
        return 2
    fi
}

# _install EXTRA PIP_OPTION...: torch on its own first, where a local build for this machine goes before the one of the
# registry; the rest then finds it there.
_install() (
    local extra="$1"
    shift
    cd "$REPOSITORY" || return
    "$VENV_PYTHON" -m pip install --disable-pip-version-check "$@" "$(grep '^torch==' constraints.txt)" &&
        "$VENV_PYTHON" -m pip install --disable-pip-version-check "$@" -e ".[$extra]" -c constraints.txt
)

# ensure_environment EXTRA: the environment holds this project, editable, with that extra of pyproject.toml and the
# versions of constraints.txt. Does nothing when that is so already; finishes an install that was cut short.
ensure_environment() {
    local extra="$1" fingerprint quiet="" again=""
    local stamp="$VENV/.installed-$extra" unfinished="$VENV/.unfinished"
    if [ ! -e "$unfinished" ] && fingerprint="$(_environment_fingerprint)" &&
        [ "$(cat "$stamp" 2>/dev/null)" = "$fingerprint" ]; then
        return 0
    fi

    if ! _environment_fingerprint >/dev/null || ! "$VENV_PYTHON" -m pip --version >/dev/null 2>&1; then
        _make_venv || return
    fi
    fingerprint="$(_environment_fingerprint)" || return
    [ -t 2 ] || quiet=1
    echo "Installing into $VENV (extra: $extra); the first time takes some minutes" >&2

    # pip takes a package whose installation was killed half-way for installed: then all are installed anew.
    [ ! -e "$unfinished" ] || again=1
    touch "$unfinished"
    if ! _install "$extra" ${quiet:+--quiet} ${again:+--ignore-installed}; then
        echo "error: pip could not install the project (see above): check the network, then run this again" >&2
        return 2
    fi
    echo "$fingerprint" >"$stamp"
    rm "$unfinished"
}
