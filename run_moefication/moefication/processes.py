"""Which of several processes this one is, and the device that it computes on."""

import os
from dataclasses import dataclass

import torch

from .errors import MoEficationError, SettingError


@dataclass(frozen=True)
class Process:
    """This process among those that share the work, as the environment says."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


def this_process(local_rank: int | None = None) -> Process:
    """Which process this is by RANK, WORLD_SIZE and LOCAL_RANK (else `local_rank`), which torchrun sets."""
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": local_rank or 0}
    cure = "start the processes with torchrun, or unset RANK and WORLD_SIZE"
    try:
        process = Process(*(int(os.environ.get(name) or default) for name, default in names.items()))
    except ValueError as error:
        raise MoEficationError(f"{', '.join(names)} in the environment must be integers: {cure}") from error
    if not 0 <= process.rank < process.world_size:
        outside = f"RANK {process.rank}, which is outside of WORLD_SIZE {process.world_size}"
        raise MoEficationError(f"the environment says {outside}: {cure}")
    return process


def pick_device(device: str | None = None, local_rank: int = 0) -> str:
    """The device asked for, checked; "cuda" is the GPU of this process, and so is the default where there is one."""
    if device == "cuda" or (device is None and torch.cuda.is_available()):
        device = f"cuda:{local_rank}"
    elif device is None:
        return "cpu"
    try:
        torch.empty(0, device=device)
        if torch.device(device).type == "meta":
            raise RuntimeError("it holds no values")
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SettingError(f"device {device!r} cannot be used here ({reason})") from error
    return device
