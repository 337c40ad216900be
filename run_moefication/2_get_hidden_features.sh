#!/usr/bin/env bash
# Stage 2, get_hidden_features: record what the MLPs see on pretraining-like text, one process per GPU.
#     MODEL_PATH=/models/llama_7B NUM_GPUS=4 bash 2_get_hidden_features.sh
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# MODEL_PATH, SAVE_PATH, TEMPLATES, SEED, NUM_GPUS;
# what text is read: TRAIN_DATA_PATH, TRAIN_DATA_CACHE_PATH, DOMAIN_WEIGHTS, BLOCK_SIZE
stage_settings

FEATURE_FORMAT="${FEATURE_FORMAT:-inputs}"  # inputs: the rest is recomputed; full: store it all
DATA_USE_PERCENT="${DATA_USE_PERCENT:-1.0}" # fraction of what the domain mix allows
MAX_TOKENS="${MAX_TOKENS:-$FEATURE_TOKENS}" # LLaMA-7B, 65,536: 17 GB with inputs, 63 GB in full
BATCH_SIZE="${BATCH_SIZE:-4}"               # blocks per forward pass
SAVE_INTERVAL="${SAVE_INTERVAL:-1}"         # batches per file

options TRAIN_DATA_PATH TRAIN_DATA_CACHE_PATH DOMAIN_WEIGHTS DATA_USE_PERCENT MAX_TOKENS BLOCK_SIZE SEED
options FEATURE_FORMAT BATCH_SIZE SAVE_INTERVAL
[ "$FEATURE_FORMAT" != full ] || options TEMPLATES
launch "$HERE/llama_get_hidden_features.py" --model_path "$MODEL_PATH" --save_path "$SAVE_PATH" "${OPTIONS[@]}" "$@"
