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
# shellcheck source=scripts/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
usage "${BASH_SOURCE[0]}" "$@"
ensure_environment eval
PYTHON="$VENV_PYTHON"
INCLUDED=()
if [ -z "${TASKS:-}" ]; then
    if [ -z "${HELDOUT:-}" ]; then
        "$PYTHON" "$REPOSITORY/llama_data/make_sample_data.py" --output_dir "$REPOSITORY/.cache/llama_data"
        HELDOUT="$REPOSITORY/.cache/llama_data/heldout"
    fi
    "$PYTHON" "$REPOSITORY/scripts/make_eval_tasks.py" --heldout_path "$HELDOUT" --output_dir "$REPOSITORY/.cache/lm_eval_tasks"
    INCLUDED=(--include_path "$REPOSITORY/.cache/lm_eval_tasks")
    TASKS=heldout_perplexity,heldout_continuation,heldout_cloze
    export HF_HUB_OFFLINE=1
fi
exec "$PYTHON" "$REPOSITORY/scripts/harness.py" --model_path "$@" --tasks "$TASKS" ${INCLUDED[@]+"${INCLUDED[@]}"} \
    ${LIMIT:+--limit "$LIMIT"} ${DTYPE:+--dtype "$DTYPE"} ${BATCH_SIZE:+--batch_size "$BATCH_SIZE"} \
    ${OUTPUT:+--json "$OUTPUT"}
