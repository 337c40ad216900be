#!/usr/bin/env bash
# Stage 4, convert: write the LlamaMoE checkpoint. Works from any directory; each setting can be given in the environment
# instead:  MODEL_PATH=/models/llama_7B MOE_PATH=/models/llama_7B-MoE bash 4_convert.sh
set -euo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=run_moefication/common.sh
. "$HERE/common.sh" && shared_settings # MODEL_PATH, SAVE_PATH, TEMPLATES, and MOE_PATH, the new checkpoint
# shellcheck source=run_moefication/recipe.sh
. "$HERE/recipe.sh" # NUM_EXPERTS, NUM_SELECTS (need not be that of 3_select.sh) and ROUTING

CONVERT_TYPE="${CONVERT_TYPE:-LlamaMoEForCausalLM}" # or LlamaMoEModel, LlamaMoEForSequenceClassification

options TEMPLATES NUM_EXPERTS NUM_SELECTS ROUTING CONVERT_TYPE
"$PYTHON" "$HERE/llama_convert.py" --model_path "$MODEL_PATH" --split_file_path "$SPLIT_FOLDER" \
    --select_file_path "$SELECT_FOLDER" --save_path "$MOE_PATH" "${OPTIONS[@]}" "$@"
