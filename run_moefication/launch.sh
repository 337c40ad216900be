# shellcheck shell=bash
# Sourced by the numbered scripts that can use several GPUs, after PYTHON: LAUNCH starts a process for each of NUM_GPUS.

NUM_GPUS="${NUM_GPUS:-$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
case "$NUM_GPUS" in
    *[!0-9]* | 0* | ??????????*) echo "error: NUM_GPUS=$NUM_GPUS: a whole number above 0 is needed" >&2 && exit 2 ;;
esac
LAUNCH=("$PYTHON")
if [ "$NUM_GPUS" -gt 1 ]; then
    LAUNCH+=(-m torch.distributed.run --standalone --nproc_per_node="$NUM_GPUS") # that is torchrun
fi
