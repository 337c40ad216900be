"""The README.md of a checkpoint: what it is, where it comes from, how it was made and how it is run.

Its head has the fields that the hub reads. Licence and languages are those of the model that it was made from; later
stages take them over from the card of the checkpoint that they read.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load

from llama_moe import LlamaMoEConfig

from ..storage.files import write_atomically
from ..storage.manifest import CARD
from .writer import LICENCES

KEPT_FIELDS = ("license", "license_name", "license_link", "language")
# The lines around what the evaluation writes.
EVALUATION = ("<!-- evaluation -->", "<!-- end of the evaluation -->")

COMMANDS = """
```sh
vllm serve PATH --trust-remote-code
lm_eval run --model hf --model_args pretrained=PATH,trust_remote_code=True --tasks hellaswag
hf upload OWNER/NAME PATH    # publishes this folder
```
"""
LLAMA_CPP = """
llama.cpp runs what `llama_export.py --format gguf` of LLaMA-MoEfication makes of models of its `RECIPE=engine`.
"""


class Origin(NamedTuple):
    """What a checkpoint was made from: that model's name, its id on the hub (or else its name), and the fields of its
    card that hold for the checkpoint as well."""

    name: str
    base_model: str
    fields: dict[str, Any]

    @classmethod
    def of_source(cls, path: Path, name: str, base_model: str | None) -> "Origin":
        """The folder of the model that is converted. A licence without a card is named by its file."""
        fields, file = _fields(path), next((file for file in LICENCES if (path / file).is_file()), None)
        if "license" not in fields and file:
            fields |= {"license": "other", "license_name": f"licence-of-{name.lower()}", "license_link": file}
        return cls(name, base_model or name, _kept(fields))

    @classmethod
    def of_moe(cls, path: Path, name: str) -> "Origin":
        """The checkpoint that a later stage reads, made from the dense model `name`."""
        fields = _fields(path)
        return cls(name, fields.get("base_model") or name, _kept(fields))

    def head(self, pipeline_tag: str | None, **fields: Any) -> str:
        """The head of a card, with these fields beside its own."""
        data = ModelCardData(base_model=self.base_model, pipeline_tag=pipeline_tag, **self.fields, **fields)
        return f"---\n{data.to_yaml()}\n---\n"


def _fields(path: Path) -> dict[str, Any]:
    """The head of the card in a folder; empty where there is none that can be read."""
    try:
        return metadata_load(path / CARD) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def _kept(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: fields[name] for name in KEPT_FIELDS if name in fields}


def conversion_card(origin: Origin, config: LlamaMoEConfig, model_class: str, gate_metrics: dict[str, Any]) -> str:
    """The card of a checkpoint that convert wrote: the gates alone were trained."""
    mean = {
        key: sum(layer[key] for layer in gate_metrics.values()) / len(gate_metrics)
        for key in ("mass_recall", "constant_mass_recall")
    }
    return model_card(
        origin,
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
    origin: Origin,
    config: LlamaMoEConfig,
    model_class: str,
    tokens: Mapping[str, int],
    metrics: list[dict[str, Any]],
    final_metrics: dict[str, float] | None,
) -> str:
    """The card of a checkpoint that calibrate wrote, with what each layer's fit gained, and that of all together;
    `tokens`: of the text, by domain."""
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
        origin,
        config,
        model_class,
        f"{fitted} fitted in closed form, layer by layer, on {_amount(tokens)}.",
        f"""\
What each layer's output lacks of the dense model's, as a share of its square, with the original `down_proj` and with
the fitted one, on the quarter of the calibration text that is held out to choose the strength.

| layer | threshold | routed experts that run | before | after | ridge strength |
|---|---|---|---|---|---|
{table}
{final}""",
    )


def distillation_card(
    origin: Origin,
    config: LlamaMoEConfig,
    model_class: str,
    trained: str,
    tokens: Mapping[str, int],
    metrics: dict[str, Any],
) -> str:
    """The card of a checkpoint that distill wrote; `tokens`: of the text, by domain."""
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
        origin,
        config,
        model_class,
        f"{parts[trained]} were distilled from the dense model, on {_amount(tokens)}.",
        f"""\
How far its predictions are from the dense model's, on held-out text of the same kind: KL divergence of
{metrics["loss_before"]:.4f} nats a token before the distillation, {metrics["loss_after"]:.4f} after it. Of the routed
experts {sum(shares) / len(shares):.3f} ran per token (mean over layers; {min(shares):.3f} to {max(shares):.3f}).
{nested}""",
    )


def _amount(tokens: Mapping[str, int]) -> str:
    """How much text of which domains."""
    domains = ", ".join(f"{domain} {count:,}" for domain, count in tokens.items())
    return f"{sum(tokens.values()):,} tokens ({domains})"


def import_card(origin: Origin, config: LlamaMoEConfig, model_class: str) -> str:
    """The card of a LlamaMoE imported from LLaMA-MoE v1; `origin` is the checkpoint of v1."""
    experts = f"{config.num_experts_per_tok} of {config.num_experts} experts of {config.moe_intermediate_size} neurons"
    weight = "each of weight 1"
    if config.multiply_gate_scores:
        weight = f"weighed by the softmax of their scores times {config.score_scale_factor:g}"
    return _card(
        origin,
        config,
        model_class,
        f"""\
