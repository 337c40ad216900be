"""Perplexity of checkpoints, dense or MoE, and how evenly an MoE uses its experts."""

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

# Importing it registers LlamaMoE with the Auto classes.
from llama_moe import LlamaMoEConfig, RoutingStatistics, record_routing
from llama_moe.moe_layers import MoEBlock

from ..checkpoints.dense import DTYPES, DenseCheckpoint, resolve_model_path
from ..checkpoints.dense_config import is_convertible, read_dense_config
from ..checkpoints.headers import ADAPTER, MERGE_ADAPTER
from ..checkpoints.moe import correct_zero_budget, require_num_selects
from ..checkpoints.tokenizers import load_tokenizer
from ..checkpoints.transformers_library import CONFIG_ERRORS, first_line, last_line, plain_config, quiet_transformers
from ..errors import MoEficationError, SettingError
from ..progress import Progress, no_progress
from ..storage.files import read_json_object
from ..text.corpus import pack, require_block_size
from ..text.documents import DocumentReader
from ..text.text_files import find_text_files
from ..text.tokens import tokenize


@dataclass(frozen=True)
class Evaluation:
    """One row of the table. `num_experts` and `num_selects` count shared experts, too. `active`: parameters of the MLP
    blocks that ran, over the dense model's; `expert_load`: per layer, the share of tokens that each routed expert ran
    for (MoE only)."""

    model: str
    num_experts: int | None
    num_selects: int | None
    perplexity: float
    predicted_tokens: int
    active: float
    expert_load: list[list[float]] | None

    @property
    def label(self) -> str:
        """Model and budget."""
        return _label(self.model, self.num_selects, self.num_experts)


def _label(model: str, num_selects: int | None, num_experts: int | None) -> str:
    return f"{model}, {num_selects} of {num_experts}" if num_experts else model


def evaluate(
    model_paths: Sequence[str | Path],
    text_path: str | Path,
    *,
    num_selects: list[int] | None = None,
    block_size: int | None = None,
    max_tokens: int | None = None,
    batch_size: int = 4,
    dtype: str | None = None,
    device: str = "cpu",
    progress: Progress = no_progress,
) -> list[Evaluation]:
    """Perplexity on a text: `exp` of the mean negative log-likelihood over non-overlapping blocks.

    Each block is read afresh, so its first token is context only. All models read the same blocks; a checkpoint is
    loaded once for all its budgets.

    Args:
        num_selects: budgets to evaluate MoE checkpoints at; None for the one each was converted with.
        block_size: None for 2048, or what the smallest model takes.
        dtype: to run in; None for float32 on CPUs and the checkpoint's own elsewhere.
    """
    text_path, model_paths = Path(text_path), [str(path) for path in model_paths]
    if not text_path.is_file():
        raise SettingError(f"text_path {text_path} is not a file")
    if batch_size < 1:
        raise SettingError(f"batch_size {batch_size} must be at least 1")
    if max_tokens is not None and max_tokens < 2:
        raise SettingError(f"max_tokens {max_tokens} must be at least 2")
    paths = [resolve_model_path(path) for path in model_paths]
    configs = [_read_config(path) for path in paths]
    budgets = [_budgets(config, num_selects) for config in configs]
    if num_selects and not any(config.model_type == "llama_moe" for config in configs):
        raise SettingError("num_selects is for MoE checkpoints, none of model_path is one")
    positions = min(config.max_position_embeddings for config in configs)
    block_size = require_block_size(block_size, positions, "the smallest model" if len(paths) > 1 else paths[0].name)

    tokens = _same_tokens(text_path, paths, configs, max_tokens)
    blocks = [block for block in pack(tokens, block_size) if len(block) > 1]
    if not blocks:
        raise MoEficationError(f"{text_path} holds fewer than 2 tokens")

    results = []
    for path, name, config, model_budgets in zip(paths, model_paths, configs, budgets, strict=True):
        model = _load(path, config, dtype, device)
        for budget in model_budgets:
            results.append(_evaluate(model, Path(name).name, budget, blocks, batch_size, progress))
        del model
    return results


def _same_tokens(
    text_path: Path, paths: list[Path], configs: list[PreTrainedConfig], max_tokens: int | None
) -> torch.Tensor:
    """The text as the tokenizers of all models cut it; refused where they do not agree, for then no ratio of
    perplexities means anything."""
    sizes = [config.get_text_config().vocab_size for config in configs]
    tokens = [first_tokens(text_path, path, max_tokens, size) for path, size in zip(paths, sizes, strict=True)]
    for path, others in zip(paths[1:], tokens[1:], strict=True):
        if not torch.equal(tokens[0], others):
            raise MoEficationError(
                f"{paths[0]} and {path} read other tokens of {text_path} ({len(tokens[0]):,} and {len(others):,}), so "
                f"their perplexities cannot be compared; evaluate them one at a time"
            )
    return tokens[0]


