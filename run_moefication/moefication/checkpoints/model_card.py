"""The README.md of a LlamaMoE checkpoint."""

from typing import Any

from llama_moe import LlamaMoEConfig


def conversion_card(name: str, config: LlamaMoEConfig, model_class: str, gate_metrics: dict[str, Any]) -> str:
    """The card of a checkpoint that convert wrote: the gates alone were trained."""
    mean = {
        key: sum(layer[key] for layer in gate_metrics.values()) / len(gate_metrics)
        for key in ("mass_recall", "constant_mass_recall")
    }
    return model_card(
        name,
        config,
        model_class,
        f"No weight was trained but the gates ({config.gate_network}).",
        f"""\
The gates capture {mean["mass_recall"]:.3f} of the score that the best experts of each token hold (mean over layers,
held-out tokens); always choosing the same experts would capture {mean["constant_mass_recall"]:.3f}. Measure perplexity
before use: without calibration or training, few experts per token cost much quality.
""",
    )


def calibration_card(
    name: str,
    config: LlamaMoEConfig,
    model_class: str,
    num_tokens: int,
    metrics: list[dict[str, Any]],
    final_metrics: dict[str, float] | None,
) -> str:
    """The card of a checkpoint that calibrate wrote, with what each layer's fit gained, and that of all together."""
    fitted = "Gates and `down_proj` were" if "gate" in metrics[0] else "`down_proj` was"
    thresholds = [f"{m['threshold']:.4g}" if config.routing == "threshold" else "none" for m in metrics]
    rows = [
        f"| {layer} | {threshold} | {m['active_share']:.3f} "
        f"| {m['error_before']:.4f} | {m['error_after']:.4f} | {m['strength']:g} |"
        for layer, (threshold, m) in enumerate(zip(thresholds, metrics, strict=True))
    ]
    table = "\n".join(rows)
    final = ""
    if final_metrics is not None:
        final = f"""
Then norms, a factor for each expert, and output biases if there are any were fitted to the dense model's predictions,
all layers together. KL divergence on tokens that nothing was fitted to:
{final_metrics["divergence_before"]:.4f} nats a token before, {final_metrics["divergence_after"]:.4f} after it.
"""
    return model_card(
        name,
        config,
        model_class,
        f"{fitted} fitted in closed form, layer by layer, on {num_tokens:,} tokens.",
        f"""\
What each layer's output lacks of the dense model's, as a share of its square, with the original `down_proj` and with
the fitted one, on the quarter of the calibration text that is held out to choose the strength.

| layer | threshold | routed experts that run | before | after | ridge strength |
|---|---|---|---|---|---|
{table}
{final}""",
    )


def distillation_card(
    name: str, config: LlamaMoEConfig, model_class: str, trained: str, num_tokens: int, metrics: dict[str, Any]
) -> str:
    """The card of a checkpoint that distill wrote."""
    parts = {"gates": "Gates", "experts": "Experts", "all": "Gates and experts"}
    shares, nested = metrics["active_share"], ""
    if "nested" in metrics:
        rows = [f"| {m['num_selects']} | {m['loss_before']:.4f} | {m['loss_after']:.4f} |" for m in metrics["nested"]]
        table = "\n".join(rows)
        nested = f"""
It was trained for other budgets as well, which `set_active_fraction` sets. The same divergence at these:

| experts per token | before | after |
|---|---|---|
{table}
"""
    return model_card(
        name,
        config,
        model_class,
        f"{parts[trained]} were distilled from the dense model, on {num_tokens:,} tokens.",
        f"""\
How far its predictions are from the dense model's, on held-out text of the same kind: KL divergence of
{metrics["loss_before"]:.4f} nats a token before the distillation, {metrics["loss_after"]:.4f} after it. Of the routed
experts {sum(shares) / len(shares):.3f} ran per token (mean over layers; {min(shares):.3f} to {max(shares):.3f}).
{nested}""",
    )


def model_card(name: str, config: LlamaMoEConfig, model_class: str, made: str, quality: str) -> str:
    """What a stranger needs to know of the checkpoint: origin, how it was made, how to load it, what to expect."""
    auto_class = next(auto for auto, path in config.auto_map.items() if path.endswith(f".{model_class}"))
    limits = "\nThis model has MLP biases: it runs in transformers only.\n" if config.mlp_bias else ""
    experts = config.num_experts + config.num_shared_experts
    budget = f"{config.num_selects} of them run per token"
    if not config.num_experts_per_tok:
        budget = f"the {config.num_shared_experts} shared ones alone run"
    elif config.num_shared_experts:
        budget += f", {config.num_shared_experts} of these always"
    if config.routing == "threshold" and config.num_experts_per_tok:
        budget += ": as many as reach the layer's score threshold, that many on average"
    return f"""---
library_name: transformers
base_model: {name}
tags: [llama_moe, mixture-of-experts, moefication]
---
# {name} as a Mixture of Experts

The dense model {name} with each MLP of {config.intermediate_size} neurons cut into {experts} experts of
{config.moe_intermediate_size}; {budget}. {made} Its licence is that of {name}.

```python
from transformers import {auto_class}, AutoTokenizer

# trust_remote_code runs the model's code from this folder; with the package llama_moe imported it is not needed
model = {auto_class}.from_pretrained("PATH", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("PATH")
model.set_active_fraction(0.5)  # half of the experts; 1: all of them; fewer: less work, less quality
```

{quality}{limits}"""


def export_card(name: str, config: LlamaMoEConfig, format: str, checks: dict[str, Any] | None = None) -> str:
    """The card of what export wrote: what it is, how it is run, and how near each GGUF file is (`checks`)."""
    experts = config.num_experts + config.num_shared_experts
    if format != "gguf":
        return f"""---
library_name: transformers
pipeline_tag: text-generation
base_model: {name}
tags: [mixture-of-experts, moefication]
---
# {name} as {format}

{name}, a LLaMA cut into {experts} experts a layer, in an architecture that transformers, vLLM, SGLang and MLX bring
along. No code comes with it. `manifest.json` says how near it is to the original.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("PATH"), AutoTokenizer.from_pretrained("PATH")
```
"""
    files = "\n".join(f"* `{file}`{_check_of(check)}" for file, check in (checks or {}).items())
    return f"""---
pipeline_tag: text-generation
base_model: {name}
tags: [gguf, mixture-of-experts, moefication]
---
# {name} for llama.cpp

{name}, a LLaMA cut into {experts} experts a layer. The files are for llama.cpp and what is built on it; other readers
of GGUF do not know this kind of routing.

{files}

```sh
llama-cli -m FILE.gguf -p "The capital of France is"
```
"""


def _check_of(check: dict[str, Any]) -> str:
    """How near a file is, as the rest of its line."""
    if not check["run"]:
        return ": not run"
    ratio = check["perplexity"] / check["reference_perplexity"]
    agreement = f"{check['argmax_agreement']:.1%} of its most likely tokens are the original's"
    return f": {ratio:.4f} of the original's perplexity, {agreement} ({check['tokens']} tokens)"
