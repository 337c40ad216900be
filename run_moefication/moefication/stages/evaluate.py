"""Perplexity of checkpoints, dense or MoE, how often they agree, and how evenly an MoE uses its experts."""

import pickle
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

# Importing it registers LlamaMoE with the Auto classes.
from llama_moe import LlamaMoEConfig, RoutingStatistics, record_routing
from llama_moe.moe_layers import MoEBlock

from ...settings import EvaluateSettings
from ..checkpoints.dense import DTYPES, DenseCheckpoint, resolve_model_path
from ..checkpoints.dense_config import is_convertible, read_dense_config
from ..checkpoints.headers import ADAPTER, MERGE_ADAPTER
from ..checkpoints.moe import experts_per_tok, require_num_selects, set_num_selects, verify_weights
from ..checkpoints.transformers_library import CONFIG_ERRORS, first_line, last_line, plain_config, quiet_transformers
from ..errors import MoEficationError, SettingError
from ..fitting.losses import predicted
from ..precision import bfloat16_products
from ..progress import progress
from ..storage.files import digest, read_json_object
from ..text.corpus import pack, require_block_size
from ..text.tokens import first_tokens


@dataclass(frozen=True)
class Evaluation:
    """One row of the table."""

    model: str
    num_experts: int | None  # shared ones included; None for dense models, as below
    num_selects: int | None  # of these, per token
    perplexity: float
    predicted_tokens: int
    agreement: float  # share of these for which the first row's model has the same most likely token; 1 for that row
    active: float | None  # parameters of the MLP blocks that ran per token, over the dense model's; None: not known
    expert_load: list[list[float]] | None  # by layer, the share of tokens that each routed expert ran for
    tokens_sha256: str  # `tokens_digest` of the blocks
    seconds: float  # that it took, the loading of the model aside
    block_losses: list[float]  # mean negative log-likelihood of each block, in nats
    best_tokens: torch.Tensor = field(repr=False)  # int32 [predicted_tokens]: the most likely ones

    @property
    def label(self) -> str:
        """Model and budget."""
        return f"{self.model}, {self.num_selects} of {self.num_experts}" if self.num_experts else self.model

    def as_data(self) -> dict[str, Any]:
        """All but the tokens, as JSON can hold it."""
        return {name: value for name, value in vars(self).items() if name != "best_tokens"}


def evaluate(
    model_paths: Sequence[str | Path], text_path: str | Path, *, device: str = "cpu", **settings: Any
) -> list[Evaluation]:
    """Perplexity on a text: `exp` of the mean negative log-likelihood over non-overlapping blocks. Agreement: how often
    the most likely next token is that of the first model, given the same text.

    Each block is read afresh, so its first token is context only. All models read the same blocks; a checkpoint is
    loaded once for all its budgets. `settings` are the fields of `EvaluateSettings`.
    """
    settings = EvaluateSettings(**settings)
    text_path, model_paths = Path(text_path), [str(path) for path in model_paths]
    if not text_path.is_file():
        raise SettingError(f"text_path {text_path} is not a file")
    paths = [resolve_model_path(path) for path in model_paths]
    configs = [read_config(path) for path in paths]
    budgets = [_budgets(config, settings.num_selects) for config in configs]
    if settings.num_selects and not any(config.model_type == "llama_moe" for config in configs):
        raise SettingError("num_selects is for MoE checkpoints, none of model_path is one")
    # Some models of other kinds have no longest text.
    limits = [getattr(config.get_text_config(), "max_position_embeddings", None) for config in configs]
    positions = min(filter(None, limits), default=sys.maxsize)
    name = "the smallest model" if len(paths) > 1 else paths[0].name
    block_size = require_block_size(settings.block_size, positions, name)

    tokens = same_tokens(text_path, paths, configs, settings.max_tokens)
    blocks = blocks_of(text_path, tokens, block_size)
    for path, config in zip(paths, configs, strict=True):
        if config.model_type == "llama_moe":
            verify_weights(path)

    results: list[Evaluation] = []
    for path, name, config, model_budgets in zip(paths, model_paths, configs, budgets, strict=True):
        model = load_model(path, config, settings.dtype, device)
        for budget in model_budgets:
            row = evaluate_model(model, Path(name).name, blocks, budget, settings.batch_size, *results[:1])
            results.append(row)
        del model
    return results


