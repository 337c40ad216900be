"""The stages' own speed: balanced k-means, the recording of features, and where the time of all stages goes.

OMP_NUM_THREADS=1 python scripts/bench_stages.py --parts kmeans    # 3 minutes; pip install k-means-constrained==0.9.1
python scripts/bench_stages.py --parts features profile --model_path .cache/SmolLM2-135M-Instruct \\
  --train_data_path .cache/llama_data

kmeans: against k-means-constrained from the same first centres, one round a seed, on made-up rows of length 1 whose
principal variances fall as gate_proj's of SmolLM2 do, with the inverse root of their rank. `products` is the share of
our time that the products of rows and centres would take alone; what reading rows for their means takes is not in it.
features: stage 2 as a whole, loading and writing too, against the bare forward pass of the loaded model on the same
batches. profile: stages 1 to 5 once, in the default recipe, and the share that each function of ours had of them.
"""

import argparse
import cProfile
import pstats
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import timing
import torch
from torch.nn import functional as F

from run_moefication import command_line, moefication
from run_moefication.moefication.checkpoints.dense import DenseCheckpoint
from run_moefication.moefication.errors import MoEficationError
from run_moefication.moefication.fitting.balanced_kmeans import balanced_kmeans, seed_rows
from run_moefication.moefication.precision import bfloat16_products
from run_moefication.moefication.processes import pick_device
from run_moefication.moefication.stages.features import extract_features
from run_moefication.moefication.stages.moefy import moefy, read_text
from run_moefication.moefication.text.batches import batches_of
from run_moefication.moefication.text.corpus import Corpus
from run_moefication.settings import CALIBRATED, FeatureSettings

CPU = torch.device("cpu")
LEAST_SHARE = 0.02  # functions with less of the time are left out


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = command_line.new_parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    shape = {"default": [11008, 4096], "help": "rows and columns to cluster"}
    parser.add_argument("--shape", nargs=2, type=timing.positive, **shape)
    parser.add_argument("--clusters", nargs="+", type=timing.positive, default=[8, 64], help="numbers of clusters")
    parser.add_argument("--model_path", **command_line.MODEL | {"required": False})
    parser.add_argument("--train_data_path", type=command_line.path, help="folder of text: features and profile")
    parser.add_argument("--tokens", type=timing.positive, default=4096, help="of text: features and profile")
    parser.add_argument("--block_size", type=timing.positive, default=512, help="tokens per block of text")
    parser.add_argument("--num_experts", type=timing.positive, help="experts per layer: profile")
    parser.add_argument("--rounds", type=timing.positive, default=3, help="rounds, of which the median counts")
    parser.add_argument("--device", default="cpu", help="torch device: features and profile")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    return command_line.run(parser, bench, argv)


def bench(arguments: argparse.Namespace) -> None:
    """Measure all that was asked for, printing as it goes."""
    if {"features", "profile"} & {*arguments.parts} and not (arguments.model_path and arguments.train_data_path):
        raise MoEficationError("--parts features and profile need --model_path and --train_data_path")
    if "kmeans" in arguments.parts:
        rival()
    device = torch.device(pick_device(arguments.device))
    print(timing.machine(device))
    rows = [{"part": part} | row for part in arguments.parts for row in PARTS[part](arguments)]
    timing.write_json(arguments.json, device, rows)


def rival() -> Callable[..., Any]:
    """The class of k-means-constrained."""
    try:
        from k_means_constrained import KMeansConstrained
    except ImportError:
        cure = "pip install k-means-constrained==0.9.1"
        raise MoEficationError(f"--parts kmeans needs the package k-means-constrained: {cure}") from None
    return KMeansConstrained


