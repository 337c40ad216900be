#!/usr/bin/env bash
# Stage 3, select: train the gates that choose experts.
#     SPECIFY_LAYER=0-15 bash 3_select.sh --device cuda:0 & SPECIFY_LAYER=16-31 bash 3_select.sh --device cuda:1
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# MODEL_PATH, SAVE_PATH, TEMPLATES, SEED, NUM_EXPERTS, NUM_SELECTS, SELECT_CRITERION, GATE_NETWORK, GATE_RANK
stage_settings

GATE_FIT="${GATE_FIT:-}"           # ridge or adam; empty: ridge for linear gates
GATE_BIAS="${GATE_BIAS:-}"         # off: gates without a bias, which some engines cannot have; empty: with one
SPECIFY_LAYER="${SPECIFY_LAYER:-}" # such as 0-7; empty: all layers

options TEMPLATES NUM_EXPERTS NUM_SELECTS SELECT_CRITERION GATE_NETWORK GATE_FIT GATE_RANK GATE_BIAS SPECIFY_LAYER
case "$GATE_NETWORK-${GATE_FIT:-ridge}" in # only gates that are trained take these options
    mlp-* | linear-adam) options SEED && OPTIONS+=(--use_softmax) ;;
esac
"$PYTHON" "$HERE/llama_select_mlp.py" --model_path "$MODEL_PATH" --split_file_path "$SPLIT_FOLDER" \
    --hidden_features_path "$FEATURES_FOLDER" --save_path "$SAVE_PATH" "${OPTIONS[@]}" "$@"
