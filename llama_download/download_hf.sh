#!/usr/bin/env bash
# Downloads a checkpoint in transformers format from the Hugging Face hub, with the hub's own client (huggingface_hub):
#
#     bash download_hf.sh MODEL_ID TARGET_FOLDER
#     bash download_hf.sh meta-llama/Llama-3.2-1B /models/Llama-3.2-1B
#
# Takes config, tokenizer, licence and the weights: safetensors, or .bin where there are none. Everything comes from one
# commit and is compared with the hub's checksums; files that are there and right are not fetched again. TARGET_FOLDER
# is new, empty, or filled by an earlier run for the same model.
#
# Settings: REVISION (main: a branch, tag or commit), PYTHON (one with huggingface_hub; the project's .venv if there is
# one), and those of the client: HF_TOKEN or `hf auth login` for models behind a licence, HF_ENDPOINT for a mirror. Exit
# status: 2 for what the hub refuses or what cannot be written, 3 where the network fails.
set -euo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

die() {
    echo "download_hf.sh: error: $1" >&2
    exit 2
}

case "${1:-}" in
    -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit 0 ;;
esac
[ $# -eq 2 ] && [ -n "$1" ] && [ -n "$2" ] || die "give two arguments: download_hf.sh MODEL_ID TARGET_FOLDER"
[[ "$1" =~ ^[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)?$ ]] ||
    die "'$1' is no model's name on the hub: it looks like meta-llama/Llama-3.2-1B"
PYTHON="${PYTHON:-$([ -x "$HERE/../.venv/bin/python" ] && echo "$HERE/../.venv/bin/python" || echo python3)}"
"$PYTHON" -P -c 'import importlib.util as i; assert i.find_spec("huggingface_hub")' 2>/dev/null ||
    die "'$PYTHON' has no huggingface_hub: install the project (pip install -e .), or set PYTHON to one that has"
export HF_HUB_VERBOSITY=error HF_HUB_DISABLE_TELEMETRY=1
[ -t 2 ] || export HF_HUB_DISABLE_PROGRESS_BARS=1

exec "$PYTHON" -P "$HERE/download_hf.py" "$1" "$2" "${REVISION:-main}"
