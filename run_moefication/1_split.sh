#!/usr/bin/env bash
# Stage 1, split: cut the neurons of every MLP into experts. Works from any directory; each setting can be given in the
# environment instead:  MODEL_PATH=/models/llama_7B NUM_EXPERTS=128 bash 1_split.sh
set -euo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=run_moefication/common.sh
. "$HERE/common.sh" && shared_settings # MODEL_PATH, SAVE_PATH, TEMPLATES, SEED; what text is read
# shellcheck source=run_moefication/recipe.sh
. "$HERE/recipe.sh" # NUM_EXPERTS, NUM_SHARED_EXPERTS, CLUSTER_ON and SPLIT_TOKENS, the tokens to look at

DOMAIN_WEIGHTS="${DOMAIN_WEIGHTS:-equal}" # or domain=weight,...
MAX_TOKENS="$SPLIT_TOKENS"

options TEMPLATES NUM_EXPERTS CLUSTER_ON SEED
[ "$CLUSTER_ON" != activations ] ||
    options NUM_SHARED_EXPERTS TRAIN_DATA_PATH TRAIN_DATA_CACHE_PATH DOMAIN_WEIGHTS BLOCK_SIZE MAX_TOKENS
"$PYTHON" "$HERE/llama_split_clustering.py" --model_path "$MODEL_PATH" --save_path "$SAVE_PATH" "${OPTIONS[@]}" "$@"