def blocks_of(text_path: Path, tokens: torch.Tensor, block_size: int) -> list[torch.Tensor]:
    """The blocks of a text in which a token can be predicted; refused if there are none."""
    blocks = [block for block in pack(tokens, block_size) if len(block) > 1]
    if not blocks:
        raise MoEficationError(f"{text_path} holds fewer than 2 tokens")
    return blocks


def same_tokens(
    text_path: Path, paths: list[Path], configs: list[PreTrainedConfig], max_tokens: int | None
) -> torch.Tensor:
    """The first tokens of a text, which every model's tokenizer must give alike."""
    sizes = [config.get_text_config().vocab_size for config in configs]
    tokens = [first_tokens(text_path, path, max_tokens, size) for path, size in zip(paths, sizes, strict=True)]
    for path, others in zip(paths[1:], tokens[1:], strict=True):
        if not torch.equal(tokens[0], others):
            raise MoEficationError(
                f"{paths[0]} and {path} read other tokens of {text_path} ({len(tokens[0]):,} and {len(others):,}), so "
                f"their perplexities cannot be compared; evaluate them one at a time"
            )
    return tokens[0]


def read_config(path: Path) -> PreTrainedConfig:
    """The config of a checkpoint, without fields that steer the library; a model with code of its own is refused."""
    raw = read_json_object(path / "config.json", "is this the folder of a transformers checkpoint?")
    if is_convertible(raw):
        return read_dense_config(path)[1]
    if raw.get("auto_map") and raw.get("model_type") != LlamaMoEConfig.model_type:  # the installed package is its code
        raise MoEficationError(f"{path} brings code of its own (auto_map in config.json), which is not run here")
    try:
        return plain_config(raw)
    except CONFIG_ERRORS as error:
        raise MoEficationError(f"{path} has no usable config.json ({last_line(error)})") from error


def _budgets(config: PreTrainedConfig, num_selects: Sequence[int] | None) -> Sequence[int | None]:
    if config.model_type != "llama_moe" or not num_selects:
        return [None]
    for budget in num_selects:
        require_num_selects(budget, config)
    return num_selects


def load_model(path: Path, config: PreTrainedConfig, dtype: str | None, device: str) -> PreTrainedModel:
    """A checkpoint as a causal LM, in one of `DTYPES` (None: float32 on CPUs, elsewhere the model's own)."""
    default = torch.float32 if torch.device(device).type == "cpu" else "auto"
    torch_dtype = DTYPES[dtype] if dtype else default
    if type(config) is LlamaConfig:  # read it as the stages do
        checkpoint = DenseCheckpoint(str(path))
        return checkpoint.load_causal_lm(device, checkpoint.dtype if torch_dtype == "auto" else torch_dtype)
    if (path / ADAPTER).exists():  # transformers would apply it without a word
        raise MoEficationError(f"{path} holds a LoRA adapter beside its weights; {MERGE_ADAPTER}, or take it away")
    try:
        with quiet_transformers():
            model, loading = AutoModelForCausalLM.from_pretrained(
                path, config=config, dtype=torch_dtype, trust_remote_code=False, output_loading_info=True
            )
    # Files are cut or missing, sizes do not fit, the class is no causal LM, or a package that it needs is missing.
    except (OSError, RuntimeError, ImportError, SafetensorError, pickle.UnpicklingError, *CONFIG_ERRORS) as error:
        raise MoEficationError(f"{path} does not load as a causal LM ({first_line(error)})") from error
    if loading["missing_keys"] or loading["mismatched_keys"]:
        lacking = min(loading["missing_keys"], default="shapes")
        raise MoEficationError(f"{path} lacks weights of a causal LM ({lacking})")
    return model.to(device).eval()


