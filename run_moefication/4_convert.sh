#!/usr/bin/env bash
# Stage 4, convert: write the LlamaMoE checkpoint.
#     MODEL_PATH=/models/llama_7B MOE_PATH=/models/llama_7B-MoE bash 4_convert.sh
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# MODEL_PATH, MOE_PATH (the new one), TEMPLATES, ROUTING, NUM_EXPERTS, NUM_SELECTS (need not be that of 3_select.sh)
stage_settings

CONVERT_TYPE="${CONVERT_TYPE:-LlamaMoEForCausalLM}" # or LlamaMoEModel, LlamaMoEForSequenceClassification
BASE_MODEL_ID="${BASE_MODEL_ID:-}"                  # of the dense model on the hub, such as owner/name, for the card

options TEMPLATES NUM_EXPERTS NUM_SELECTS ROUTING CONVERT_TYPE BASE_MODEL_ID
"$PYTHON" "$HERE/llama_convert.py" --model_path "$MODEL_PATH" --split_file_path "$SPLIT_FOLDER" \
    --select_file_path "$SELECT_FOLDER" --save_path "$MOE_PATH" "${OPTIONS[@]}" "$@"
