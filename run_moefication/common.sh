# shellcheck shell=bash
# Sourced by the other shell scripts: which Python runs the stages, and what settings have in common.

PYTHON_OF_VENV="$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/python"
PYTHON="${PYTHON:-$([ -x "$PYTHON_OF_VENV" ] && echo "$PYTHON_OF_VENV" || echo python3)}"

# whole LEAST SETTING...: each of these settings, where it is given, must be a whole number, LEAST or more.
whole() {
    local least="$1" setting value
    shift
    for setting in "$@"; do
        value="${!setting:-$least}"
        if ! [[ "$value" =~ ^(0|[1-9][0-9]{0,17})$ ]] || [ "$value" -lt "$least" ]; then
            echo "error: $setting=$value: a whole number is needed, $least or more" >&2
            exit 2
        fi
    done
}

# in_full FOLDER: its path from the root, so that "." has a name, too. What is no folder here, such as a hub id, stays.
in_full() {
    [ -d "$1" ] && (CDPATH='' cd -- "$1" && pwd) || echo "${1%/}"
}
