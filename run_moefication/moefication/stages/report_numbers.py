"""What a report knows, as JSON holds it: made of manifests, of recorded routing and of splits. Page and figures show
these numbers and no others.

Axes: T tokens, L layers, E routed experts, N experts with shared ones, I neurons.
"""

import math
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llama_moe import LlamaMoEConfig

from ..artifacts.split import Split
from ..errors import MoEficationError
from ..storage.manifest import VERSIONED_PACKAGES
from .report_measure import Routing, Row

BINS = 50  # of the histogram of tokens by cost, from 0 to all neurons
DECIMALS = 4  # of what there are thousands of
# Metrics of a layer in the manifests.
CALIBRATED = ("error_before", "error_after", "active_share")
SELECTED = ("recall", "mass_recall", "constant_recall", "constant_mass_recall")

Stage = Mapping[str, Any]  # what manifests tell of a stage, see `Artifact.history`
Numbers = dict[str, Any]


def rounded(values: torch.Tensor | np.ndarray) -> list:
    """Nested lists of numbers of `DECIMALS` decimals."""
    return np.round(np.asarray(values, dtype=np.float64), DECIMALS).tolist()


def model_numbers(dense_name: str, moe_name: str, config: LlamaMoEConfig, num_selects: int) -> Numbers:
    """What was converted."""
    return {
        "dense": dense_name,
        "moe": moe_name,
        "layers": config.num_hidden_layers,
        "neurons": config.intermediate_size,
        "expert_neurons": config.moe_intermediate_size,
        "num_experts": config.num_experts + config.num_shared_experts,
        "num_shared_experts": config.num_shared_experts,
        "num_selects": num_selects,
        "routing": config.routing,
        "gate_network": config.gate_network,
    }


def machine(device: str) -> Numbers:
    """Where the report was measured, and with what."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    device_name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "CPU"
    return {
        "device": device_name,
        "cpu": cpu or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"Python": platform.python_version()} | {name: version(name) for name in VERSIONED_PACKAGES},
    }


def text_numbers(name: str, rows: Sequence[Row], own: int) -> Numbers:
    """The rows of a text by their budgets, the dense model's perplexity (None: it was not given) apart from them."""
    if not all(math.isfinite(row["perplexity"]) for row in rows):
        raise MoEficationError(f"a perplexity on {name} is not finite: look at the model's weights")
    dense = rows[0] if rows[0]["num_experts"] is None else None
    kept = ("num_selects", "active", "perplexity")
    made = [
        {key: row[key] for key in kept}
        | {"ratio": row["perplexity"] / dense["perplexity"] if dense else None}
        | {"agreement": row["agreement"] if dense else None}
        for row in sorted(rows[1:] if dense else rows, key=lambda row: row["active"])
    ]
    return {
        "name": name,
        "tokens": rows[0]["predicted_tokens"],
        "dense_perplexity": dense and dense["perplexity"],
        "rows": made,
        "own": [row["num_selects"] for row in made].index(own),
    }


# ---------------------------------------------------------------------------------------------------- from manifests


def told_numbers(history: Sequence[Stage], num_layers: int, left_out: dict[str, str]) -> Numbers:
    """The stages and their metrics by layer; `left_out` learns why something is missing."""
    errors = metrics_by_layer(history, "calibrate", CALIBRATED, num_layers)
    gates = metrics_by_layer(history, "select", SELECTED, num_layers)
    was_calibrated = "calibrate" in [stage["stage"] for stage in history]
    untold = "the manifest, which an earlier version wrote, does not tell of it"
    if not history:
        untold = "the checkpoint has no manifest"
    if not errors:
        left_out["errors"] = untold if was_calibrated or not history else "the checkpoint was not calibrated"
    if not gates:
        left_out["gates"] = untold
    if not history:
        left_out["stages"] = untold
    return {"errors": errors, "gates": gates, "stages": stage_numbers(history)}


def stage_numbers(history: Sequence[Stage]) -> list[Numbers]:
    """The stages that made the checkpoint, in order: minutes (of all processes together), tokens read, settings."""

    def table(stage: Stage, name: str) -> dict[str, Any]:
        return stage[name] if isinstance(stage.get(name), dict) else {}

    def number(value: Any) -> float | None:
        return value if isinstance(value, (int, float)) and math.isfinite(value) else None

    rows = []
    for stage in history:
        seconds = number(stage.get("seconds"))
        row = {"stage": stage["stage"], "minutes": None if seconds is None else seconds / 60}
        row |= {"tokens": number(table(stage, "facts").get("tokens"))}
        rows.append(row | {name: table(stage, name) for name in ("options", "environment")})
    return rows


def metrics_by_layer(history: Sequence[Stage], stage: str, names: Sequence[str], num_layers: int) -> list[Numbers]:
    """Those metrics of the last stage of this kind that have all of these names, a layer each, in order; none where the
    manifests do not tell of it, or of every layer."""
    told = next((one.get("metrics") for one in reversed(history) if one["stage"] == stage), None)
    if not isinstance(told, dict):
        return []
    # Parts are named after files or tensors whose number is the layer's: layers.9 comes before layers.10.
    parts = sorted(
        told, key=lambda part: [int(word) if word.isdecimal() else -1 for word in part.replace("-", ".").split(".")]
    )
    found = [told[part] for part in parts if isinstance(told[part], dict) and {*names} <= told[part].keys()]
    layers = [{name: layer[name] for name in names} for layer in found]
    is_whole = len(layers) == num_layers and all(isinstance(v, (int, float)) for row in layers for v in row.values())
    return layers if is_whole else []


