"""The last part of calibration: a few parameters of all layers, fitted together to the dense model's predictions.

They are the norms, the output biases, and a factor for each routed expert, which its part of `down_proj` takes up; all
matrices stay as the layers' fits left them. Routing is the true one, and thresholds follow. (A bias fitted to logits is
worth far more than one fitted layer by layer: SPON, arXiv 2512.12744. A scale for each unit: GRASPrune, ACL 2026.) The
text is what the layers were not fitted to: there their errors are as large as on any other.

Axes: T tokens of a batch, E routed experts, H hidden size.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from itertools import accumulate

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recomputed
from transformers import get_cosine_schedule_with_warmup

from llama_moe import LlamaMoEConfig

from ..checkpoints.dense import DenseCheckpoint
from ..fitting.losses import TeacherKL
from ..layers.decoder import PreMLP, embed
from ..layers.mlp import MoEMLP
from ..layers.thresholds import THRESHOLD_STEP, settle_layer, wanted_threshold
from ..precision import product_dtype
from ..progress import progress
from ..text.batches import Batch, batches_of

# Of Adam, at the top of its cosine, by the root mean square of each parameter.
LEARNING_RATE = 0.003
BIAS_RATE = 3.0  # times that, for output biases
BETAS = (0.9, 0.99)
WARMUP = 0.05  # share of the steps
PASSES = 2  # over the blocks
MOST_STEP_TOKENS = 512  # of longer blocks there are too few steps
# The model, and what the dense one predicts, are kept in memory up to this size each; else they are made at each use.
MOST_KEPT_BYTES = 2 << 30
MEASURED_EVERY_NTH_BLOCK = 8  # is not fitted to: there the divergence is measured
FINAL_NORM = "norm.weight"
FACTORS = "layers.{}.mlp.factors"  # `[E]`

Tensors = Callable[[str], torch.Tensor]


def _most_kept_bytes(device: str) -> int:
    """Up to which size a model is kept whole. To a GPU, weights would travel again at every step."""
    if torch.device(device).type != "cuda":
        return MOST_KEPT_BYTES
    torch.cuda.empty_cache()  # what PyTorch keeps for later counts as used
    return torch.cuda.mem_get_info(device)[0] // 2


class WholeModel:
    """All layers of an MoE, in float32, `tensor(name)` giving its tensors; routed experts count by a factor each.

    Memory: the whole model, if it has at most MOST_KEPT_BYTES or fits into half of a GPU's free memory, or else a layer
    at a time, which is made anew whenever it is needed.
    """

    def __init__(self, config: LlamaMoEConfig, tensor: Tensors, device: str, factors: Mapping[str, torch.Tensor]):
        self.config, self._tensor, self._device, self._factors = config, tensor, device, factors
        layer_size = config.hidden_size * (3 * config.intermediate_size + 4 * config.hidden_size)
        self._is_kept = 4 * layer_size * config.num_hidden_layers <= _most_kept_bytes(device)
        self._kept: dict[int, tuple[PreMLP, MoEMLP]] = {}
        self.thresholds: dict[int, torch.Tensor] = {}  # that have moved, by layer, `[1]` each
        self.wanted: dict[int, torch.Tensor] = {}  # by layer, `[1]`: what the last text would have had

    def _layer(self, layer: int) -> tuple[PreMLP, MoEMLP]:
        if not self._is_kept:
            return self._load(layer)
        if layer not in self._kept:
            self._kept[layer] = self._load(layer)
        return self._kept[layer]

    def _load(self, layer: int) -> tuple[PreMLP, MoEMLP]:
        """A layer whose small parameters, if they have gradients, are those that `tensor` gives themselves."""
        name = f"layers.{layer}."
        half = PreMLP(self.config, lambda inner: self._tensor(name + inner), self._device)
        mlp = MoEMLP(self.config, layer, lambda inner: self._tensor(f"{name}mlp.{inner}"), self._device)
        mlp.down = mlp.down.to(product_dtype(self._device))  # once, not at each use
        return half, mlp

    def share(self, layer: int) -> float:
        """Of its routed experts that a layer runs per token, on average."""
        return self.config.experts_per_tok_of(layer) / self.config.num_experts

    def states(self, blocks: list[torch.Tensor]) -> torch.Tensor:
        """What leaves the last layer on these blocks, `[T, H]`, with gradients for the small parameters."""
        (batch,) = batches_of(blocks, len(blocks))
        stream = torch.empty(sum(map(len, blocks)), self.config.hidden_size)
        embed(stream, blocks, [batch], self._tensor("embed_tokens.weight"))
        stream = stream.to(self._device)
        for layer in range(self.config.num_hidden_layers):
            run = partial(self._run, layer, batch)
            stream = run(stream) if self._is_kept else recomputed(run, stream, use_reentrant=False)
        return stream

    def _run(self, layer: int, batch: Batch, stream: torch.Tensor) -> torch.Tensor:
        half, mlp = self._layer(layer)
        stream, inputs = half(stream, batch)
        return stream + self._output(layer, mlp, inputs)

    def _output(self, layer: int, mlp: MoEMLP, inputs: torch.Tensor) -> torch.Tensor:
        """Of a layer's MoE block, from its inputs, `[T, H]` each; while training, its wanted threshold is noted."""
        gate, trains = mlp.gate, torch.is_grad_enabled()
        with torch.no_grad():
            scores = gate.score(inputs)
            if gate.routing == "threshold":
                gate.threshold = self.thresholds.setdefault(layer, gate.threshold)
                if trains:
                    self.wanted[layer] = wanted_threshold(gate, scores, self.share(layer))[None]
            runs = gate.mask(scores)
        factors = self._factors.get(FACTORS.format(layer))
        return mlp.output(mlp.activations(inputs) * mlp.by_neuron(runs if factors is None else runs * factors))

    def move_thresholds(self) -> None:
        """Towards those that the last text would have had; thresholds that run all or none stay."""
        for layer, wanted in self.wanted.items():
            if 0 < self.share(layer) < 1:
                self.thresholds[layer].lerp_(wanted, THRESHOLD_STEP)

    @torch.no_grad()
    def routed(self, blocks: list[torch.Tensor], batch_size: int) -> dict[str, torch.Tensor]:
        """Set every threshold by a text, on what the layers before it, already set, produce. Returns the tensors of the
        gates that this changes. Memory: the text's residual stream, and its scores of a layer."""
        batches, tensors = batches_of(blocks, batch_size), {}
        stream = torch.empty(sum(map(len, blocks)), self.config.hidden_size)
        embed(stream, blocks, batches, self._tensor("embed_tokens.weight"))
        for layer in progress(range(self.config.num_hidden_layers), "set thresholds", "layer"):
            half, mlp = self._layer(layer)
            output = partial(self._output, layer, mlp)
            settle_layer(half, mlp.gate, output, stream, batches, self.share(layer), self._device)
            state = {name: mlp.gate.get_buffer(name).cpu() for name, _ in mlp.gate.named_buffers()}
            tensors |= {f"layers.{layer}.mlp.gate.{name}": tensor for name, tensor in state.items()}
        return tensors