# {origin.name} as a LlamaMoE

The weights of {origin.name}, a LLaMA-MoE v1 (Zhu et al. 2024, arXiv 2406.16554), unchanged but in the layout of
LLaMA-MoEfication. {experts} run per token, {weight}.""",
        "",
        "The noise on gate scores and the balance loss, which the original has in training, are left out.\n",
    )


def model_card(origin: Origin, config: LlamaMoEConfig, model_class: str, made: str, quality: str) -> str:
    """What a stranger needs to know of the checkpoint: origin, how it was made, how to run it, what to expect."""
    name = origin.name
    limits = "\nThis model has MLP biases: it runs in transformers only.\n" if config.mlp_bias else ""
    experts = config.num_experts + config.num_shared_experts
    budget = f"{config.num_selects} of them run per token"
    if not config.num_experts_per_tok:
        budget = f"the {config.num_shared_experts} shared ones alone run"
    elif config.num_shared_experts:
        budget += f", {config.num_shared_experts} of these always"
    if config.routing == "threshold" and config.num_experts_per_tok:
        budget += ": as many as reach the layer's score threshold, that many on average"
    return _card(
        origin,
        config,
        model_class,
        f"""\
# {name} as a Mixture of Experts

The dense model {name} with each MLP of {config.intermediate_size} neurons cut into {experts} experts of
{config.moe_intermediate_size}; {budget}. {made}""",
        f"model.set_active_fraction({_half(config)})  # of the experts; 1: all; fewer: less work, less quality\n",
        f"{quality}{limits}",
        LLAMA_CPP,
    )


def _half(config: LlamaMoEConfig) -> str:
    """Python for about half of the experts: top-k takes a whole number of them."""
    experts = config.num_experts + config.num_shared_experts
    return "0.5" if config.routing == "threshold" or experts % 2 == 0 else f"{(experts + 1) // 2} / {experts}"


def _card(
    origin: Origin, config: LlamaMoEConfig, model_class: str, what: str, usage: str, quality: str, engines: str = ""
) -> str:
    """A card of these parts: `what` is its title and first paragraph, `usage` lines of Python, `quality` its end."""
    auto_class = next(auto for auto, path in config.auto_map.items() if path.endswith(f".{model_class}"))
    is_causal = model_class == "LlamaMoEForCausalLM"
    tags = ["llama_moe", "mixture-of-experts", "moefication"]
    licence = origin.fields.get("license_link", "the model's own page")
    return f"""{origin.head("text-generation" if is_causal else None, library_name="transformers", tags=tags)}\
{what} Its licence is that of {origin.name} (see {licence}).

```python
from transformers import {auto_class}, AutoTokenizer

# trust_remote_code runs the model's code from this folder; with the package llama_moe imported it is not needed
model = {auto_class}.from_pretrained("PATH", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)
{usage}```
{COMMANDS + engines if is_causal and not config.mlp_bias else ""}
{EVALUATION[0]}
{EVALUATION[1]}

{quality}"""


def add_evaluation(folder: Path, table: str) -> None:
    """Put what was evaluated, a table in Markdown, into the card of a checkpoint, in place of what it said before; at
    its end, if it has no place for it."""
    before, found, rest = (folder / CARD).read_text().partition(EVALUATION[0])
    _, end, after = rest.partition(EVALUATION[1]) if found else ("", EVALUATION[1], "\n")
    after = after if end else rest  # somebody took the mark away: what follows may be theirs
    card = f"{before.rstrip()}\n\n{EVALUATION[0]}\n{table.strip()}\n{EVALUATION[1]}{after}"
    write_atomically(folder / CARD, lambda file: file.write(card.encode()))


def export_card(
    origin: Origin, name: str, config: LlamaMoEConfig, format: str, checks: dict[str, Any] | None = None
) -> str:
    """The card of what export wrote of the checkpoint `name`: what it is, how it is run, and how near each GGUF file is
    (`checks`)."""
    what = f"{name}, a LLaMA cut into {config.num_experts + config.num_shared_experts} experts a layer"
    tags = ["mixture-of-experts", "moefication"]
    if format != "gguf":
        return f"""{origin.head("text-generation", library_name="transformers", tags=tags)}\
# {name} as {format}

{what}, in an architecture that transformers, vLLM and SGLang bring along. No code comes with it. `manifest.json`
says how near it is to the original.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("PATH"), AutoTokenizer.from_pretrained("PATH")
```
"""
    files = "\n".join(f"* `{file}`{_check_of(check)}" for file, check in (checks or {}).items())
    return f"""{origin.head("text-generation", tags=["gguf", *tags])}\
# {name} for llama.cpp

{what}. The files are for llama.cpp and what is built on it; other readers of GGUF do not know this kind of routing.

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
