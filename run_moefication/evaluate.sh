#!/usr/bin/env bash
# Perplexity of the dense model and of the MoEs made of it, at several budgets.
#     MODEL_PATH=/models/llama_7B TEXT_PATH=wiki.test.raw NUM_SELECTS="8 6 4 2" bash evaluate.sh
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
shared_settings # MODEL_PATH, MOE_PATH, and where there are any CALIBRATED_PATH and DISTILLED_PATH

TEXT_PATH="${TEXT_PATH:-$HERE/../llama_data/heldout/wikipedia.jsonl}"
NUM_SELECTS="${NUM_SELECTS:-}" # such as "8 6 4 2"; empty: the checkpoint's own
MAX_TOKENS="${MAX_TOKENS:-}"   # empty: all
BATCH_SIZE="${BATCH_SIZE:-4}"

CHECKPOINTS=("$MOE_PATH")
for path in "$CALIBRATED_PATH" "$DISTILLED_PATH"; do
    [ ! -e "$path/manifest.json" ] || CHECKPOINTS+=("$path")
done
options TEXT_PATH BLOCK_SIZE MAX_TOKENS BATCH_SIZE
# shellcheck disable=SC2086 # NUM_SELECTS is a list
"$PYTHON" "$HERE/llama_evaluate.py" --model_path "$MODEL_PATH" "${CHECKPOINTS[@]}" \
    ${NUM_SELECTS:+--num_selects $NUM_SELECTS} "${OPTIONS[@]}" "$@"
