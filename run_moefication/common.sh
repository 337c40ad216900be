# shellcheck shell=bash
# Sourced by the other shell scripts, which work from any directory: which Python runs the stages, the settings that
# several stages share, how settings become options, and how a stage starts on several GPUs. Each setting of a script
# can be given in the environment instead.

ARGUMENTS=" $* " # of the script that sources this one
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
PYTHON_OF_VENV="$HERE/../.venv/bin/python"
PYTHON="${PYTHON:-$([ -x "$PYTHON_OF_VENV" ] && echo "$PYTHON_OF_VENV" || echo python3)}"

# in_full FOLDER: its path from the root, so that "." has a name, too. What is no folder here, such as a hub id, stays.
in_full() {
    [ -d "$1" ] && (CDPATH='' cd -- "$1" && pwd) || echo "${1%/}"
}

# refuse WORDS: says what is wrong, and ends the script.
refuse() {
    echo "error: $*" >&2
    exit 2
}

# asks_for OPTION|OPTION...: whether the script was called with one of them.
asks_for() {
    [[ "$ARGUMENTS" =~ \ ($1)[\ =] ]]
}

# require_model SETTING: refuses a setting that names neither the folder of a checkpoint nor what may be a hub id.
require_model() {
    local model="${!1}"
    [ ! -f "$model/config.json" ] || return 0
    [ ! -e "$model" ] || refuse "$1=$model has no config.json: name the folder of a checkpoint in transformers format"
    [[ "$model" =~ ^[[:alnum:]_-][[:alnum:]_.-]*/[[:alnum:]_.-]+$ ]] ||
        refuse "$1=$model is no folder here, and no hub id (owner/name)"
}

# The settings that several stages share.
shared_settings() {
    # With -P, since the stages do not find what lies in the current directory.
    "$PYTHON" -P -c 'from importlib.util import find_spec; assert find_spec("run_moefication") and find_spec("torch")' \
        2>/dev/null || refuse "'$PYTHON' is no Python >= 3.11 that has this project: pip install -e . -c constraints.txt" \
        "in an environment, or set PYTHON to the python of one that has it"
    export MODEL_PATH="${MODEL_PATH:-}"                           # dense LLaMA in transformers format, or a hub id
    if ! asks_for '-h|--help'; then
        [ -n "$MODEL_PATH" ] || refuse "MODEL_PATH is not set: MODEL_PATH=/models/llama_7B bash $0"
        require_model MODEL_PATH
    fi
    export SAVE_PATH="${SAVE_PATH:-$HERE/../llama_moe_temp_files}" # where stages 1 to 3 keep their files
    MOE_PATH="${MOE_PATH:-$(in_full "$MODEL_PATH")-MoE}"          # the checkpoint that 4_convert.sh writes
    CALIBRATED_PATH="${CALIBRATED_PATH:-$MOE_PATH-Calibrated}"    # that of 5_calibrate.sh
    DISTILLED_PATH="${DISTILLED_PATH:-$MOE_PATH-Distilled}"       # that of 6_distill.sh
    TEMPLATES="${TEMPLATES:-"layers.{}.mlp.gate_proj.weight"}"
    TRAIN_DATA_PATH="${TRAIN_DATA_PATH:-$HERE/../llama_data}"     # folder of jsonl files
    TRAIN_DATA_CACHE_PATH="${TRAIN_DATA_CACHE_PATH:-$HERE/../llama_data_cache}"
    BLOCK_SIZE="${BLOCK_SIZE:-}"                                  # tokens; empty: 2048, or what the model takes
    SEED="${SEED:-0}"
}

# The settings of a stage: those that several stages share, and those of the recipe.
stage_settings() {
    shared_settings
    . "$HERE/recipe.sh"
}

# options SETTING...: add to OPTIONS each of these settings that is not empty, as `--setting value`.
OPTIONS=()
options() {
    local setting
    for setting in "$@"; do
        [ -z "${!setting:-}" ] || OPTIONS+=("--$(tr '[:upper:]' '[:lower:]' <<<"$setting")" "${!setting}")
    done
}

# count_gpus: NUM_GPUS is by default the number of those that are there, or 1 on the CPU.
count_gpus() {
    NUM_GPUS="${NUM_GPUS:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
}

# switch SETTING...: on is 1 and off is empty from now on; other words are refused.
switch() {
    local setting
    for setting in "$@"; do
        case "${!setting:-}" in
        1 | on | yes | true) printf -v "$setting" 1 ;;
        "" | 0 | off | no | false) printf -v "$setting" '' ;;
        *) refuse "$setting=${!setting}: on or off" ;;
        esac
    done
}

# launch SCRIPT OPTION...: start a process for each of NUM_GPUS.
launch() {
    local launcher=()
    count_gpus
    [ "$NUM_GPUS" -eq 1 ] || launcher=(-m torch.distributed.run --standalone --nproc_per_node="$NUM_GPUS") # torchrun
    "$PYTHON" ${launcher[@]+"${launcher[@]}"} "$@"
}
