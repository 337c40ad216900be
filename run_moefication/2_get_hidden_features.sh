#!/usr/bin/env bash
# Stage 2, get_hidden_features: record what the MLPs see on pretraining-like text, one process per GPU. Works from any
# directory; each setting can be given in the environment instead:  MODEL_PATH=/models/llama_7B NUM_GPUS=4 bash ...
set -euo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=run_moefication/recipe.sh
. "$HERE/recipe.sh" # FEATURE_TOKENS

MODEL_PATH="${MODEL_PATH:-}"                                      # dense LLaMA in transformers format, or a hub id
SAVE_PATH="${SAVE_PATH:-$HERE/../llama_moe_temp_files}"           # where the stages keep their files
TRAIN_DATA_PATH="${TRAIN_DATA_PATH:-$HERE/../llama_data}"         # folder of jsonl files
TRAIN_DATA_CACHE_PATH="${TRAIN_DATA_CACHE_PATH:-$HERE/../llama_data_cache}"
TEMPLATES="${TEMPLATES:-"layers.{}.mlp.gate_proj.weight"}"
FEATURE_FORMAT="${FEATURE_FORMAT:-inputs}"                        # inputs: the rest is recomputed; full: store it all
DATA_USE_PERCENT="${DATA_USE_PERCENT:-1.0}"                       # fraction of what the domain mix allows
MAX_TOKENS="${MAX_TOKENS:-$FEATURE_TOKENS}"                       # LLaMA-7B, 65,536: 17 GB with inputs, 63 GB in full
BLOCK_SIZE="${BLOCK_SIZE:-}"                                      # empty: 2048, or what the model takes
BATCH_SIZE="${BATCH_SIZE:-4}"                                     # blocks per forward pass
SAVE_INTERVAL="${SAVE_INTERVAL:-1}"                               # batches per file
SEED="${SEED:-0}"
# shellcheck source=run_moefication/launch.sh
. "$HERE/launch.sh" # NUM_GPUS, and LAUNCH that follows from it

"${LAUNCH[@]}" "$HERE/llama_get_hidden_features.py" \
    --model_path "$MODEL_PATH" \
    --train_data_path "$TRAIN_DATA_PATH" \
    --train_data_cache_path "$TRAIN_DATA_CACHE_PATH" \
    --save_path "$SAVE_PATH" \
    --templates "$TEMPLATES" \
    --feature_format "$FEATURE_FORMAT" \
    --data_use_percent "$DATA_USE_PERCENT" \
    ${MAX_TOKENS:+--max_tokens "$MAX_TOKENS"} \
    ${BLOCK_SIZE:+--block_size "$BLOCK_SIZE"} \
    --batch_size "$BATCH_SIZE" \
    --save_interval "$SAVE_INTERVAL" \
    --seed "$SEED" \
    "$@"
