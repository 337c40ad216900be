"""Decoder layers of the dense model, run one at a time over batches of blocks.

Axes: B blocks of a batch, N positions, T tokens of the batch, H hidden size.
"""

from collections.abc import Callable
from copy import copy

import torch
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm, LlamaRotaryEmbedding

from ..checkpoints.dense import TEMPLATES, DenseCheckpoint
from ..text.batches import Batch
from .scores import LayerActivations


class AttentionHalf:
    """The first half of a decoder layer: attention, the residual sum, and the norm before the MLP; float32."""

    def __init__(self, config: LlamaConfig, tensor: Callable[[str], torch.Tensor], device: str):
        """`tensor(name)`: the layer's tensors by their names within it, such as `self_attn.q_proj.weight`."""
        config = copy(config)
        config._attn_implementation = "sdpa"
        with torch.device("meta"):
            self._attention = LlamaAttention(config, layer_idx=0)
            self._norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.mlp_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        names = ("self_attn", "input_layernorm", "post_attention_layernorm")
        for name, module in zip(names, (self._attention, self._norm, self.mlp_norm), strict=True):
            state = {key: tensor(f"{name}.{key}").to(device, torch.float32) for key in module.state_dict()}
            module.load_state_dict(state, assign=True)
            module.eval()
        self._rotary = LlamaRotaryEmbedding(config).to(device)

    def __call__(self, stream: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The stream before the layer `[T, H]` -> the stream before the MLP, and what the MLP sees, `[T, H]` each."""
        padded = batch.padded(stream)
        positions = torch.arange(padded.shape[1], device=padded.device)[None]
        rotary = self._rotary(padded, positions)
        attended = self._attention(self._norm(padded), position_embeddings=rotary, attention_mask=None)[0]
        stream = batch.flat(padded + attended)
        return stream, self.mlp_norm(stream)


class DenseLayer:
    """A decoder layer of the dense model, in float32: its attention half, and its MLP in two steps."""

    def __init__(self, checkpoint: DenseCheckpoint, layer: int, device: str):
        self.attention_half = AttentionHalf(
            checkpoint.config, lambda name: checkpoint.finite_tensor(f"layers.{layer}.{name}"), device
        )
        self.activations = LayerActivations(checkpoint, layer, TEMPLATES[1], device)  # what enters down_proj
        self._down = checkpoint.mlp_tensor(layer, "down_proj.weight", device)
        self._bias = checkpoint.mlp_tensor(layer, "down_proj.bias", device) if checkpoint.config.mlp_bias else None

    def output(self, activations: torch.Tensor) -> torch.Tensor:
        """The MLP's output `[T, H]` from its activations `[T, I]`."""
        return F.linear(activations, self._down, self._bias)


def embed(stream: torch.Tensor, blocks: list[torch.Tensor], batches: list[Batch], weight: torch.Tensor) -> None:
    """Fill a stream `[tokens, H]` with the embeddings of the blocks' tokens."""
    start = 0
    for batch in batches:
        tokens = torch.cat(blocks[start : (start := start + len(batch.lengths))]).long()
        stream[batch.rows] = weight[tokens].float()