@bfloat16_products()
@torch.inference_mode()
def evaluate_model(
    model: PreTrainedModel,
    name: str,
    blocks: list[torch.Tensor],
    budget: int | None = None,
    batch_size: int = 4,
    reference: Evaluation | None = None,
) -> Evaluation:
    """A loaded model on blocks of tokens, of which all but the last are equally long; `name` is for the row, `budget`
    the experts to run per token, shared ones included (None: as the model is). `reference` is the row of the same
    blocks that agreement is with; without one, a model agrees with itself."""
    num_experts, start = None, time.perf_counter()
    if model.config.model_type == "llama_moe":
        num_experts = model.config.num_experts + model.config.num_shared_experts
        if budget is not None:
            set_num_selects(model, budget, name)
        else:  # what it runs as it is
            counts = experts_per_tok(model.config, lambda layer: model.model.layers[layer].mlp.gate.threshold.item())
            budget = model.config.num_selects if any(counts) else model.config.num_shared_experts
    # All blocks of a batch have one length: padding would count as tokens that were routed.
    equal = (torch.stack(list(group)) for _, group in groupby(blocks, len))
    batches = [batch for stacked in equal for batch in stacked.split(batch_size)]
    with record_routing(model) as routing:
        what = f"evaluate {name}, {budget} of {num_experts}" if num_experts else f"evaluate {name}"
        work = progress(batches, what, "batch")
        rows = [row for batch in work for row in _predicted(model, batch.long().to(model.device))]
    losses, best = zip(*rows, strict=True)
    best = torch.cat(best).int().cpu()
    counts = [len(block) - 1 for block in blocks]
    return Evaluation(
        model=name,
        num_experts=num_experts,
        num_selects=budget,
        perplexity=float(torch.tensor(sum(losses) / sum(counts), dtype=torch.float64).exp()),
        predicted_tokens=sum(counts),
        agreement=(best == reference.best_tokens).double().mean().item() if reference else 1.0,
        active=active_share(model, routing) if routing else None if is_foreign_moe(model.config) else 1.0,
        expert_load=[layer.expert_load.tolist() for layer in routing] or None,
        tokens_sha256=tokens_digest(blocks),
        seconds=time.perf_counter() - start,
        block_losses=[loss / count for loss, count in zip(losses, counts, strict=True)],
        best_tokens=best,
    )


def is_foreign_moe(config: PreTrainedConfig) -> bool:
    """Whether it is of another class of MoEs, such as an export: how much of that runs is not counted here."""
    return config.model_type != "llama_moe" and getattr(config, "num_experts_per_tok", None) is not None


def tokens_digest(blocks: Sequence[torch.Tensor]) -> str:
    """Stands for what was read: the tokens of the blocks, and where these end."""
    return digest([block.tolist() for block in blocks])


def _predicted(model: PreTrainedModel, tokens: torch.Tensor) -> list[tuple[float, torch.Tensor]]:
    """For each of the blocks `[B, N]`, what `predicted` says of it."""
    if isinstance(model, LlamaForCausalLM):  # dense or MoE: its logits can be made for a few tokens at a time
        states = model.model(input_ids=tokens, use_cache=False).last_hidden_state
        return [predicted(*block, model.lm_head.weight) for block in zip(states, tokens, strict=True)]
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    return [
        (F.cross_entropy(rows.float(), targets, reduction="sum").item(), rows.argmax(1))
        for rows, targets in zip(logits, tokens[:, 1:], strict=True)
    ]


def active_share(model: PreTrainedModel, routing: list[RoutingStatistics]) -> float:
    """Parameters of the MoE blocks that ran per token on average (gates, biases and shared experts included), over
    those of the dense model's MLPs; `routing` is what `record_routing` gave."""
    config = model.config
    hidden, neurons = config.hidden_size, config.intermediate_size
    dense = 3 * hidden * neurons + (hidden + 2 * neurons if config.mlp_bias else 0)
    blocks = [module for module in model.modules() if isinstance(module, MoEBlock)]
    ran = 0.0
    for block, statistics in zip(blocks, routing, strict=True):
        routed = sum(parameter.numel() for parameter in block.experts.parameters())
        always = sum(parameter.numel() for parameter in block.parameters()) - routed
        ran += always + routed * statistics.experts_per_tok / config.num_experts
    return ran / (dense * len(blocks))