# ---------------------------------------------------------------------------------------------------- from routing


def most_telling_layer(routings: Sequence[Routing]) -> int:
    """The layer whose experts' loads differ most between the texts; the middle one of a single text."""
    if len(routings) == 1:
        return len(routings[0].together) // 2
    loads = torch.stack([routing.load for routing in routings])  # [texts, L, E]
    return int(loads.std(dim=0, correction=0).mean(dim=1).argmax())


def routing_numbers(routings: Sequence[Routing], config: LlamaMoEConfig, layer: int | None) -> Numbers:
    """What the experts do, on all texts together and on each; `layer`: whose experts are shown one by one."""
    layer = most_telling_layer(routings) if layer is None else layer
    together, counts = sum(routing.together for routing in routings), torch.cat([r.counts for r in routings])
    load = together.diagonal(dim1=1, dim2=2).double() / len(counts)
    correlation, order = correlated(together[layer], len(counts))
    costs = [neurons_per_token(routing.counts, config) for routing in routings]
    return {
        "tokens": len(counts),
        "ran_by_layer": neurons_per_token(counts, config, by_layer=True).mean(0).tolist(),
        "load": rounded(load),
        "never": int((load == 0).sum()),
        "layer": layer,
        "load_by_text": [rounded(routing.load[layer]) for routing in routings],
        "correlation": rounded(correlation),
        "order": order,
        "neurons_by_text": [cost.mean().item() for cost in costs],
        "least_neurons": torch.cat(costs).min().item(),
        "most_neurons": torch.cat(costs).max().item(),
        "tokens_by_cost": tokens_by_cost(counts, config),
    }


def neurons_per_token(counts: torch.Tensor, config: LlamaMoEConfig, by_layer: bool = False) -> torch.Tensor:
    """Share of the neurons that ran for each token, shared experts included: routed experts that ran, `[T, L]`, to
    float64 `[T]`, or `[T, L]`."""
    ran = counts.double() if by_layer else counts.double().mean(1)
    return (config.num_shared_experts + ran) / (config.num_shared_experts + config.num_experts)


def tokens_by_cost(counts: torch.Tensor, config: LlamaMoEConfig) -> list[int]:
    """Tokens by the share of the neurons that ran for them, in `BINS` equal parts of 0 to 1; in whole numbers."""
    num_layers = counts.shape[1]
    ran = num_layers * config.num_shared_experts + counts.sum(1)
    all_experts = num_layers * (config.num_shared_experts + config.num_experts)
    return (BINS * ran // all_experts).clamp(max=BINS - 1).bincount(minlength=BINS).tolist()


def correlated(together: torch.Tensor, num_tokens: int) -> tuple[np.ndarray, list[int]]:
    """The correlation of "this expert ran" and "that one ran" over tokens, `[E, E]`, given the tokens that both ran for
    (0 where one runs always or never; 1 on the diagonal), and an order of the experts in which those that run together
    are neighbours: that of the leading eigenvector."""
    joint = together.double().numpy() / num_tokens
    share = joint.diagonal()
    deviation = np.sqrt(share * (1 - share))
    product = deviation[:, None] * deviation
    covariance = joint - share[:, None] * share
    correlation = np.divide(covariance, product, out=np.zeros_like(joint), where=product > 0)
    np.fill_diagonal(correlation, 1.0)
    leading = np.linalg.eigh(correlation)[1][:, -1]
    leading *= np.sign(leading[np.abs(leading).argmax()])
    return correlation, leading.argsort(kind="stable").tolist()


def passage(tokenizer: Any, tokens: list[int], costs: list[float]) -> list[list]:
    """Pieces of text and the share of the neurons that ran for each: one for a token, or for several that share a
    character (their mean)."""
    pieces, seen, first = [], "", 0
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:end], clean_up_tokenization_spaces=False)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(tokens):
            continue
        pieces.append([text[len(seen) :], round(float(np.mean(costs[first:end])), DECIMALS)])
        seen, first = text, end
    return pieces


# ---------------------------------------------------------------------------------------------------- from splits


def overlap_numbers(splits: Sequence[Split], num_layers: int) -> Numbers:
    """How far two splits agree: of the pairs of neurons that share an expert in the first, the share that does so in
    the second, by layer; and what a split at random would give."""
    first, second = splits
    shares = []
    for layer in range(num_layers):
        neurons = torch.zeros(first.num_experts, second.num_experts, dtype=torch.int64)  # that both experts have
        ones = torch.ones_like(first.labels(layer))
        neurons.index_put_((first.labels(layer), second.labels(layer)), ones, accumulate=True)
        of_first = neurons.sum(1)
        shares.append((neurons * (neurons - 1)).sum().item() / max(1, (of_first * (of_first - 1)).sum().item()))
    total, width = int(neurons.sum()), int(neurons.sum(0)[0])
    return {
        "splits": [split.artifact.folder.name for split in splits],
        "together": shares,
        "at_random": (width - 1) / (total - 1),
    }
