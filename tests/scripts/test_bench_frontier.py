"""The frontier: times that are measured once, and what beats the default at equal time."""

import json
import math
from pathlib import Path

import bench_frontier
import pytest
from bench_frontier import Point, at_equal_time, judged
from conftest import assert_refused


def point(experts: int, budget: float, perplexity: float, time: float) -> Point:
    return Point(experts, "threshold", budget, {"held-out": perplexity}, {"fp32, 1": time / 2, "fp32, 512": time * 2})


def test_between_its_points_a_configuration_is_interpolated_and_beyond_them_it_gains_nothing():
    line = [(0.2, 4.0), (0.6, 1.0)]
    assert at_equal_time(line, 0.4) == pytest.approx(2.0)  # the logarithm is linear in time
    assert (at_equal_time(line, 0.2), at_equal_time(line, 0.7)) == (4.0, 1.0)
    assert at_equal_time(line, 0.1) == math.inf


def test_the_best_configuration_at_equal_time_is_named_with_its_gain():
    points = [point(256, 0.5, 2.0, 0.5), point(256, 0.25, 3.0, 0.2), point(48, 0.5, 1.6, 0.5), point(96, 0.5, 1.9, 0.4)]
    lines = judged(points, 256, "fp32")
    assert lines == [
        "fp32, 50%, held-out: 43 x 256 is 25.0% better, beyond 3%",
        "fp32, 25%, held-out: nothing beats the default",  # the others take more time
    ]


def rows_file(folder: Path, *methods: str) -> Path:
    def line(method: str, budget: float, loss: float) -> str:
        text = {"losses": [loss], "active": budget, "neurons": budget}
        return json.dumps({"method": method, "budget": budget, "minutes": 1, "c4": text, "WikiText-2": text})

    lines = [line("dense", 1, 3.0)] + [line(method, budget, 4 - budget) for method in methods for budget in (0.25, 0.5)]
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_times_are_measured_once_for_each_row_and_the_table_has_both(tmp_path, capsys, monkeypatch):
    shape = dict(hidden_size=96, intermediate_size=11008)  # all numbers of neurons, little else
    monkeypatch.setitem(bench_frontier.SHAPES, "7B", shape)
    methods = ("calibrated, 256 experts", "calibrated, 48 experts, top_k")
    options = [str(rows_file(tmp_path, *methods)), "--times", str(tmp_path / "times.json"), "--dtypes", "fp32"]
    assert bench_frontier.main([*options, "--rounds", "1", "--plot", str(tmp_path / "plot.png")]) == 0
    times = json.loads((tmp_path / "times.json").read_text())
    cases = [
        f"{experts}, {budget}" for experts in ("256 experts, threshold", "43 experts, top_k") for budget in (0.25, 0.5)
    ]
    assert times.keys() == {"machine", *cases}
    assert all(times[case].keys() == {"fp32, 1", "fp32, 512"} and min(times[case].values()) > 0 for case in cases)
    first = capsys.readouterr().out
    shown = {line.split(" | ")[0].removeprefix("| ") for line in first.splitlines() if line.startswith("| ")}
    assert shown == {"experts", "256 x 43", "43 x 256, top_k"}
    assert "| 2.117 | 2.117 |" in first  # exp(4 - 0.25 - 3)
    monkeypatch.setattr(bench_frontier, "measured", None)  # nothing is left to measure
    assert bench_frontier.main(options) == 0
    assert capsys.readouterr().out == first


def test_rows_of_other_methods_alone_are_refused(tmp_path, run_script):
    options = [rows_file(tmp_path, "static mask"), "--times", tmp_path / "times.json"]
    refused = run_script(bench_frontier.main, *options)
    assert_refused(refused, "no row is of a number of experts and a routing that are compared here")
    assert not (tmp_path / "times.json").exists()
