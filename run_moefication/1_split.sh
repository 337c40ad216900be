#!/usr/bin/env bash
# Stage 1, split: cut the neurons of every MLP into experts. Works from any directory; each setting can be given in the
# environment instead:  MODEL_PATH=/models/llama_7B NUM_EXPERTS=16 bash 1_split.sh
set -euo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

MODEL_PATH="${MODEL_PATH:-}"                            # dense LLaMA in transformers format, or a hub id
SAVE_PATH="${SAVE_PATH:-$HERE/../llama_moe_temp_files}" # where the stages keep their files
NUM_EXPERTS="${NUM_EXPERTS:-8}"                         # must divide the MLP's width
TEMPLATES="${TEMPLATES:-"layers.{}.mlp.gate_proj.weight"}"
SEED="${SEED:-0}"
PYTHON="${PYTHON:-$([ -x "$HERE/../.venv/bin/python" ] && echo "$HERE/../.venv/bin/python" || echo python3)}"

"$PYTHON" "$HERE/llama_split_clustering.py" \
    --model_path "$MODEL_PATH" \
    --save_path "$SAVE_PATH" \
    --templates "$TEMPLATES" \
    --num_experts "$NUM_EXPERTS" \
    --seed "$SEED" \
    "$@"
