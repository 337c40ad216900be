"""How near an exported model is to the LlamaMoE it was made from, on a text."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

import llama_moe
from llama_moe import LlamaMoEConfig

from .. import llama_cpp
from ..checkpoints.engine_model import EngineModel
from ..checkpoints.tokenizers import load_tokenizer, provoking_texts
from ..checkpoints.transformers_library import quiet_transformers
from ..errors import MoEficationError, SettingError
from ..progress import progress

# Of perplexities, where weights are not quantised. Rounding to bfloat16 makes experts change places, which moves a few
# hundred tokens by a twentieth; what is computed wrongly moves them by far more.
MOST_RATIO = 1.25


class Reference:
    """The LlamaMoE on the blocks of a text, in float32; it is loaded and run when it is first asked."""

    def __init__(self, model: EngineModel, blocks: list[torch.Tensor], device: str):
        self.blocks, self.path = [block.long() for block in blocks], model.moe.path
        self._moe, self._config, self._device = model.moe, model.reference, device

    @cached_property
    def model(self) -> PreTrainedModel:
        """What was exported."""
        return self._loaded(self._config)

    @cached_property
    def most_scores(self) -> list[float]:
        """By layer, the largest absolute score of an expert, without bias."""
        most = [0.0] * self._config.num_hidden_layers
        handles = []
        for index, layer in enumerate(self.model.model.layers):

            def keep(gate, _, outputs, index=index):
                scores = outputs[0] - (0 if gate.bias is None else gate.bias)
                most[index] = max(most[index], scores.abs().max().item())

            handles.append(layer.mlp.gate.register_forward_hook(keep))
        for block in progress(self.blocks, "read the text for scores", "block"):
            self.logits(self.model, block)
        for handle in handles:
            handle.remove()
        return most

    @cached_property
    def logprobs(self) -> list[torch.Tensor]:
        """Of all next tokens, for each token of each block but the last, `[N - 1, V]`."""
        return self._logprobs_of(self.model)

    def _logprobs_of(self, model: PreTrainedModel) -> list[torch.Tensor]:
        shown = progress(self.blocks, "read the text as the LlamaMoE", "block")
        return [logprobs(self.logits(model, block)) for block in shown]

    @torch.inference_mode()
    def logits(self, model: PreTrainedModel, block: torch.Tensor) -> torch.Tensor:
        """A model's, float32 `[N, V]`."""
        return model(input_ids=block[None].to(self._device), use_cache=False).logits[0].float().cpu()

    def facts(self) -> dict[str, float]:
        """Perplexity of what was exported, and of the model as it was, where that runs more experts for some tokens."""
        facts = {"reference_perplexity": perplexity(self.logprobs, self.blocks)}
        if self._config.max_routed_experts < self._moe.config.max_routed_experts:
            whole = self._loaded(self._moe.config)
            facts["perplexity_without_bound"] = perplexity(self._logprobs_of(whole), self.blocks)
        return facts

    def _loaded(self, config: LlamaMoEConfig) -> PreTrainedModel:
        with quiet_transformers():
            model = getattr(llama_moe, self._moe.model_class).from_pretrained(
                self._moe.path, config=config, dtype=torch.float32
            )
        return model.to(self._device).eval()


def logprobs(logits: torch.Tensor) -> torch.Tensor:
    """`[N, V]` -> those of the next tokens, `[N - 1, V]`."""
    return F.log_softmax(logits[:-1], dim=-1)


def perplexity(rows: list[torch.Tensor], blocks: list[torch.Tensor]) -> float:
    """Of blocks, by the log-probabilities of their next tokens."""
    losses = [-row.gather(1, block[1:, None]) for row, block in zip(rows, blocks, strict=True)]
    return torch.cat(losses).mean(dtype=torch.float64).exp().item()


def check_stock(reference: Reference, folder: Path) -> dict[str, Any]:
    """A checkpoint of a class of transformers, loaded from its folder and compared in float32."""
    with quiet_transformers():
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
    lacking = loading["missing_keys"] | loading["unexpected_keys"] | {key for key, *_ in loading["mismatched_keys"]}
    if lacking:
        raise MoEficationError(f"transformers does not read what was written ({min(lacking)})")
    model = model.to(reference.model.device).eval()
    rows, differences, equal = [], [], []
    pairs = list(zip(reference.blocks, reference.logprobs, strict=True))
    for block, expected in progress(pairs, "compare the export with the LlamaMoE", "block"):
        logits, own = reference.logits(model, block), reference.logits(reference.model, block)
        rows.append(logprobs(logits))
        differences.append((logits - own).abs().max().item())
        equal.append(rows[-1].argmax(1) == expected.argmax(1))
    return reference.facts() | {
        "perplexity": perplexity(rows, reference.blocks),
        "argmax_agreement": torch.cat(equal).double().mean().item(),
        "max_logit_difference": max(differences),
        "tokens": sum(map(len, equal)),
    }


def check_gguf(reference: Reference, file: Path) -> dict[str, Any]:
    """A GGUF file: what llama.cpp predicts, and how it cuts text."""
    tokenizer = load_tokenizer(reference.path)
    texts = [text for text in provoking_texts(tokenizer) if "\0" not in text]
    question = {"blocks": [block.tolist() for block in reference.blocks], "texts": texts}
    answer = llama_cpp.ask(file, question, torch.get_num_threads())
    found, expected, equal = [], [], []
    for block, rows, best, values in zip(
        reference.blocks, reference.logprobs, answer["best"], answer["logprobs"], strict=True
    ):
        told = [index for index, one in enumerate(best) if one is not None]
        found += [values[index] for index in told]
        expected.append(rows[told].gather(1, block[1:][told][:, None])[:, 0])
        equal += [best[index] == rows[index].argmax().item() for index in told]
    if not equal:
        raise SettingError("text_path has no token that llama.cpp tells of: give a text in Latin letters")
    found, expected = torch.tensor(found, dtype=torch.float64), torch.cat(expected).double()
    cut = [text for text, ids in zip(texts, answer["tokens"], strict=True) if ids != tokenizer(text)["input_ids"]]
    return reference.facts() | {
        "run": True,
        "perplexity": (-found.mean()).exp().item(),
        "reference_perplexity": (-expected.mean()).exp().item(),  # of the tokens that the engine tells of
        "argmax_agreement": sum(equal) / len(equal),
        "max_logprob_difference": (found - expected).abs().max().item(),
        "tokens": len(equal),
        "texts": len(texts),
        "cut_otherwise": cut,
    }


def require_near(checked: dict[str, Any], what: str) -> None:
    """Refuse a result of weights that are not quantised, if it predicts otherwise than the model."""
    ratio = checked["perplexity"] / checked["reference_perplexity"]
    if not 1 / MOST_RATIO <= ratio <= MOST_RATIO:
        raise MoEficationError(
            f"{what} has {ratio:.3f} of the model's perplexity on the text: it computes something else, and is not "
            f"finished; please report this with the model's config.json"
        )
