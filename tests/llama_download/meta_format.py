"""Meta's release format, made from a transformers model, and a LLaMA that runs on it as Meta's own code does."""

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

HEADS = 16
SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 192,  # int(8 * 64 / 3) = 170, rounded up to 64
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 8,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-5,
}
COLUMNS = ("attention.wo.weight", "feed_forward.w2.weight")  # what shards cut along the second axis
PATTERNS = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "model.layers": "layers",
}


def small_llama(seed: int = 0, **config) -> LlamaForCausalLM:
    """A random model of which every parameter differs from the next, norms too."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(SMALL | config))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def meta_state(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """The whole state dict under Meta's names, rotary rows as neighbours."""
    state, head_dim = {}, model.config.head_dim
    for name, tensor in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            # Row 2i of a head is row i there, row 2i + 1 is row i + head_dim / 2.
            order = torch.arange(head_dim).view(2, -1).T.flatten()
            rows = torch.arange(len(tensor)).view(-1, head_dim)[:, order].flatten()
            tensor = tensor[rows]
        for ours, meta in PATTERNS.items():
            name = name.replace(ours, meta)
        state[name] = tensor.detach()
    return state


def write_meta(
    model: LlamaForCausalLM, folder: Path, num_shards: int = 1, *, embedding_axis: int = 1, **params
) -> Path:
    """`params.json` and the shards; every part a tensor of its own. A parameter of None is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    entries = {
        "dim": config.hidden_size,
        "multiple_of": 64,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "n_layers": config.num_hidden_layers,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": -1,
    }
    entries = {name: value for name, value in (entries | params).items() if value is not None}
    (folder / "params.json").write_text(json.dumps(entries))
    state = meta_state(model)
    for rank in range(num_shards):
        shard = {"rope.freqs": torch.ones(4)}
        for name, tensor in state.items():
            axis = embedding_axis if name.startswith("tok_") else int(name.endswith(COLUMNS))
            shard[name] = tensor.clone() if "norm" in name else tensor.chunk(num_shards, axis)[rank].clone()
        torch.save(shard, folder / f"consolidated.{rank:02d}.pth")
    return folder


def meta_logits(state: dict[str, torch.Tensor], params: dict, tokens: torch.Tensor) -> torch.Tensor:
    """LLaMA as its paper has it: rotations of complex numbers, made of neighbouring channels. `tokens` is [length]."""
    heads, kv_heads = params["n_heads"], params.get("n_kv_heads", params["n_heads"])
    head_dim, length = params["dim"] // heads, len(tokens)
    frequencies = params.get("rope_theta", 10_000.0) ** -(torch.arange(0, head_dim, 2) / head_dim)
    rotation = torch.exp(1j * torch.outer(torch.arange(length), frequencies))[:, None]  # [length, 1, head_dim / 2]

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + params["norm_eps"]) * state[name]

    def rotated(x: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * rotation).flatten(-2)

    x = state["tok_embeddings.weight"][tokens]
    for i in range(params["n_layers"]):
        h = norm(x, f"layers.{i}.attention_norm.weight")
        q, k, v = ((h @ state[f"layers.{i}.attention.w{n}.weight"].T).view(length, -1, head_dim) for n in "qkv")
        q, k = rotated(q), rotated(k)
        k, v = (tensor.repeat_interleave(heads // kv_heads, dim=1) for tensor in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / head_dim**0.5
        scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf)
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        x = x + mixed @ state[f"layers.{i}.attention.wo.weight"].T
        h = norm(x, f"layers.{i}.ffn_norm.weight")
        w1, w2, w3 = (state[f"layers.{i}.feed_forward.w{n}.weight"] for n in (1, 2, 3))
        x = x + (torch.nn.functional.silu(h @ w1.T) * (h @ w3.T)) @ w2.T
    return norm(x, "norm.weight") @ state["output.weight"].T
