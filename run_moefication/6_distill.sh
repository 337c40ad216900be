#!/usr/bin/env bash
# Stage 6, distill (optional): train the calibrated checkpoint to predict as the dense model does, one process per GPU.
# Works from any directory; each setting can be given in the environment instead:
#     MODEL_PATH=/models/llama_7B MAX_TOKENS=262144 NUM_GPUS=4 bash 6_distill.sh --bf16
set -euo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
BUDGET="${NUM_SELECTS:-}" # experts that run per token, if given; as calibrated, if not
# shellcheck source=run_moefication/recipe.sh
. "$HERE/recipe.sh" # DISTILLATION_TOKENS

MODEL_PATH="${MODEL_PATH:-}"                               # dense LLaMA in transformers format, or a hub id
MOE_PATH="${MOE_PATH:-$(in_full "$MODEL_PATH")-MoE}"       # the checkpoint that 4_convert.sh wrote
CALIBRATED_PATH="${CALIBRATED_PATH:-$MOE_PATH-Calibrated}" # that of 5_calibrate.sh: what is trained
DISTILLED_PATH="${DISTILLED_PATH:-$MOE_PATH-Distilled}"    # the new checkpoint
TRAIN_DATA_PATH="${TRAIN_DATA_PATH:-$HERE/../llama_data}"  # folder of jsonl files
TRAIN_DATA_CACHE_PATH="${TRAIN_DATA_CACHE_PATH:-$HERE/../llama_data_cache}"
DOMAIN_WEIGHTS="${DOMAIN_WEIGHTS:-equal}"                  # or domain=weight,...
MAX_TOKENS="${MAX_TOKENS:-$DISTILLATION_TOKENS}"           # more is better, and longer
BLOCK_SIZE="${BLOCK_SIZE:-512}"                            # tokens that predict one another
BATCH_SIZE="${BATCH_SIZE:-2}"                              # blocks at a time in each process
TRAIN="${TRAIN:-all}"                                      # gates, experts or all
LR="${LR:-1e-4}"                                           # learning rate
SEED="${SEED:-0}"
# shellcheck source=run_moefication/launch.sh
. "$HERE/launch.sh" # NUM_GPUS, and LAUNCH that follows from it

"${LAUNCH[@]}" "$HERE/llama_distill.py" \
    --model_path "$MODEL_PATH" \
    --moe_path "$CALIBRATED_PATH" \
    --save_path "$DISTILLED_PATH" \
    --train_data_path "$TRAIN_DATA_PATH" \
    --train_data_cache_path "$TRAIN_DATA_CACHE_PATH" \
    --domain_weights "$DOMAIN_WEIGHTS" \
    --max_tokens "$MAX_TOKENS" \
    ${BLOCK_SIZE:+--block_size "$BLOCK_SIZE"} \
    --batch_size "$BATCH_SIZE" \
    --train "$TRAIN" \
    --lr "$LR" \
    ${BUDGET:+--num_selects "$BUDGET"} \
    --seed "$SEED" \
    "$@"
