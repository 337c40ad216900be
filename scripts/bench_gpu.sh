#!/usr/bin/env bash
# Everything that a GPU must show, in one run of at most 8 minutes: each kernel against the reference, layers of LLaMA-7B's
# shape, whole models of that shape (prefill, decode), and the stages on two such layers. Without a GPU: what one would
# have to do, in bytes, kernel launches and the least time on an H200.
#
#     bash scripts/bench_gpu.sh
#
# Settings: RESULTS (file of JSON lines that rows are added to; default: scripts/results/YEAR-MONTH-gpu.jsonl), MINUTES
# (for layers and models; default: 6), PYTHON (an interpreter with this project; default: .venv's, made if need be).
set -euo pipefail
# shellcheck source=scripts/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
if [ $# -gt 0 ]; then
    usage "${BASH_SOURCE[0]}" "$1"
    echo "error: '$1': settings are given in the environment (--help lists them)" >&2
    exit 2
fi
if [ -z "${PYTHON:-}" ]; then
    ensure_environment quickstart
    PYTHON="$VENV_PYTHON"
elif ! "$PYTHON" -c 'import torch' 2>/dev/null; then
    echo "error: PYTHON=$PYTHON has no torch: name the interpreter of an environment with this project, or unset it" >&2
    exit 2
fi
export PYTHONPATH="$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
SCRIPTS="$REPOSITORY/scripts"
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "No GPU is here. What the kernels would have to do on an H200:"
    exec "$PYTHON" "$SCRIPTS/bench_gpu.py" --plan
fi
RESULTS="${RESULTS:-$SCRIPTS/results/$(date +%Y-%m)-gpu.jsonl}"
status=0
"$PYTHON" "$SCRIPTS/bench_gpu.py" --json "$RESULTS" --minutes "${MINUTES:-6}" || status=$?

FOLDER="$(mktemp -d)"
trap 'rm -rf "$FOLDER"' EXIT
"$PYTHON" "$SCRIPTS/random_models.py" --output_dir "$FOLDER/random" --shape 7B --layers 2
"$PYTHON" "$SCRIPTS/bench_stages.py" --parts features profile --device cuda --model_path "$FOLDER/random/model" \
    --train_data_path "$FOLDER/random/text" --tokens 16384 --block_size 2048 --num_experts 43 --json "$RESULTS"
exit "$status"
