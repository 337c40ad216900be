"""What the benchmarks share: options, alternatives timed in turn, and what the machine is."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from run_moefication.moefication.errors import MoEficationError
from run_moefication.moefication.processes import pick_device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# It says that it runs, and ends with the process that started it, however that ends.
SPIN = """
import os, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
parent = os.getppid()
print(flush=True)
while os.getppid() == parent:
    for _ in range(1_000_000):
        pass
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--num_experts`, `--active`, `--rounds`, `--device` and `--json`."""
    parser.add_argument("--num_experts", type=positive, default=16, help="experts per layer")
    parser.add_argument("--active", nargs="+", type=float, default=[0.25, 0.5, 0.75], help="shares of experts to run")
    parser.add_argument("--rounds", type=positive, default=7, help="rounds, of which the median counts")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")


def positive(text: str) -> int:
    """The type of options that count something."""
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number, at least 1")
    return int(text)


def check_options(arguments: argparse.Namespace, intermediate_sizes: list[int]) -> torch.device:
    """Refuse what cannot be measured; returns the device."""
    for size in intermediate_sizes:
        if size % arguments.num_experts:
            raise MoEficationError(f"--num_experts {arguments.num_experts} does not divide {size} neurons")
    for active in arguments.active:
        experts = active * arguments.num_experts
        if not 0 < active <= 1 or abs(experts - round(experts)) > 1e-6:
            raise MoEficationError(f"--active {active} of {arguments.num_experts} experts is not a whole number from 1")
    return torch.device(pick_device(arguments.device))


def table_line(columns: Sequence[str], row: Mapping[str, Any] | None = None) -> str:
    """A row of a table, in which numbers have three decimals and what is not there is a dash; or else its head."""
    values = columns if row is None else [row.get(column) for column in columns]
    cells = ["-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value) for value in values]
    return " ".join(f"{cell:>{max(len(column), 9)}}" for column, cell in zip(columns, cells, strict=True))


def write_json(path: Path | None, device: torch.device, rows: list[dict[str, Any]]) -> None:
    """The numbers and the machine, if a file was asked for; to a file of JSON lines (.jsonl) a line is added a row."""
    if path and path.suffix == ".jsonl":
        with path.open("a") as file:
            file.writelines(json.dumps({"machine": machine(device)} | row) + "\n" for row in rows)
    elif path:
        path.write_text(json.dumps({"machine": machine(device), "rows": rows}, indent=1) + "\n")


@contextmanager
def busy_core() -> Iterator[int]:
    """Within the context another process (yields its id), of our priority, wants all the time of one core of ours."""
    if not hasattr(os, "sched_getaffinity"):
        raise MoEficationError("--busy pins a process to a core, which only Linux can do")
    core = max(os.sched_getaffinity(0))
    with subprocess.Popen([sys.executable, "-c", SPIN, str(core)], stdout=subprocess.PIPE) as spinning:
        try:
            spinning.stdout.readline()
            yield spinning.pid
        finally:
            spinning.kill()


def median_seconds(
    alternatives: dict[str, Callable[[], object]], *, rounds: int, device: torch.device, at_least: float = 0.02
) -> dict[str, float]:
    """Median time of one call of each alternative. Each is called once to warm up; then, in every round, all are
    measured one after another, each over as many calls as take `at_least` seconds: a slow moment of a shared machine
    meets all alike."""
    wait = torch.get_device_module(device).synchronize  # does nothing for CPUs

    def seconds(function: Callable[[], object], calls: int) -> float:
        wait(device)
        start = time.perf_counter()
        for _ in range(calls):
            function()
        wait(device)
        return (time.perf_counter() - start) / calls

    calls = {}
    for name, function in alternatives.items():
        function()
        calls[name] = max(1, round(at_least / seconds(function, 1)))
    times = [{name: seconds(alternatives[name], calls[name]) for name in alternatives} for _ in range(rounds)]
    return {name: statistics.median(one[name] for one in times) for name in alternatives}


def machine(device: torch.device) -> str:
    """One line: the device, its threads, and whether the CPU computes in bfloat16."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    name = next((line.split(":")[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")), "CPU")
    has_bf16 = "with" if "avx512_bf16" in cpuinfo or "amx_bf16" in cpuinfo else "without"
    threads = torch.get_num_threads()
    return f"{name}, {threads} threads, {has_bf16} bf16 instructions, torch {torch.__version__}"


def peak_rates(dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """What the device reaches on a large square product (flop/s) and on reading a large tensor (bytes/s)."""
    size = 8192 if device.type == "cuda" else 2048
    square = torch.randn(size, size, device=device).to(dtype)
    stream = torch.ones(2**28, device=device, dtype=torch.float32)  # 1 GiB
    alternatives = {"product": lambda: square @ square, "read": lambda: stream.sum()}
    seconds = median_seconds(alternatives, rounds=5, device=device, at_least=0.1)
    return 2 * size**3 / seconds["product"], stream.nbytes / seconds["read"]
