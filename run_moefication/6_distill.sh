#!/usr/bin/env bash
# Stage 6, distill (optional): train the calibrated checkpoint to predict as the dense model does, one process per GPU.
#     MODEL_PATH=/models/TinyLlama_v1.1 MAX_TOKENS=1048576 NUM_GPUS=4 bash 6_distill.sh --bf16
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
BLOCK_SIZE="${BLOCK_SIZE:-512}" # tokens that predict one another
# MODEL_PATH, CALIBRATED_PATH, DISTILLED_PATH (the new one), SEED, NUM_SELECTS, NUM_GPUS;
# what text is read: TRAIN_DATA_PATH, TRAIN_DATA_CACHE_PATH, DOMAIN_WEIGHTS, BLOCK_SIZE
stage_settings

count_gpus
MAX_TOKENS="${MAX_TOKENS:-$((DISTILLATION_TOKENS * NUM_GPUS))}" # so much for each process; more is better, and longer
BATCH_SIZE="${BATCH_SIZE:-2}"                                   # blocks at a time in each process
TRAIN="${TRAIN:-all}"                                           # gates, experts or all
LR="${LR:-2e-4}"                                                # learning rate
NESTED_SELECTS="${NESTED_SELECTS:-}"                            # other budgets to train for in turn ("36 12"), or none

options TRAIN_DATA_PATH TRAIN_DATA_CACHE_PATH DOMAIN_WEIGHTS MAX_TOKENS BLOCK_SIZE BATCH_SIZE TRAIN LR SEED
# shellcheck disable=SC2086 # NESTED_SELECTS is a list
launch "$HERE/llama_distill.py" --model_path "$MODEL_PATH" --moe_path "$CALIBRATED_PATH" \
    --save_path "$DISTILLED_PATH" "${OPTIONS[@]}" ${BUDGET:+--num_selects "$BUDGET"} \
    ${NESTED_SELECTS:+--nested_selects $NESTED_SELECTS} "$@"
