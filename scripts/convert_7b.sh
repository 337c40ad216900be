#!/usr/bin/env bash
# A whole checkpoint of any size converted with the recipe's own amounts of text: what it will take, the stages, perplexity,
# and a report of what it took. On one GPU, on eight (stage 2 uses all) or on none; finished stages are not done again.
#
#     bash scripts/convert_7b.sh /models/llama_7B
#     PLAN=1 bash scripts/convert_7b.sh /models/llama_7B                 # only what it will take
#     RECIPE=engine bash scripts/convert_7b.sh /models/llama_7B          # for llama.cpp: exported as well
#
# Settings: DATA (folder of training text; default: the sample data), TEXT (held-out text; default: the sample data's
# Wikipedia), WORK (folder for everything, one for each set of other settings; default: MODEL-conversion, with RECIPE
# MODEL-conversion-RECIPE), RECIPE, NUM_EXPERTS, NUM_SELECTS, SPLIT_TOKENS, FEATURE_TOKENS, CALIBRATION_TOKENS,
# EVAL_TOKENS, BLOCK_SIZE, NUM_GPUS, BASE_MODEL_ID (the model's id on the hub, for the card), OUTTYPE (of the export,
# such as "f16 q8_0").
set -euo pipefail
# shellcheck source=scripts/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
usage "${BASH_SOURCE[0]}" "$@"
STAGES="$REPOSITORY/run_moefication"
# shellcheck source=run_moefication/common.sh
. "$STAGES/common.sh"
switch PLAN
[ -z "${DATA:-}" ] || [ -e "$DATA" ] || refuse "DATA=$DATA is not there: name a folder of text"
[ -z "${TEXT:-}" ] || [ -f "$TEXT" ] || refuse "TEXT=$TEXT is not a file"
if [ $# -gt 1 ]; then
    echo "error: one checkpoint at a time; settings are given in the environment" >&2
    exit 2
fi
if [ ! -f "$1/config.json" ]; then
    echo "error: $1 is no folder with a config.json: download the checkpoint first (llama_download/README.md)" >&2
    exit 2
fi
MODEL_PATH="$(cd "$1" && pwd)"
export MODEL_PATH
ensure_environment quickstart,engine
export PYTHON="$VENV_PYTHON" WORK="${WORK:-$MODEL_PATH-conversion${RECIPE:+-$RECIPE}}"
export EVAL_TOKENS="${EVAL_TOKENS:-65536}"

"$PYTHON" "$REPOSITORY/scripts/conversion_cost.py" --model_path "$MODEL_PATH" --work "$WORK" \
    ${NUM_GPUS:+--gpus "$NUM_GPUS"}
[ -z "$PLAN" ] || exit 0

SAMPLE="$REPOSITORY/.cache/llama_data"
if [ -z "${DATA:-}" ] || [ -z "${TEXT:-}" ]; then
    "$PYTHON" "$REPOSITORY/llama_data/make_sample_data.py" --output_dir "$SAMPLE"
fi
export TRAIN_DATA_PATH="${DATA:-$SAMPLE}" TEXT_PATH="${TEXT:-$SAMPLE/heldout/wikipedia.jsonl}"
export SAVE_PATH="$WORK" TRAIN_DATA_CACHE_PATH="$WORK/tokens"
NAME="$(basename "$MODEL_PATH")"
export MOE_PATH="$WORK/$NAME-MoE" CALIBRATED_PATH="$WORK/$NAME-MoE-Calibrated"
unset DISTILLED_PATH # there is none
mkdir -p "$WORK"

say() { printf '\n== %s\n' "$*"; }
for stage in 1_split 2_get_hidden_features 3_select 4_convert 5_calibrate; do
    say "$stage"
    bash "$STAGES/$stage.sh"
done
EVALUATED="$WORK/evaluated" # says on what, once the card has it
ON="$EVAL_TOKENS tokens of $(cd "$(dirname "$TEXT_PATH")" && pwd)/$(basename "$TEXT_PATH")"
if [ ! "$EVALUATED" -nt "$CALIBRATED_PATH/manifest.json" ] || [ "$(cat "$EVALUATED")" != "$ON" ]; then
    say evaluate
    MAX_TOKENS="$EVAL_TOKENS" bash "$STAGES/evaluate.sh" --card --json "$WORK/evaluation.json"
    echo "$ON" >"$EVALUATED"
fi
if [ "${RECIPE:-calibrated}" = engine ]; then
    say export
    # shellcheck disable=SC2086 # OUTTYPE is a list
    "$PYTHON" "$STAGES/llama_export.py" --model_path "$CALIBRATED_PATH" --save_path "$WORK/$NAME-GGUF" \
        --format gguf --outtype ${OUTTYPE:-f16 q8_0} --text_path "$TEXT_PATH"
fi
{
    echo "# $NAME, converted"
    echo
    "$PYTHON" "$REPOSITORY/scripts/conversion_cost.py" --model_path "$MODEL_PATH" --work "$WORK" \
        ${NUM_GPUS:+--gpus "$NUM_GPUS"} --measured
    echo
    sed -n '/<!-- evaluation -->/,/<!-- end of the evaluation -->/p' "$CALIBRATED_PATH/README.md"
} >"$WORK/REPORT.md"
say "The report, $WORK/REPORT.md"
echo
cat "$WORK/REPORT.md"
