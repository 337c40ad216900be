#!/usr/bin/env bash
# Stage 3, select: train the gates that choose experts. Works from any directory; each setting can be given in the
# environment instead. Several GPUs:  SPECIFY_LAYER=0-15 bash 3_select.sh --device cuda:0 & SPECIFY_LAYER=16-31 ...
set -euo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=run_moefication/recipe.sh
. "$HERE/recipe.sh" # NUM_EXPERTS and NUM_SELECTS, SELECT_CRITERION, GATE_NETWORK and GATE_RANK

MODEL_PATH="${MODEL_PATH:-}"                            # dense LLaMA in transformers format, or a hub id
SAVE_PATH="${SAVE_PATH:-$HERE/../llama_moe_temp_files}" # where the stages keep their files
TEMPLATES="${TEMPLATES:-"layers.{}.mlp.gate_proj.weight"}"
GATE_FIT="${GATE_FIT:-}"                                # ridge or adam; empty: ridge for linear gates
SPECIFY_LAYER="${SPECIFY_LAYER:-}"                      # such as 0-7; empty: all layers
SEED="${SEED:-0}"

NAME="$(basename "$(in_full "$MODEL_PATH")")"
"$PYTHON" "$HERE/llama_select_mlp.py" \
    --model_path "$MODEL_PATH" \
    --split_file_path "$SAVE_PATH/$NAME-${NUM_EXPERTS}Expert-Split-Clustering" \
    --hidden_features_path "$SAVE_PATH/$NAME-Hidden-Features" \
    --save_path "$SAVE_PATH" \
    --templates "$TEMPLATES" \
    --select_criterion "$SELECT_CRITERION" \
    --num_experts "$NUM_EXPERTS" \
    --num_selects "$NUM_SELECTS" \
    ${SPECIFY_LAYER:+--specify_layer "$SPECIFY_LAYER"} \
    --gate_network "$GATE_NETWORK" \
    ${GATE_FIT:+--gate_fit "$GATE_FIT"} \
    ${GATE_RANK:+--gate_rank "$GATE_RANK"} \
    --use_softmax \
    --seed "$SEED" \
    "$@"
