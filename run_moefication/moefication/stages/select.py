"""Stage 3: gates that predict which experts a token needs, trained layer by layer on recorded features."""

import logging
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from llama_moe.gates import Gate

from ...settings import OFF, GateSettings, require_rank, require_selects
from ..artifacts.features import Features
from ..artifacts.gates import new_gate
from ..artifacts.split import Split
from ..checkpoints.dense import TEMPLATES, DenseCheckpoint
from ..errors import MoEficationError, SettingError
from ..fitting.ridge_gates import fit_ridge_gate
from ..layers.mlp import GatedMLP
from ..layers.scores import TOKENS_PER_CHUNK, ExpertScorer, OutputNorms, routing_quality, top_k_mask
from ..names import select_folder
from ..precision import bfloat16_products
from ..progress import progress
from ..storage.artifact import history_of
from ..storage.folder import ArtifactWriter
from ..storage.manifest import ArtifactSpec, environment

logger = logging.getLogger(__name__)


def parse_layers(texts: list[str], num_layers: int) -> list[int]:
    """`["0-7", "9"]` -> the layers, sorted, ends included; nothing means all.

    An end equal to the number of layers is clipped with a warning (`24-32` of 32 layers); beyond that is refused.
    """
    if not texts:
        return list(range(num_layers))
    layers: set[int] = set()
    for text in (part for item in texts for part in item.replace(",", " ").split()):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise SettingError(f"specify_layer {text!r} is neither a layer nor a range such as 0-7")
        if match[2] and last == num_layers and first < num_layers:
            last -= 1
            logger.warning("--specify_layer %s: the last of %d layers is %d, taken as the end", text, num_layers, last)
        if last >= num_layers:
            raise SettingError(f"specify_layer {text} goes beyond the model's layers 0-{num_layers - 1}")
        layers.update(range(first, last + 1))
    return sorted(layers)


def train_gates(
    checkpoint: DenseCheckpoint,
    split_path: str | Path,
    features_path: str | Path,
    save_path: str | Path,
    settings: GateSettings,
    *,
    layers: list[int],
    device: str = "cpu",
    overwrite: bool = False,
) -> ArtifactWriter:
    """Train and write the gates of the given layers; runs over different layers fill one folder.

    Memory: the inputs of one layer in the dtype they are stored in (all tokens times hidden size), the scores
    (tokens times experts, float32) and one layer's weights.
    """
    split = Split(split_path, checkpoint, settings.templates, settings.num_experts)
    require_selects(settings.num_selects, settings.num_experts, split.num_shared_experts)
    require_rank(settings.gate_rank, checkpoint.config.hidden_size, split.num_routed_experts)
    num_selects = settings.num_selects - split.num_shared_experts
    routed = replace(settings, num_experts=split.num_routed_experts, num_selects=num_selects)  # what concerns a gate
    features = Features(features_path, checkpoint, settings.templates)
    if features.num_tokens < 2:
        raise MoEficationError(f"{features_path} holds {features.num_tokens} tokens; at least 2 are needed")
    num_layers = checkpoint.config.num_hidden_layers
    names = [settings.templates.format(layer) for layer in range(num_layers)]
    spec = ArtifactSpec(
        stage="select",
        options=settings.recorded(),
        source=checkpoint.source,
        environment=environment(device),
        inputs={"split_file_path": split.artifact.digest, "hidden_features_path": features.artifact.digest},
        earlier=history_of(split.artifact, features.artifact),
    )
    folder = select_folder(save_path, checkpoint.name, settings.num_experts)
    is_shared = len(layers) < num_layers  # other runs may be filling other layers
    writer = ArtifactWriter(folder, spec, names, overwrite=overwrite, shared=is_shared)
    missing = set(writer.missing())
    for layer in progress([layer for layer in layers if names[layer] in missing], "select", "layer"):
        inputs, scores = _layer_data(checkpoint, split, features, layer, settings, device)
        if settings.gate_fit == "ridge":
            of_ridge = dict(rank=routed.gate_rank, has_bias=routed.gate_bias != OFF)
            gate = new_gate("linear", inputs.shape[1], routed.num_experts, **of_ridge)
        else:
            rows = checkpoint.finite_tensor(names[layer]).to(device, torch.float32)
            gate = initial_gate(settings.gate_network, rows, split.routed_neurons(layer))
        metrics = fit_gate(gate.to(device), inputs, scores, routed)
        gate.store_score_quantiles(_logits(gate, inputs))
        state = {name: tensor.cpu().clone() for name, tensor in gate.state_dict().items()}
        writer.write_part(names[layer], {names[layer]: writer.write_tensors(names[layer], state)}, metrics)
        del inputs, scores  # before those of the next layer are made
    writer.finish()
    return writer


