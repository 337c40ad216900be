"""Decoder layers up to their MLP, run one at a time over batches of blocks.

Axes: B blocks of a batch, N positions, T tokens of the batch, H hidden size.
"""

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm, LlamaRotaryEmbedding

from ..checkpoints.dense import DenseCheckpoint
from ..precision import linear, product_dtype
from ..text.batches import Batch


def rounded_attention(
    module: LlamaAttention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    """PyTorch's causal attention, its factors rounded as those of other products are: `[B, heads, N, width]` each."""
    factors = [factor.to(product_dtype(query.device)) for factor in (query, key, value)]
    is_grouped = query.shape[1] != key.shape[1]
    if is_grouped and query.device.type == "cuda":
        # In float32 a GPU has no kernel for grouped queries that does without the weights of all pairs of positions.
        factors[1:] = (factor.repeat_interleave(module.num_key_value_groups, dim=1) for factor in factors[1:])
        is_grouped = False
    output = F.scaled_dot_product_attention(*factors, is_causal=True, scale=options["scaling"], enable_gqa=is_grouped)
    return output.transpose(1, 2).to(query.dtype), None


AttentionInterface.register(rounded_attention.__name__, rounded_attention)


class PreMLP:
    """What a decoder layer does before its MLP: attention, the residual sum, and the norm; float32."""

    def __init__(self, config: LlamaConfig, tensor: Callable[[str], torch.Tensor], device: str):
        """`tensor(name)`: the layer's tensors by their names within it, such as `self_attn.q_proj.weight`."""
        config = copy(config)
        config._attn_implementation = rounded_attention.__name__
        with torch.device("meta"):
            self._attention = LlamaAttention(config, layer_idx=0)
            self._norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.mlp_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        names = ("self_attn", "input_layernorm", "post_attention_layernorm")
        for name, module in zip(names, (self._attention, self._norm, self.mlp_norm), strict=True):
            state = {key: tensor(f"{name}.{key}").to(device).to(torch.float32) for key in module.state_dict()}
            module.load_state_dict(state, assign=True)
            module.eval()
        for projection in self._attention.children():
            projection.requires_grad_(False).to(product_dtype(device))
            projection.forward = partial(linear, weight=projection.weight, bias=projection.bias)
        self._rotary = LlamaRotaryEmbedding(config).to(device)

    @classmethod
    def of_dense(cls, checkpoint: DenseCheckpoint, layer: int, device: str) -> "PreMLP":
        """That of a layer of the dense model."""
        return cls(checkpoint.config, lambda name: checkpoint.finite_tensor(f"layers.{layer}.{name}"), device)

    def __call__(self, stream: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The stream before the layer `[T, H]` -> the stream before the MLP, and what the MLP sees, `[T, H]` each."""
        padded = batch.padded(stream)
        positions = torch.arange(padded.shape[1], device=padded.device)[None]
        rotary = self._rotary(padded, positions)
        attended = self._attention(self._norm(padded), position_embeddings=rotary, attention_mask=None)[0]
        stream = batch.flat(padded + attended)
        return stream, self.mlp_norm(stream)


def embed(stream: torch.Tensor, blocks: list[torch.Tensor], batches: list[Batch], weight: torch.Tensor) -> None:
    """Fill a stream `[tokens, H]` with the embeddings of the blocks' tokens."""
    start = 0
    for batch in batches:
        tokens = torch.cat(blocks[start : (start := start + len(batch.lengths))]).long()
        stream[batch.rows] = weight[tokens].float()
