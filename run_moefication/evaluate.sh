#!/usr/bin/env bash
# Perplexity of the dense model and of the MoEs made of it, at several budgets.
#     MODEL_PATH=/models/llama_7B TEXT_PATH=wiki.test.raw NUM_SELECTS="32 21 11" bash evaluate.sh
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
for setting in CALIBRATED_PATH DISTILLED_PATH; do
    asks_for '-h|--help' || [ -z "${!setting:-}" ] || [ -f "${!setting}/config.json" ] ||
        refuse "$setting=${!setting} has no config.json: name a checkpoint that is there, or unset it"
done
shared_settings # MODEL_PATH, MOE_PATH, and where there are any CALIBRATED_PATH and DISTILLED_PATH

TEXT_PATH="${TEXT_PATH:-$HERE/../llama_data/heldout/wikipedia.jsonl}"
NUM_SELECTS="${NUM_SELECTS:-}" # such as "32 21 11"; empty: the checkpoint's own
MAX_TOKENS="${MAX_TOKENS:-}"   # empty: all
BATCH_SIZE="${BATCH_SIZE:-4}"

if ! asks_for '-h|--help'; then
    require_model MOE_PATH
    [ -f "$TEXT_PATH" ] || asks_for --text_path ||
        refuse "TEXT_PATH=$TEXT_PATH is not a file: set it to held-out text, such as python" \
            "llama_data/make_sample_data.py makes in llama_data/heldout"
fi
CHECKPOINTS=("$MOE_PATH")
for path in "$CALIBRATED_PATH" "$DISTILLED_PATH"; do
    [ ! -f "$path/config.json" ] || CHECKPOINTS+=("$path")
done
options TEXT_PATH BLOCK_SIZE MAX_TOKENS BATCH_SIZE
# shellcheck disable=SC2086 # NUM_SELECTS is a list
"$PYTHON" "$HERE/llama_evaluate.py" --model_path "$MODEL_PATH" "${CHECKPOINTS[@]}" \
    ${NUM_SELECTS:+--num_selects $NUM_SELECTS} "${OPTIONS[@]}" "$@"