@bfloat16_products()
def _layer_data(
    checkpoint: DenseCheckpoint, split: Split, features: Features, layer: int, settings: GateSettings, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs `[tokens, hidden]` in their stored dtype and scores `[tokens, experts]` in float32, both on the device."""
    inputs = torch.cat([shard.to(device) for shard in features.inputs(layer)])
    neurons, is_norm = split.routed_neurons(layer).to(device), settings.select_criterion == "output_norm"
    if features.has_gate_outputs and not is_norm:
        recorded = (chunk for shard in features.gate_outputs(layer) for chunk in shard.split(TOKENS_PER_CHUNK))
        activations = (chunk.to(device) for chunk in recorded)
    else:
        mlp = GatedMLP.of_dense(checkpoint, layer, device)
        of_gate = settings.templates == TEMPLATES[0] and not is_norm
        activations = map(mlp.gate_activations if of_gate else mlp.activations, inputs.split(TOKENS_PER_CHUNK))
    score = OutputNorms(mlp.down, neurons) if is_norm else ExpertScorer(neurons, settings.select_criterion)
    scores = torch.cat([score(chunk) for chunk in activations])
    if not scores.sum(dtype=torch.float64).isfinite():
        folder = features.artifact.folder
        raise MoEficationError(f"the features of layer {layer} in {folder} hold NaN or infinite values")
    return inputs, scores


def initial_gate(gate_network: str, rows: torch.Tensor, neurons: torch.Tensor) -> Gate:
    """A gate whose (first) layer is the mean normalised row of each expert; the second of an "mlp" is the identity.
    `rows`: the template's weight, `[intermediate_size, hidden]`; `neurons`: int64 `[experts, width]`."""
    centres = F.normalize(rows)[neurons.to(rows.device)].mean(dim=1)  # [experts, hidden]
    num_experts, hidden_size = centres.shape
    gate = new_gate(gate_network, hidden_size, num_experts)
    with torch.no_grad():
        for weight, values in zip(gate.parameters(), (centres, torch.eye(num_experts)), strict=False):
            weight.copy_(values)
    return gate


def fit_gate(gate: Gate, inputs: torch.Tensor, scores: torch.Tensor, settings: GateSettings) -> dict[str, Any]:
    """Fit a gate in place: in closed form (`ridge_gates`), or by training (`adam`), which leaves it at its best epoch
    by held-out mass recall, the untrained gate included.

    The loss of training is the KL divergence to the normalised scores with `use_softmax`, the binary cross-entropy to
    the true top-k set without. The last `valid_percent` of the tokens, of other documents, are never trained on.

    Returns: metrics on held-out tokens, of the gate and of the best constant choice.
    """
    num_valid = min(max(1, round(len(inputs) * settings.valid_percent)), len(inputs) - 1)
    train, valid = slice(0, -num_valid), slice(-num_valid, None)
    k = settings.num_selects
    best_constant = top_k_mask(scores[train].mean(dim=0, keepdim=True), k)
    constant = routing_quality(best_constant.expand(num_valid, -1), scores[valid], k)
    if settings.gate_fit == "ridge":
        of_fit = fit_ridge_gate(gate, inputs, scores, num_valid)
    else:
        of_fit = _train(gate, inputs, scores, train, valid, settings)
    selected = top_k_mask(_logits(gate, inputs[valid]), k)
    return {
        **routing_quality(selected, scores[valid], k),
        "constant_recall": constant["recall"],
        "constant_mass_recall": constant["mass_recall"],
        "train_tokens": len(inputs) - num_valid,
        "valid_tokens": num_valid,
        **of_fit,
        "expert_load": selected.mean(dim=0, dtype=torch.float64).tolist(),
    }


def _train(
    gate: Gate, inputs: torch.Tensor, scores: torch.Tensor, train: slice, valid: slice, settings: GateSettings
) -> dict[str, Any]:
    """Train, and go back to the best epoch. Returns which it was, and the losses of all."""
    k = settings.num_selects
    losses: dict[str, list[float]] = {"train": [], "valid": []}
    best, best_epoch, best_state = -1.0, 0, {}
    for epoch, train_losses in enumerate(chain([[]], _epochs(gate, inputs[train], scores[train], settings))):
        logits = _logits(gate, inputs[valid])
        recall = routing_quality(top_k_mask(logits, k), scores[valid], k)["mass_recall"]
        losses["train"] += train_losses
        losses["valid"].append(_loss(logits, scores[valid], settings).item())
        if recall > best:
            best, best_epoch, best_state = recall, epoch, deepcopy(gate.state_dict())
        elif epoch - best_epoch >= settings.patience:
            break
    gate.load_state_dict(best_state)
    return {"best_epoch": best_epoch, "loss": losses}


def _epochs(gate: Gate, inputs: torch.Tensor, scores: torch.Tensor, settings: GateSettings) -> Iterator[list[float]]:
    """Train epoch by epoch (AdamW, one-cycle learning rate), yielding the mean training loss of each, in a list."""
    epochs = settings.epochs or 0  # similarity gates have none
    if not epochs:
        return
    generator = torch.Generator().manual_seed(settings.seed)
    batches_per_epoch = -(-len(inputs) // settings.batch_size)
    optimizer = torch.optim.AdamW(gate.parameters(), lr=settings.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, total_steps=epochs * batches_per_epoch)
    for _ in range(epochs):
        total = 0.0
        for batch in torch.randperm(len(inputs), generator=generator).to(inputs.device).split(settings.batch_size):
            with _one_cpu_thread():
                loss = _loss(gate.score(inputs[batch].float()), scores[batch], settings)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
            total += loss.item() * len(batch)
        if not math.isfinite(total):
            raise SettingError(f"the loss of a gate did not stay finite; use a smaller lr than {settings.lr}")
        yield [total / len(inputs)]


@contextmanager
def _one_cpu_thread() -> Iterator[None]:
    """A training step is a few small products: threads gain little there, and on busy cores wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _loss(logits: torch.Tensor, scores: torch.Tensor, settings: GateSettings) -> torch.Tensor:
    if settings.use_softmax:
        target = scores / scores.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
        return F.kl_div(F.log_softmax(logits, dim=-1), target, reduction="batchmean")
    return F.binary_cross_entropy_with_logits(logits, top_k_mask(scores, settings.num_selects))


@torch.no_grad()
def _logits(gate: Gate, inputs: torch.Tensor) -> torch.Tensor:
    return torch.cat([gate.score(chunk.float()) for chunk in inputs.split(TOKENS_PER_CHUNK)])
