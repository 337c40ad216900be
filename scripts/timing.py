"""What the benchmarks share: alternatives timed in turn, and what the machine is."""

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def median_seconds(
    alternatives: dict[str, Callable[[], object]], *, rounds: int, device: torch.device, at_least: float = 0.02
) -> dict[str, float]:
    """Median time of one call of each alternative. Each is called once to warm up; then, in every round, all are
    measured one after another, each over as many calls as take `at_least` seconds: a slow moment of a shared machine
    meets all alike."""
    calls = {}
    for name, function in alternatives.items():
        function()
        calls[name] = max(1, round(at_least / _seconds(function, 1, device)))
    times: dict[str, list[float]] = {name: [] for name in alternatives}
    for _ in range(rounds):
        for name, function in alternatives.items():
            times[name].append(_seconds(function, calls[name], device))
    return {name: statistics.median(values) for name, values in times.items()}


def _seconds(function: Callable[[], object], calls: int, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    synchronize(device)
    return (time.perf_counter() - start) / calls


def synchronize(device: torch.device) -> None:
    """Wait for the device's work to end."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine(device: torch.device) -> str:
    """One line: the device, its threads, and whether the CPU computes in bfloat16."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    name = next((line.split(":")[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")), "")
    has_bf16 = "with" if "avx512_bf16" in cpuinfo or "amx_bf16" in cpuinfo else "without"
    threads = torch.get_num_threads()
    return f"{name or platform.processor()}, {threads} threads, {has_bf16} bf16 instructions, torch {torch.__version__}"


def peak_rates(dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """What the device reaches on a large square product (flop/s) and on reading a large tensor (bytes/s)."""
    size = 8192 if device.type == "cuda" else 2048
    square = torch.randn(size, size, device=device).to(dtype)
    stream = torch.ones(2**28, device=device, dtype=torch.float32)  # 1 GiB
    seconds = median_seconds(
        {"product": lambda: square @ square, "read": lambda: stream.sum()}, rounds=5, device=device, at_least=0.1
    )
    return 2 * size**3 / seconds["product"], stream.nbytes / seconds["read"]