def fit_to_logits(
    checkpoint: DenseCheckpoint,
    config: LlamaMoEConfig,
    tensor: Tensors,
    blocks: list[torch.Tensor],
    dense_states: torch.Tensor,
    other_blocks: list[torch.Tensor],
    *,
    batch_size: int,
    device: str,
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Fit the small parameters, a block a step, and set the thresholds anew.

    Args:
        tensor: gives the MoE's tensors as the layers' fits left them, by name.
        blocks: of tokens; every eighth is measured on, the others are fitted to.
        dense_states: what leaves the dense model's last layer on these blocks, float32 `[tokens, H]`.
        other_blocks: text that these parameters are not fitted to, which thresholds are set on: their own asks for
            fewer experts than any other text does.

    Returns: the tensors with new values, in their dtypes, and `FACTORS`, for `with_factors`; and the divergence from
    the dense model before and after, in nats a token. Where it does not fall, no tensor is new.
    """
    layers, shape = range(config.num_hidden_layers), [config.hidden_size]
    names = [f"layers.{i}.{norm}_layernorm.weight" for i in layers for norm in ("input", "post_attention")]
    names += [f"layers.{i}.mlp.output_bias" for i in layers if config.output_bias or config.mlp_bias] + [FINAL_NORM]
    small = {name: nn.Parameter(tensor(name).to(device, torch.float32, copy=True)) for name in names}
    factors = {FACTORS.format(i): nn.Parameter(torch.ones(config.num_experts, device=device)) for i in layers}
    head = checkpoint.finite_tensor(checkpoint.lm_head).to(device, product_dtype(device))
    dense_norm = checkpoint.finite_tensor(FINAL_NORM).to(device, torch.float32)
    ends = list(accumulate(map(len, blocks)))
    # Spread over the text, since the domains take turns in it.
    to_measure = [*range(len(blocks))][MEASURED_EVERY_NTH_BLOCK - 1 :: MEASURED_EVERY_NTH_BLOCK] or [len(blocks) - 1]
    to_fit = [index for index in range(len(blocks)) if index not in to_measure]

    def teacher_of(index: int) -> TeacherKL:
        dense = dense_states[ends[index] - len(blocks[index]) : ends[index]].to(device)
        return TeacherKL(F.rms_norm(dense, shape, dense_norm, config.rms_norm_eps), head)

    teacher = cache(teacher_of) if dense_states.nbytes <= MOST_KEPT_BYTES else teacher_of

    def divergence(model: WholeModel, index: int, norm: torch.Tensor) -> torch.Tensor:
        return teacher(index)(F.rms_norm(model.states([blocks[index]]), shape, norm, config.rms_norm_eps))

    @torch.no_grad()
    def measured(model: WholeModel, norm: torch.Tensor) -> float:
        parts = [divergence(model, index, norm) for index in progress(to_measure, "measure the divergence", "block")]
        return torch.cat(parts).mean(dtype=torch.float64).item()

    model = WholeModel(config, lambda name: small[name] if name in small else tensor(name), device, factors)
    before = measured(model, small[FINAL_NORM])
    if not to_fit:
        return {}, {"divergence_before": before, "divergence_after": before}
    losses = (divergence(model, index, small[FINAL_NORM]).mean() for index in to_fit * PASSES)
    _train(small | factors, losses, PASSES * len(to_fit), model)
    found = {name: p.detach().to(tensor(name).dtype).cpu() for name, p in small.items()}
    found |= {name: p.detach().cpu() for name, p in factors.items()}
    if not all(values.isfinite().all() for values in found.values()):
        return {}, {"divergence_before": before, "divergence_after": before}
    del model  # before the next one asks how much memory there is
    model = WholeModel(config, partial(with_factors, found, tensor), device, {})
    found |= model.routed(other_blocks, batch_size)
    after = measured(model, found[FINAL_NORM].to(device, torch.float32))
    metrics = {"divergence_before": before, "divergence_after": min(before, after)}
    return found if after < before else {}, metrics


def _train(
    parameters: Mapping[str, nn.Parameter], losses: Iterator[torch.Tensor], num_steps: int, model: WholeModel
) -> None:
    """Minimise the losses, a step each, every parameter at a rate of its own size, while thresholds follow."""
    rates = {name: LEARNING_RATE * (BIAS_RATE if "bias" in name else 1) for name in parameters}
    groups = [dict(params=[p], lr=rates[name] * p.detach().square().mean().sqrt()) for name, p in parameters.items()]
    optimizer = torch.optim.Adam(groups, betas=BETAS)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(WARMUP * num_steps), num_steps)
    for _ in progress(range(num_steps), "fit all layers", "step"):
        optimizer.zero_grad()
        next(losses).backward()
        optimizer.step()
        schedule.step()
        model.move_thresholds()


def with_factors(found: Mapping[str, torch.Tensor], tensor: Tensors, name: str) -> torch.Tensor:
    """A tensor of the fitted model: `found` is what `fit_to_logits` returned, `tensor` was its argument."""
    if name in found:
        return found[name]
    values, factors = tensor(name), found.get(name.replace("experts.down_proj", "factors"))
    return values if factors is None else (values.float() * factors[:, None, None]).to(values.dtype)
