"""How many experts each layer may run: layers that the loss depends on more get more of the budget.

A layer's sensitivity c is what the loss of the dense model rises by when this layer alone runs on its share of experts.
With a rise of c * exp(-DECAY * b) for an active fraction b around it, the sum over layers is least for a given mean
fraction where b = ln(c) / DECAY plus the same amount for all, within the bounds of each.
"""

import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llama_moe import LlamaMoEConfig
from llama_moe.configuration_llama_moe import shift_to_mean

from ..checkpoints.dense import DenseCheckpoint
from ..checkpoints.moe import MoECheckpoint
from ..fitting.losses import next_token_nll
from ..layers.decoder import DenseLayer, embed
from ..layers.mlp import PackedMLP
from ..progress import Progress
from ..text.batches import batches_of

DECAY = 4.0  # measured on SmolLM2-135M between 25 and 75 % active, with a static mask
TOKENS = 4096  # of text that sensitivities are measured on: a forward pass over it for every pair of layers
LEAST_RISE = 1e-4  # nats; less is noise, or a layer that the text does not need


@torch.no_grad()
def measure_sensitivity(
    checkpoint: DenseCheckpoint,
    moe: MoECheckpoint,
    config: LlamaMoEConfig,
    blocks: list[torch.Tensor],
    share: float,
    device: str,
    progress: Progress,
) -> list[float]:
    """The rise of the dense model's loss, in nats, by each layer that runs a `share` of its routed experts.

    All variants of the model are walked through the layers at once. Memory: a layer of each model, and for each layer
    before it three times the text in its residual stream, 4 * hidden_size bytes a token each.

    Args:
        config: of the model to be; blocks: the text, TOKENS at most are read.
    """
    blocks = [block for block, end in zip(blocks, _ends(blocks), strict=True) if end <= TOKENS] or [blocks[0][:TOKENS]]
    (batch,) = batches_of(blocks, len(blocks))
    embedded = torch.empty(sum(map(len, blocks)), config.hidden_size)
    embed(embedded, blocks, [batch], checkpoint.finite_tensor("embed_tokens.weight"))
    streams = [embedded.to(device)]  # of the dense model, then of the one with layer 0 cut, layer 1, ...
    for layer in progress(range(config.num_hidden_layers), "measure", "layer"):
        dense = DenseLayer(checkpoint, layer, device)
        mlp = PackedMLP.of(moe, config, layer, device)
        if mlp.gate.routing == "threshold":
            mlp.gate.set_active_share(share)
        attended = [dense.attention_half(stream, batch) for stream in streams]
        stream, inputs = attended[0]
        hidden = mlp.mask_(mlp.activations(inputs), mlp.gate.selected(mlp.gate.score(inputs)))
        streams = [s + dense.output(dense.activations(x)) for s, x in attended] + [stream + mlp.output(hidden)]
    losses = _losses(checkpoint, streams, blocks, device)
    return [loss - losses[0] for loss in losses[1:]]


def allocate(sensitivities: list[float], fraction: float, least: float, most: float = 1.0) -> list[float]:
    """Active fractions of the layers, from `least` to `most`, whose mean is `fraction`."""
    logarithms = torch.tensor(sensitivities, dtype=torch.float64).clamp(min=LEAST_RISE).log() / DECAY
    return shift_to_mean(logarithms.tolist(), fraction, least, most)


def _ends(blocks: list[torch.Tensor]) -> list[int]:
    return torch.tensor([len(block) for block in blocks]).cumsum(0).tolist()


def _losses(
    checkpoint: DenseCheckpoint, streams: list[torch.Tensor], blocks: list[torch.Tensor], device: str
) -> list[float]:
    """Mean negative log-likelihood of the blocks, each from its second token on, for the last streams of models."""
    config = checkpoint.config
    norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps).to(device)
    norm.weight.copy_(checkpoint.finite_tensor("norm.weight"))
    head = checkpoint.finite_tensor(checkpoint.lm_head).to(device, torch.float32)
    lengths = [len(block) for block in blocks]
    losses = []
    for stream in streams:
        total, predicted = 0.0, 0
        for rows, block in zip(norm(stream).split(lengths), blocks, strict=True):
            total += next_token_nll(rows, block.long().to(device), head)
            predicted += len(block) - 1
        losses.append(total / max(predicted, 1))
    return losses
