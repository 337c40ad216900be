#!/usr/bin/env bash
# Downloads a checkpoint from the Hugging Face hub: bash download_hf.sh MODEL_ID TARGET_FOLDER (--help says more).
set -euo pipefail
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
PYTHON="${PYTHON:-$([ -x "$HERE/../.venv/bin/python" ] && echo "$HERE/../.venv/bin/python" || echo python3)}"
if ! "$PYTHON" -P -c 'import importlib.util as i; assert i.find_spec("huggingface_hub")' 2>/dev/null; then
    echo "download_hf.sh: error: '$PYTHON' has no huggingface_hub: pip install -e . here, or set PYTHON to another" >&2
    exit 2
fi
export PYTHONPATH="$HERE/..${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_VERBOSITY=error HF_HUB_DISABLE_TELEMETRY=1
[ -t 2 ] || export HF_HUB_DISABLE_PROGRESS_BARS=1

exec "$PYTHON" -P "$HERE/download_hf.py" "$@"
