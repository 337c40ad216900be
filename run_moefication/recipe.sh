# shellcheck shell=bash
# Sourced after common.sh: the settings that belong together, as settings.py knows them. Each can be given in the
# environment instead; numbers given there are checked.
#
#     RECIPE=calibrated    many small experts split on activations, some of them shared; ridge gates; a threshold instead
#                          of a fixed number; stage 5 refits down_proj (the default, and the better model)
#     RECIPE=plain         the original description's: 8 experts clustered on weights, MLP gates, 2 of 8 for every token
#
# DOMAIN_WEIGHTS (equal, or domain=weight,...) is the mix of the text that every stage reads.
#
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
