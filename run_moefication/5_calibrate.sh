#!/usr/bin/env bash
# Stage 5, calibrate: refine gates, set thresholds and refit down_proj of the converted checkpoint, in closed form; then
# fit norms, biases and a factor for each expert to the dense model's predictions.
#     MODEL_PATH=/models/llama_7B MAX_TOKENS=262144 bash 5_calibrate.sh
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# MODEL_PATH, MOE_PATH, CALIBRATED_PATH (the new one), SEED, NUM_SELECTS, OUTPUT_BIAS;
# what text is read: TRAIN_DATA_PATH, TRAIN_DATA_CACHE_PATH, DOMAIN_WEIGHTS, BLOCK_SIZE
stage_settings

MAX_TOKENS="${MAX_TOKENS:-$CALIBRATION_TOKENS}"                           # more is better, and longer
BATCH_SIZE="${BATCH_SIZE:-4}"                                             # blocks at a time
REFIT_GATES="${REFIT_GATES-$([ "$GATE_NETWORK" != linear ] || echo on)}" # off: gates stay as they are
GATE_BIAS="${GATE_BIAS:-}"                                               # as in stage 3
FIT_LOGITS="${FIT_LOGITS-on}"                                            # off: no fit of all layers together
switch REFIT_GATES OUTPUT_BIAS FIT_LOGITS

options TRAIN_DATA_PATH TRAIN_DATA_CACHE_PATH DOMAIN_WEIGHTS MAX_TOKENS BLOCK_SIZE BATCH_SIZE GATE_BIAS SEED
"$PYTHON" "$HERE/llama_calibrate.py" --model_path "$MODEL_PATH" --moe_path "$MOE_PATH" --save_path "$CALIBRATED_PATH" \
    "${OPTIONS[@]}" ${BUDGET:+--num_selects "$BUDGET"} ${REFIT_GATES:+--refit_gates} ${OUTPUT_BIAS:+--output_bias} \
    ${FIT_LOGITS:+--fit_logits} "$@"
