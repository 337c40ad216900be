# shellcheck shell=bash
# Sourced after common.sh: the settings that belong together, as settings.py knows them, of RECIPE=calibrated (the
# default, and the better model), RECIPE=engine (what engines for other MoEs can hold) or RECIPE=plain (the original
# description's). Numbers in the environment are checked.
# It also gives BUDGET, which is NUM_SELECTS where that is given and else empty, and the folders of the first stages'
# files: SPLIT_FOLDER, FEATURES_FOLDER and SELECT_FOLDER.
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: Python >= 3.11 is needed, '$PYTHON' is not: set PYTHON=/path/to/python3.11 (or newer)" >&2
    exit 2
fi
export RECIPE NUM_EXPERTS NUM_SELECTS NUM_SHARED_EXPERTS CLUSTER_ON SELECT_CRITERION GATE_NETWORK GATE_RANK OUTPUT_BIAS \
    ROUTING SPLIT_TOKENS FEATURE_TOKENS CALIBRATION_TOKENS DISTILLATION_TOKENS DOMAIN_WEIGHTS BLOCK_SIZE EVAL_TOKENS \
    NUM_GPUS
ASSIGNMENTS="$(PYTHONPATH="$HERE/..${PYTHONPATH:+:$PYTHONPATH}" "$PYTHON" -m run_moefication.settings)" || exit 2
eval "$ASSIGNMENTS"
