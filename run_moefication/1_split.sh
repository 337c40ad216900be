#!/usr/bin/env bash
# Stage 1, split: cut the neurons of every MLP into experts.
#     MODEL_PATH=/models/llama_7B NUM_EXPERTS=128 bash 1_split.sh
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# MODEL_PATH, SAVE_PATH, TEMPLATES, SEED, CLUSTER_ON (weights, activations, or graph), NUM_EXPERTS, NUM_SHARED_EXPERTS;
# what text is read: TRAIN_DATA_PATH, TRAIN_DATA_CACHE_PATH, DOMAIN_WEIGHTS, BLOCK_SIZE
stage_settings

MAX_TOKENS="${MAX_TOKENS:-$SPLIT_TOKENS}" # where CLUSTER_ON is not weights

SCRIPT=llama_split_graph.py
options TEMPLATES NUM_EXPERTS SEED
[ "$CLUSTER_ON" = graph ] || { SCRIPT=llama_split_clustering.py && options CLUSTER_ON; }
[ "$CLUSTER_ON" = weights ] ||
    options NUM_SHARED_EXPERTS TRAIN_DATA_PATH TRAIN_DATA_CACHE_PATH DOMAIN_WEIGHTS BLOCK_SIZE MAX_TOKENS
"$PYTHON" "$HERE/$SCRIPT" --model_path "$MODEL_PATH" --save_path "$SAVE_PATH" "${OPTIONS[@]}" "$@"