def kmeans(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of clusters: medians over the rounds, and the rival's over ours."""
    generator, (num_rows, num_columns) = torch.Generator().manual_seed(0), arguments.shape
    deviations = torch.arange(1.0, num_columns + 1) ** -0.25
    rows = F.normalize(torch.randn(num_rows, num_columns, generator=generator) * deviations)
    print(f"\nbalanced k-means, {num_rows} x {num_columns}")
    result = []
    for num_clusters in arguments.clusters:
        rounds = [cluster(rows, num_clusters, seed) for seed in range(arguments.rounds)]
        medians = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
        result.append({"clusters": num_clusters} | medians)
        if len(result) == 1:
            print(timing.table_line([*result[0]]))
        print(timing.table_line([*result[0]], result[-1]), flush=True)
    return result


def cluster(rows: torch.Tensor, num_clusters: int, seed: int) -> dict[str, float]:
    """Both clusterings from the same first centres."""
    size = len(rows) // num_clusters
    start = time.perf_counter()
    ours = balanced_kmeans(rows, num_clusters, seed=seed)
    seconds = time.perf_counter() - start
    centres = rows[seed_rows(rows, rows.square().sum(1, dtype=torch.float64), num_clusters, seed)]
    sizes = dict(size_min=size, size_max=size)
    start = time.perf_counter()
    theirs = rival()(num_clusters, **sizes, init=centres.numpy(), n_init=1).fit(rows.numpy())
    their_seconds = time.perf_counter() - start
    product = timing.median_seconds({"": lambda: rows @ centres.T}, rounds=3, device=CPU)[""]
    each, their_each = seconds / ours.iterations, their_seconds / theirs.n_iter_
    return {
        "seconds": seconds,
        "iterations": ours.iterations,
        "per_iteration": each,
        "products": product / each,
        "rival_seconds": their_seconds,
        "rival_iterations": theirs.n_iter_,
        "faster": their_seconds / seconds,
        "faster_per_iteration": their_each / each,
        "inertia_ratio": inertia(rows, ours.labels) / inertia(rows, torch.from_numpy(theirs.labels_)),
    }


def inertia(rows: torch.Tensor, labels: torch.Tensor) -> float:
    """The sum of squared distances of rows to the means of their clusters."""
    parts = [rows[labels == label].double() for label in labels.unique()]
    return sum((part - part.mean(dim=0)).square().sum().item() for part in parts)


def features(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each format: tokens per second, and over those of the bare forward pass."""
    checkpoint, corpus = DenseCheckpoint(arguments.model_path), text(arguments)
    device = torch.device(pick_device(arguments.device))
    dtype = torch.float32 if device.type == "cpu" else checkpoint.dtype  # as stage 2 does
    model = checkpoint.load_model(arguments.device, dtype)
    settings = {name: FeatureSettings(feature_format=name) for name in ("inputs", "full")}
    tokens = torch.cat(corpus.blocks).long()  # the text is read here, before anything is timed

    @bfloat16_products()
    @torch.inference_mode()
    def forward() -> None:
        for batch in batches_of(corpus.blocks, settings["inputs"].batch_size):
            model(input_ids=batch.padded(tokens[batch.rows]).to(device), use_cache=False)

    def record(name: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            extract_features(checkpoint, corpus, folder, settings[name], device=arguments.device)

    ways = {"forward": forward, "inputs": lambda: record("inputs"), "full": lambda: record("full")}
    seconds = timing.median_seconds(ways, rounds=arguments.rounds, device=device)
    print(f"\nrecording features of {checkpoint.name}, {corpus.num_tokens:,} tokens")
    rows = [
        {"way": way, "tokens_per_second": corpus.num_tokens / value, "of_forward": seconds["forward"] / value}
        for way, value in seconds.items()
    ]
    print("\n".join([timing.table_line([*rows[0]]), *(timing.table_line([*row], row) for row in rows)]), flush=True)
    return rows


def profile(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each function of the toolkit that had a good share of the stages' time, calls from it counted."""
    checkpoint, tokens = DenseCheckpoint(arguments.model_path), arguments.tokens
    recipe = replace(CALIBRATED, split_tokens=tokens, feature_tokens=tokens, calibration_tokens=tokens)
    package = Path(moefication.__file__).parent
    with tempfile.TemporaryDirectory() as folder, cProfile.Profile() as profiler:
        how = dict(num_experts=arguments.num_experts, block_size=arguments.block_size, device=arguments.device)
        moefy(checkpoint, arguments.train_data_path, Path(folder, "moe"), recipe, **how)
    spent = [
        (seconds, f"{Path(file).relative_to(package)}: {name}")
        for (file, _, name), (_, _, _, seconds, _) in pstats.Stats(profiler).stats.items()
        if Path(file).is_relative_to(package)
    ]
    total = max(spent)[0]
    rows = [
        {"function": function, "seconds": seconds, "share": seconds / total}
        for seconds, function in sorted(spent, reverse=True)
        if seconds >= LEAST_SHARE * total
    ]
    print(f"\nstages 1 to 5 of {checkpoint.name}, {tokens:,} tokens for each")
    print("\n".join(f"{row['seconds']:9.2f} s {row['share']:6.1%}  {row['function']}" for row in rows))
    return rows


def text(arguments: argparse.Namespace) -> Corpus:
    """The blocks of text to measure on."""
    checkpoint, sizes = DenseCheckpoint(arguments.model_path), dict(block_size=arguments.block_size)
    return read_text(checkpoint, arguments.train_data_path, max_tokens=arguments.tokens, **sizes)


PARTS = {"kmeans": kmeans, "features": features, "profile": profile}


if __name__ == "__main__":
    sys.exit(main())
