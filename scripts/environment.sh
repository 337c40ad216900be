# shellcheck shell=bash
# Sourced by the other scripts. Gives REPOSITORY (the root of this project) and ensure_environment:
#
#     . scripts/environment.sh
#     ensure_environment test        # or: quickstart, dev, or several with commas
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

# usage SCRIPT [ARGUMENT]: for a script that takes folders. With --help it prints the comment at the script's top and ends,
# without an argument likewise, as an error; an argument that is another option is refused.
usage() {
    case "${2-}" in
        -h | --help) _describe "$1" && exit 0 ;;
        "") _describe "$1" >&2 && exit 2 ;;
        -*) echo "${1##*/}: error: '$2': settings are given in the environment (--help lists them)" >&2 && exit 2 ;;
    esac
}

_describe() { sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$1"; }

# Prints all that decides what an install gives. Fails where the environment has no working Python >= 3.11.
# The path is part of it, since an editable install of a project that has moved points to its old place.
_state() (
    "$VENV_PYTHON" -c 'import sys; assert sys.version_info >= (3, 11); print(sys.version)' 2>/dev/null &&
        cd "$REPOSITORY" && pwd && cat pyproject.toml constraints.txt
)

# Makes the environment, or mends one whose making was cut short.
_make_venv() {
    local python="${PYTHON:-python3}"
    if ! "$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "error: '$python' is no Python >= 3.11 that can make a virtual environment: set PYTHON=/path/to/python3.11" \
            "(or newer), or install its venv package (Debian: apt install python3-venv)" >&2
        return 2
    fi
    if ! "$python" -m venv "$VENV" || ! _state >/dev/null; then
        echo "error: $VENV has no usable Python >= 3.11: delete that folder and run this again" >&2
        return 2
    fi
}

# ensure_environment EXTRA: the environment holds this project, editable, with that extra of pyproject.toml and the
# versions of constraints.txt. Does nothing when that is so already; finishes an install that was cut short.
ensure_environment() {
    local extra="$1" stamp="$VENV/.installed-$1" unfinished="$VENV/.unfinished"
    local install=("$VENV_PYTHON" -m pip install --disable-pip-version-check)
    if [ ! -e "$unfinished" ] && [ -e "$stamp" ] && _state | cmp -s - "$stamp"; then
        return 0
    fi
    if ! _state >/dev/null || ! "$VENV_PYTHON" -m pip --version >/dev/null 2>&1; then
        _make_venv || return
    fi
    echo "Installing into $VENV (extra: $extra); the first time takes some minutes" >&2
    [ -t 2 ] || install+=(--quiet)
    # pip takes a package whose installation was killed half-way for installed: then all are installed anew.
    [ ! -e "$unfinished" ] || install+=(--ignore-installed)
    touch "$unfinished"
    # torch on its own first, where a local build for this machine goes before the one of the registry.
    if ! (cd "$REPOSITORY" && "${install[@]}" "$(grep '^torch==' constraints.txt)" &&
        "${install[@]}" -e ".[$extra]" -c constraints.txt); then
        echo "error: pip could not install the project (see above): check the network, then run this again" >&2
        return 2
    fi
    _state >"$stamp"
    rm "$unfinished"
}
