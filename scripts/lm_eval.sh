#!/usr/bin/env bash
# EleutherAI's lm-evaluation-harness on checkpoints, dense, MoE or exported for transformers: one table.
#
#     bash scripts/lm_eval.sh MODEL...
#     TASKS=hellaswag,arc_easy LIMIT=100 bash scripts/lm_eval.sh MODEL...    # the harness's own, which want a network
#
# Settings: TASKS (default: continuation choice, cloze and perplexity, made from held-out text, without a network),
# HELDOUT (folder of that text, .jsonl a domain; default: the sample data's), LIMIT (examples of each task; default:
# all), DTYPE (default: float32), BATCH_SIZE (default: 8), OUTPUT (file for the harness's own results, as JSON).
set -euo pipefail
case "${1:--h}" in
    -h | --help) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" && exit 0 ;;
    -*) echo "lm_eval.sh: error: '$1': settings are given in the environment (--help lists them)" >&2 && exit 2 ;;
esac
# shellcheck source=scripts/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
PYTHON="${LM_EVAL_PYTHON:-}"
if [ -z "$PYTHON" ]; then
    ensure_environment eval
    PYTHON="$VENV_PYTHON"
fi
TASKS_FOLDER="$REPOSITORY/.cache/lm_eval_tasks"
if [ -z "${TASKS:-}" ]; then
    if [ -z "${HELDOUT:-}" ]; then
        "$PYTHON" "$REPOSITORY/llama_data/make_sample_data.py" --output_dir "$REPOSITORY/.cache/llama_data"
        HELDOUT="$REPOSITORY/.cache/llama_data/heldout"
    fi
    "$PYTHON" "$REPOSITORY/scripts/make_eval_tasks.py" --heldout_path "$HELDOUT" --output_dir "$TASKS_FOLDER"
    TASKS=heldout_perplexity,heldout_continuation,heldout_cloze
    export HF_HUB_OFFLINE=1
fi
exec "$PYTHON" "$REPOSITORY/scripts/harness.py" --model_path "$@" --tasks "$TASKS" --include_path "$TASKS_FOLDER" \
    ${LIMIT:+--limit "$LIMIT"} ${DTYPE:+--dtype "$DTYPE"} ${BATCH_SIZE:+--batch_size "$BATCH_SIZE"} \
    ${OUTPUT:+--json "$OUTPUT"}