def first_tokens(text_path: Path, model_path: Path, max_tokens: int | None, vocab_size: int) -> torch.Tensor:
    """The text as the model's tokenizer cuts it, read no further than needed; `vocab_size` as in `tokenize`."""
    pieces, count = [], 0
    reader = DocumentReader(find_text_files(text_path))
    for piece in tokenize(reader, load_tokenizer(model_path), vocab_size, reader.bad):
        pieces.append(torch.from_numpy(piece))
        count += len(piece)
        if max_tokens is not None and count >= max_tokens:
            break
    return torch.cat(pieces)[:max_tokens] if pieces else torch.empty(0, dtype=torch.int32)


def _read_config(path: Path) -> PreTrainedConfig:
    """The config of a checkpoint, without what steers the library; that of a model with code of its own is refused."""
    raw = read_json_object(path / "config.json", "is this the folder of a transformers checkpoint?")
    if is_convertible(raw):
        return read_dense_config(path)[1]
    if raw.get("auto_map") and raw.get("model_type") != LlamaMoEConfig.model_type:  # whose code is the installed one
        raise MoEficationError(f"{path} brings code of its own (auto_map in config.json), which is not run here")
    try:
        return plain_config(raw)
    except CONFIG_ERRORS as error:
        raise MoEficationError(f"{path} has no usable config.json ({last_line(error)})") from error


def _budgets(config, num_selects: list[int] | None) -> list[int | None]:
    if config.model_type != "llama_moe":
        return [None]
    for budget in num_selects or []:
        require_num_selects(budget, config)
    return num_selects or [None]


def _load(path: Path, config: PreTrainedConfig, dtype: str | None, device: str) -> PreTrainedModel:
    default = torch.float32 if torch.device(device).type == "cpu" else "auto"
    torch_dtype = DTYPES[dtype] if dtype else default
    if type(config) is LlamaConfig:  # as the stages read it
        checkpoint = DenseCheckpoint(str(path))
        return checkpoint.load_causal_lm(device, checkpoint.dtype if torch_dtype == "auto" else torch_dtype)
    if (path / ADAPTER).exists():  # transformers would apply it without a word
        raise MoEficationError(f"{path} holds a LoRA adapter beside its weights; {MERGE_ADAPTER}, or take it away")
    try:
        with quiet_transformers():
            model, loading = AutoModelForCausalLM.from_pretrained(
                path, config=config, dtype=torch_dtype, trust_remote_code=False, output_loading_info=True
            )
    # Files cut or missing, sizes that do not fit, classes that are no causal LM, and packages that a class needs.
    except (OSError, RuntimeError, ImportError, SafetensorError, pickle.UnpicklingError, *CONFIG_ERRORS) as error:
        raise MoEficationError(f"{path} does not load as a causal LM ({first_line(error)})") from error
    if loading["missing_keys"] or loading["mismatched_keys"]:
        raise MoEficationError(
            f"{path} lacks weights of a causal LM ({min(loading['missing_keys'], default='shapes')})"
        )
    return model.to(device).eval()


@torch.inference_mode()
def _evaluate(
    model: PreTrainedModel,
    name: str,
    budget: int | None,
    blocks: list[torch.Tensor],
    batch_size: int,
    progress: Progress,
) -> Evaluation:
    num_experts = None
    if model.config.model_type == "llama_moe":
        shared = model.config.num_shared_experts
        num_experts = model.config.num_experts + shared
        if budget is None:
            if model.config.routing == "threshold":
                correct_zero_budget(model.config, [layer.mlp.gate.threshold.item() for layer in model.model.layers])
            budget = model.config.num_selects
        else:
            try:
                model.set_num_experts_per_tok(budget - shared)
            except ValueError as error:  # thresholds without quantiles
                raise MoEficationError(f"{name} cannot run --num_selects {budget}: {error}") from error
    loss_sum, predicted = 0.0, 0
    label = _label(name, budget, num_experts)
    with record_routing(model) as routing:
        for batch in progress(list(_batches(blocks, batch_size)), f"evaluate {label}", "batch"):
            tokens = torch.stack(batch).long().to(model.device)
            logits = model(input_ids=tokens, use_cache=False).logits
            for row, targets in zip(logits[:, :-1], tokens[:, 1:], strict=True):  # a row at a time: logits are large
                loss_sum += F.cross_entropy(row.float(), targets, reduction="sum").item()
            predicted += tokens[:, 1:].numel()
    return Evaluation(
        model=name,
        num_experts=num_experts,
        num_selects=budget,
        perplexity=float(torch.tensor(loss_sum / predicted, dtype=torch.float64).exp()),
        predicted_tokens=predicted,
        active=active_share(model, routing) if routing else 1.0,
        expert_load=[layer.expert_load.tolist() for layer in routing] or None,
    )


def active_share(model: PreTrainedModel, routing: list[RoutingStatistics]) -> float:
    """Parameters of the MoE blocks that ran per token on average, gates and biases and shared experts included, over
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


def _batches(blocks: list[torch.Tensor], batch_size: int) -> Iterator[list[torch.Tensor]]:
    """Batches of equally long blocks: the last block, if shorter, is a batch of its own, so nothing is padded."""
    whole = [block for block in blocks if len(block) == len(blocks[0])]
    for start in range(0, len(whole), batch_size):
        yield whole[start : start + batch_size]
    if len(whole) < len(blocks):
        yield blocks[len(whole) :]
