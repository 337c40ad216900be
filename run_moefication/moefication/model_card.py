"""The README.md of a converted checkpoint."""

from typing import Any

from llama_moe import LlamaMoEConfig

from .checkpoints import Checkpoint
from .manifests import Claim


def model_card(checkpoint: Checkpoint, claim: Claim, config: LlamaMoEConfig, gate_metrics: dict[str, Any]) -> str:
    """What a stranger needs to know of the checkpoint: origin, how it was made, how to load it, what to expect."""
    mean = {
        name: sum(layer[name] for layer in gate_metrics.values()) / len(gate_metrics)
        for name in ("mass_recall", "constant_mass_recall")
    }
    model_class = claim.options["convert_type"]
    auto_class = next(auto for auto, path in config.auto_map.items() if path.endswith(f".{model_class}"))
    limits = "\nThis model has MLP biases: it runs in transformers only.\n" if config.mlp_bias else ""
    return f"""---
library_name: transformers
base_model: {checkpoint.name}
tags: [llama_moe, mixture-of-experts, moefication]
---
# {checkpoint.name} as a Mixture of Experts

The dense model {checkpoint.name} with each MLP of {config.intermediate_size} neurons cut into {config.num_experts}
experts of {config.moe_intermediate_size}; {config.num_experts_per_tok} of them run per token. No weight was trained but
the gates ({config.gate_network}). Its licence is that of {checkpoint.name}.

```python
from transformers import {auto_class}, AutoTokenizer

# trust_remote_code runs the model's code from this folder; with the package llama_moe imported it is not needed
model = {auto_class}.from_pretrained("PATH", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("PATH")
model.set_num_experts_per_tok({config.num_experts})  # all experts: the dense model; fewer: less work, less quality
```

The gates capture {mean["mass_recall"]:.3f} of the score that the best experts of each token hold (mean over layers,
held-out tokens); always choosing the same experts would capture {mean["constant_mass_recall"]:.3f}. Measure perplexity
before use: without further training, few experts per token cost much quality.
{limits}"""
