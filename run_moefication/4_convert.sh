#!/usr/bin/env bash
# Stage 4, convert: write the LlamaMoE checkpoint. Works from any directory; each setting can be given in the environment
# instead:  MODEL_PATH=/models/llama_7B MOE_PATH=/models/llama_7B-MoE bash 4_convert.sh
set -euo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=run_moefication/recipe.sh
. "$HERE/recipe.sh" # NUM_EXPERTS, NUM_SELECTS (need not be that of 3_select.sh) and ROUTING

MODEL_PATH="${MODEL_PATH:-}"                            # dense LLaMA in transformers format, or a hub id
MOE_PATH="${MOE_PATH:-$(in_full "$MODEL_PATH")-MoE}"    # the new checkpoint
SAVE_PATH="${SAVE_PATH:-$HERE/../llama_moe_temp_files}" # where the stages keep their files
TEMPLATES="${TEMPLATES:-"layers.{}.mlp.gate_proj.weight"}"
CONVERT_TYPE="${CONVERT_TYPE:-LlamaMoEForCausalLM}"     # or LlamaMoEModel, LlamaMoEForSequenceClassification

NAME="$(basename "$(in_full "$MODEL_PATH")")"
"$PYTHON" "$HERE/llama_convert.py" \
    --model_path "$MODEL_PATH" \
    --split_file_path "$SAVE_PATH/$NAME-${NUM_EXPERTS}Expert-Split-Clustering" \
    --select_file_path "$SAVE_PATH/$NAME-${NUM_EXPERTS}Expert-Select-MLP" \
    --save_path "$MOE_PATH" \
    --templates "$TEMPLATES" \
    --num_experts "$NUM_EXPERTS" \
    --num_selects "$NUM_SELECTS" \
    --routing "$ROUTING" \
    --convert_type "$CONVERT_TYPE" \
    "$@"
