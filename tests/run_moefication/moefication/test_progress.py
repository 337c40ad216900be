"""What long work shows: a bar on a terminal, a line a minute elsewhere."""

import os
import pty
import re
import subprocess
import sys
import termios
from collections.abc import Iterable

import pipeline
import pytest

from run_moefication.moefication import progress as module
from run_moefication.moefication.progress import Progress, duration, progress


class Clock:
    """The monotonic clock of `progress`, which stands still until a test moves it."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def during(self, items: Iterable, seconds: float) -> None:
        """Take so long for each of the items."""
        for _ in items:
            self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(Progress, "_last_line", float("-inf"))
    monkeypatch.delenv("RANK", raising=False)
    return clock


def test_a_line_a_minute_says_how_far_and_how_long(clock, capsys):
    clock.during(progress(range(30), "calibrate", "layer"), 50)
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "calibrate: layer 2 of 30, 100.0 s, about 23 min still"
    assert told[1] == "calibrate: layer 4 of 30, 3 min 20 s, about 22 min still"
    assert told[-1] == "calibrate: layer 30 of 30, 25 min 0 s"
    assert len(told) == 15  # in 25 minutes: a layer that ends less than a minute after a line is silent


def test_lines_have_no_carriage_return(clock, capsys):
    bar = progress(range(3), "split", "layer")
    bar.set_postfix(loss=1)
    clock.during(bar, 61)
    told = capsys.readouterr().err
    assert (told.count("\n"), told.count("\r")) == (3, 0)


def test_less_than_a_minute_writes_nothing(clock, capsys):
    clock.during(progress(range(59), "select", "layer"), 1)
    assert capsys.readouterr().err == ""


def test_a_unit_longer_than_a_minute_is_told_when_it_ends(clock, capsys):
    clock.during(progress(range(2), "convert", "shard"), 600)
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "convert: shard 1 of 2, 10 min 0 s, about 10 min still"
    assert len(told) == 2


def test_several_at_a_time_share_the_minute(clock, capsys):
    for _ in progress(range(5), "outer", "pass"):
        clock.during(progress(range(6), "inner", "step"), 20)
    assert capsys.readouterr().err.count("\n") <= 5 * 6 * 20 / 60


def test_what_an_earlier_run_did_counts_but_says_nothing_of_the_speed(clock, capsys):
    clock.during(progress(range(9), "calibrate", "layer", done=21), 120)
    assert capsys.readouterr().err.startswith("calibrate: layer 22 of 30, 2 min 0 s, about 16 min still\n")


def test_bytes_and_tokens_have_units(clock, capsys):
    bar = Progress(desc="read", total=10_000_000, unit=" tokens", unit_scale=True)
    clock.now += 60
    bar.update(2_500_000)
    assert capsys.readouterr().err == "read: 2.50M tokens of 10.0M tokens, 60.0 s, about 3 min still\n"


def test_only_the_first_of_several_processes_tells(clock, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    clock.during(progress(range(3), "features", "batch"), 100)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(34.84, "34.8 s"), (119, "119.0 s"), (249.8, "4 min 10 s"), (3599.7, "1 h 0 min"), (11_530, "3 h 12 min")],
)
def test_durations_can_be_read(seconds, text):
    assert duration(seconds) == text


def test_a_terminal_shows_what_how_far_and_how_long():
    code = "import time; from run_moefication.moefication.progress import progress\n"
    code += "for _ in progress(range(4), 'calibrate', 'layer'): time.sleep(0.15)"
    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (24, 100))  # tqdm draws nothing in the 0 columns that it has at first
    subprocess.run([sys.executable, "-c", code], stderr=end, check=True, env=os.environ | {"RANK": "0"})
    shown = os.read(terminal, 100_000).decode()
    for file in (terminal, end):
        os.close(file)
    assert re.search(r"\rcalibrate:   0%.* 0/4 ", shown)
    assert re.search(r"\rcalibrate: 100%.* 4/4 \[00:00<00:00, .*layer/s\]", shown)


STEPS = {
    "calibrate": [
        "check tiny-llama-MoE: file 1 of 1",
        "check tiny-llama: tensor 30 of 30",
        "calibrate: layer 3 of 3",
        "measure the divergence: block 1 of",
        "fit all layers: step 2 of",
        "set thresholds: layer 3 of 3",
        "write the calibrated model: file 4 of 4",
    ],
    "evaluate": ["Loading weights: tensor", "evaluate tiny-llama: batch 1 of"],
}


@pytest.mark.parametrize("stage", STEPS)
def test_a_stage_tells_a_file_line_by_line(stage, plain_run, tmp_path):
    """A real run, whose minutes are no time at all: what it does, and what the libraries do for it."""
    options = ["--model_path", plain_run.model, "--block_size", 32, "--max_tokens", 512]
    if stage == "calibrate":
        options += ["--moe_path", plain_run.moe, "--save_path", tmp_path / "moe", "--train_data_path", plain_run.text]
        options += ["--fit_logits"]
    else:
        options[2:2] = [plain_run.moe]
        options += ["--text_path", plain_run.text / "c4.jsonl"]
    script = pipeline.SCRIPTS[stage].__name__
    code = f"import sys, {script} as script; from run_moefication.moefication import progress; progress.MINUTE = 1e-9\n"
    command = [sys.executable, "-c", f"{code}sys.exit(script.main())", *map(str, options)]
    with (tmp_path / "log").open("wb") as log:
        subprocess.run(command, stdout=subprocess.PIPE, stderr=log, check=True)
    told = (tmp_path / "log").read_bytes()
    assert b"\r" not in told
    assert [step for step in STEPS[stage] if step not in told.decode()] == []
