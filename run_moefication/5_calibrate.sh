#!/usr/bin/env bash
# Stage 5, calibrate: refit gates, thresholds and down_proj of the converted checkpoint, layer by layer in closed form.
# Works from any directory; each setting can be given in the environment instead:
#     MODEL_PATH=/models/llama_7B MAX_TOKENS=262144 bash 5_calibrate.sh
set -euo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
BUDGET="${NUM_SELECTS:-}" # experts that run per token, if given; as converted, if not
# shellcheck source=run_moefication/recipe.sh
. "$HERE/recipe.sh" # GATE_NETWORK: linear gates are fitted anew; OUTPUT_BIAS

MODEL_PATH="${MODEL_PATH:-}"                              # dense LLaMA in transformers format, or a hub id
MOE_PATH="${MOE_PATH:-$(in_full "$MODEL_PATH")-MoE}"      # the checkpoint that 4_convert.sh wrote
CALIBRATED_PATH="${CALIBRATED_PATH:-$MOE_PATH-Calibrated}" # the new checkpoint
TRAIN_DATA_PATH="${TRAIN_DATA_PATH:-$HERE/../llama_data}" # folder of jsonl files
TRAIN_DATA_CACHE_PATH="${TRAIN_DATA_CACHE_PATH:-$HERE/../llama_data_cache}"
DOMAIN_WEIGHTS="${DOMAIN_WEIGHTS:-equal}"                 # or domain=weight,...
MAX_TOKENS="${MAX_TOKENS:-$CALIBRATION_TOKENS}"           # more is better, and longer
BLOCK_SIZE="${BLOCK_SIZE:-}"                              # empty: 2048, or what the model takes
BATCH_SIZE="${BATCH_SIZE:-4}"                             # blocks at a time
SEED="${SEED:-0}"
REFIT_GATES="${REFIT_GATES-$([ "$GATE_NETWORK" != linear ] || echo 1)}" # empty: gates stay as they are

"$PYTHON" "$HERE/llama_calibrate.py" \
    --model_path "$MODEL_PATH" \
    --moe_path "$MOE_PATH" \
    --save_path "$CALIBRATED_PATH" \
    --train_data_path "$TRAIN_DATA_PATH" \
    --train_data_cache_path "$TRAIN_DATA_CACHE_PATH" \
    --domain_weights "$DOMAIN_WEIGHTS" \
    --max_tokens "$MAX_TOKENS" \
    ${BLOCK_SIZE:+--block_size "$BLOCK_SIZE"} \
    --batch_size "$BATCH_SIZE" \
    --seed "$SEED" \
    ${BUDGET:+--num_selects "$BUDGET"} \
    ${REFIT_GATES:+--refit_gates} \
    ${OUTPUT_BIAS:+--output_bias} \
    "$@"
