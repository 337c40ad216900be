# shellcheck shell=bash
# Sourced by the numbered scripts that can use several GPUs, after common.sh: LAUNCH starts a process for each of NUM_GPUS.

NUM_GPUS="${NUM_GPUS:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
whole 1 NUM_GPUS
LAUNCH=("$PYTHON")
if [ "$NUM_GPUS" -gt 1 ]; then
    LAUNCH+=(-m torch.distributed.run --standalone --nproc_per_node="$NUM_GPUS") # that is torchrun
fi
