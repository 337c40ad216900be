"""The fast ways to run routed experts: `experts_implementation="llama_moe"`, the default, and `"llama_moe_triton"`.

Each gives what the loop in `Experts.forward` gives, and names the gain that earns it its place: how many times as fast
as another kernel it runs one layer, on one core of a Xeon with AVX-512 (torch 2.13) or on an H200.

Axes: T tokens, E routed experts, K slots per token (the experts it may run), H hidden size, W expert width (neurons per
expert), P token-expert pairs that are used.
"""

import re
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.moe import ExpertsInterface

from .triton_kernels import DTYPES, TRITON_IMPLEMENTATION, can_run_on, run_triton_kernels

# Where one kernel, or one order of its products, becomes faster than another.
FINE_WIDTH = 16  # neurons
SMALL_LAYER_BYTES = 2**24  # such a layer stays in caches, so calls cost more than arithmetic
FEWEST_TOKENS, VERY_FEW_TOKENS, FEW_TOKENS = 8, 24, 128
FEW_PAIRS = 1024
TOKENS_PER_CHUNK = 512
MOST_GROUPED_TOKENS = 4096  # whose pairs are held at once, 8 bytes for each value of their outputs
MANY_EXPERTS = 8  # of one token: fewer are as fast one by one, with each product in parallel
LONG_ROW = 256  # neurons: in 16 bits, products of shorter rows are slow
# PyTorch's own name for what `_products` calls, which has no gradients, is not one that it promises to keep.
CAN_CHOOSE_ROWS = hasattr(torch.ops.aten, "_embedding_bag_per_sample_weights_backward")


class PackedExperts(NamedTuple):
    """The tensors of an `Experts` module, each read from it once: adapters compute them anew at every access."""

    gate_up: Tensor  # [E, 2W, H], gate rows first
    down: Tensor  # [E, H, W]
    gate_up_bias: Tensor | None  # [E, 2W]
    act_fn: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, experts: nn.Module) -> "PackedExperts":
        """Those of this module."""
        return cls(experts.gate_up_proj, experts.down_proj, experts.gate_up_proj_bias, experts.act_fn)

    @property
    def can_be_grouped(self) -> bool:
        """Whether grouped products take the weights: these know no float64, and want strides of whole 16 bytes."""
        return self.gate_up.dtype in DTYPES and all(
            n * w.element_size() % 16 == 0 for w in (self.gate_up, self.down) for n in w.shape[1:]
        )

    def run_one(self, expert: int, hidden_states: Tensor, weights: Tensor) -> Tensor:
        """Weighted output of one expert: `[T, H]`, weights `[T, 1]` -> `[T, H]`."""
        bias = None if self.gate_up_bias is None else self.gate_up_bias[expert]
        hidden = self.gated(F.linear(hidden_states, self.gate_up[expert], bias)) * weights
        return F.linear(hidden, self.down[expert])

    def gated(self, gate_up: Tensor) -> Tensor:
        """Products with `gate_up`, `[..., 2W]` -> activations `[..., W]`."""
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up


Kernel = Callable[[PackedExperts, Tensor, Tensor, Tensor], Tensor]


def run_experts(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """`Experts.forward`, by the kernel for this device, type and size."""
    packed = PackedExperts.of(experts)
    kernel = choose_kernel(packed, hidden_states, top_k_weights, experts.config.routing)
    if kernel is None:
        return EXPERTS_FUNCTIONS["grouped_mm"](experts, hidden_states, top_k_index, top_k_weights)
    return kernel(packed, hidden_states, top_k_index, top_k_weights)


def run_in_triton(experts: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """`Experts.forward` by `triton_kernels`; by the default's kernels where these do not run: without Triton or a GPU,
    for quantised weights, for another activation than SiLU, and in compiled training."""
    packed = PackedExperts.of(experts)
    tensors = (hidden_states, top_k_index, top_k_weights, packed.gate_up, packed.down, packed.gate_up_bias)
    is_plain = packed.gate_up.dtype in DTYPES and type(packed.gate_up) in (Tensor, nn.Parameter)
    can_run = can_run_on(hidden_states.device) and is_plain and experts.config.hidden_act == "silu"
    has_gradients = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if not can_run or (has_gradients and torch.compiler.is_compiling()):
        return run_experts(experts, hidden_states, top_k_index, top_k_weights)
    if torch.compiler.is_compiling():
        return triton_experts(*tensors)
    return TritonExperts.apply(*tensors) if has_gradients else run_triton_kernels(*tensors)


# An interface of our own: another copy of this code, which some checkpoint carries, registers its own "llama_moe".
EXPERTS_FUNCTIONS = ExpertsInterface()
IMPLEMENTATION = "llama_moe"
EXPERTS_FUNCTIONS[IMPLEMENTATION] = run_experts
EXPERTS_FUNCTIONS[TRITON_IMPLEMENTATION] = run_in_triton


def choose_kernel(packed: PackedExperts, hidden_states: Tensor, top_k_weights: Tensor, routing: str) -> Kernel | None:
    """The kernel to run, or None for transformers' grouped_mm."""
    device = hidden_states.device
    if torch.compiler.is_compiling():
        # A graph cannot choose by value, and grouped_mm computes unused slots: with threshold routing, most of them.
        return None if routing == "top_k" and packed.can_be_grouped else masked_dense
    if type(packed.gate_up).__module__.startswith("torchao."):
        return one_by_one  # quantised weights give the matrix of an expert, and multiply by it, but little else
    if device.type == "cpu":
        return _choose_on_cpu(packed, hidden_states, top_k_weights)
    if device.type == "cuda":
        return _choose_on_gpu(packed, len(hidden_states), torch.cuda.get_device_capability(device), routing)
    return masked_dense


def _choose_on_gpu(packed: PackedExperts, num_tokens: int, capability: tuple[int, int], routing: str) -> Kernel | None:
    measured = FASTEST_ON_GPUS.get(capability, FASTEST_ON_GPUS[9, 0])
    kernel = next(kernel for most_tokens, kernel in measured if num_tokens <= most_tokens)
    if kernel is grouped and not (capability >= (8, 0) and packed.can_be_grouped):
        return masked_dense  # PyTorch has no grouped products there
    return None if kernel is grouped and routing == "top_k" else kernel


def _choose_on_cpu(packed: PackedExperts, hidden_states: Tensor, top_k_weights: Tensor) -> Kernel:
    num_tokens, in_bfloat16 = len(hidden_states), hidden_states.dtype == torch.bfloat16
    is_small = packed.gate_up.nbytes + packed.down.nbytes <= SMALL_LAYER_BYTES
    if packed.down.shape[-1] < FINE_WIDTH or (is_small and in_bfloat16 and num_tokens < VERY_FEW_TOKENS):
        return masked_dense
    if num_tokens == 1 and not torch.is_grad_enabled():  # `one_by_one` gives unused experts gradients of zero
        return one_token
    # torch 2.10 wants aligned addresses, too, which weights mapped from a file may not have.
    can_group = packed.can_be_grouped and packed.gate_up.data_ptr() % 16 == packed.down.data_ptr() % 16 == 0
    if can_group and (is_small or in_bfloat16) and top_k_weights.count_nonzero() <= FEW_PAIRS:
        return grouped
    return one_by_one


def one_by_one(packed: PackedExperts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Expert by expert. The pairs are sorted once, where the reference searches all slots for each expert. Gain: 3.7
    times `masked_dense` at 16 experts of 688 neurons, 512 tokens and 25 % active."""
    tokens, weights, experts = _used_pairs(top_k_index, top_k_weights)
    sizes = experts.bincount(minlength=len(packed.down)).tolist()
    output = torch.zeros_like(hidden_states)
    runs = zip(tokens.split(sizes), weights.split(sizes), strict=True)
    for expert, (rows, row_weights) in enumerate(runs):
        # If no expert runs, multiply empty matrices: every parameter gets a zero gradient instead of None.
        if len(rows) or not len(tokens):
            inputs = hidden_states.index_select(0, rows)
            output.index_add_(0, rows, packed.run_one(expert, inputs, row_weights).to(output.dtype))
    return output


def one_token(packed: PackedExperts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The used experts of one token, `hidden_states [1, H]`, without sorting and gathering. Gain: 1.2 to 1.4 times
    `grouped` for SmolLM2's layer with 16 experts in float32.

    Many experts run in three parallel regions together, for at each a thread whose core is busy keeps the others
    waiting. Gain over one by one, for 16 of the 64 experts of LLaMA-7B's layer in float32: 1.2, by a busy core 2.3.
    """
    slots = top_k_weights[0].nonzero()[:, 0]
    experts = top_k_index[0, slots]
    is_slow = packed.down.element_size() == 2 and packed.down.shape[-1] < LONG_ROW
    if len(experts) < MANY_EXPERTS or is_slow or not CAN_CHOOSE_ROWS or torch.is_grad_enabled():
        output = torch.zeros_like(hidden_states)
        for slot, expert in zip(slots.tolist(), experts.tolist(), strict=True):
            output = output + packed.run_one(expert, hidden_states, top_k_weights[:, slot, None]).to(output.dtype)
        return output
    hidden = _products(packed.gate_up, experts, hidden_states.expand(len(experts), -1))  # [P, 2W]
    if packed.gate_up_bias is not None:
        hidden = hidden + packed.gate_up_bias[experts]
    hidden = (packed.gated(hidden) * top_k_weights[0, slots, None]).to(packed.down.dtype)
    outputs = _products(packed.down, experts, hidden)  # [P, H]
    return (outputs.new_ones(1, len(experts)) @ outputs).to(hidden_states.dtype)


def _products(matrices: Tensor, experts: Tensor, vectors: Tensor) -> Tensor:
    """The matrix of each chosen expert, of `matrices [E, rows, n]`, times its vector, in one parallel region: `[P]`,
    `[P, n]` -> `[P, rows]`. No other operation of PyTorch multiplies rows chosen by index without copying them."""
    num_rows = matrices.shape[1]
    rows = (experts[:, None] * num_rows + torch.arange(num_rows)).flatten()
    owners = torch.arange(len(experts)).repeat_interleave(num_rows)
    products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        vectors.to(matrices.dtype), matrices.flatten(0, 1), rows, owners, owners, 0
    )
    return products.view(len(experts), num_rows)


def masked_dense(packed: PackedExperts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """All experts as one MLP, in which a weight of 0 silences an expert; graphs with threshold routing need it. Gain:
    1.6 to 6 times `one_by_one` for SmolLM2's layer with 256 experts in float32; 2.4 to 3.6 times `grouped` for one
    token on an H200."""
    num_experts, _, width = packed.down.shape
    # One column more for the slots that expert parallelism marks as another process's.
    weights = hidden_states.new_zeros(hidden_states.shape[0], num_experts + 1)
    weights = weights.scatter(-1, top_k_index, top_k_weights.to(weights.dtype))[:, :-1]
    in_graph = torch.compiler.is_compiling()  # a graph is for any number of tokens
    if not in_graph and len(hidden_states) < VERY_FEW_TOKENS:
        hidden = _masked_activations(packed, hidden_states, weights)
        if width >= FINE_WIDTH and len(hidden) < FEWEST_TOKENS:
            return torch.bmm(hidden.transpose(0, 1), packed.down.transpose(1, 2)).sum(0)
        return torch.bmm(packed.down, hidden.permute(1, 2, 0)).sum(0).t()
    # This copy costs 5 % of the time at 512 tokens. One product can only sum over neurons that lie side by side, and a
    # product for each expert writes E outputs, which costs more.
    down = packed.down.transpose(0, 1).flatten(1)  # [H, E * W]
    if in_graph or hidden_states.device.type != "cpu":
        return F.linear(_masked_activations(packed, hidden_states, weights).flatten(1), down)
    # The activations of a chunk stay in caches (1.3x at 8,192 tokens).
    chunks = zip(hidden_states.split(TOKENS_PER_CHUNK), weights.split(TOKENS_PER_CHUNK), strict=True)
    return torch.cat([F.linear(_masked_activations(packed, *chunk).flatten(1), down) for chunk in chunks])


def _masked_activations(packed: PackedExperts, hidden_states: Tensor, weights: Tensor) -> Tensor:
    """`[T, H]`, weights `[T, E]` -> weighted activations of all experts `[T, E, W]`."""
    gate_up = packed.gate_up.flatten(0, 1)
    on_cpu = hidden_states.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and len(hidden_states) >= FEWEST_TOKENS:
        # With tokens last in memory, each expert's gate and up rows are whole runs, which vectorise (1.2x), and so do
        # the weights (1.1x).
        hidden = (gate_up @ hidden_states.t()).t()
        weights = weights.t().contiguous().t()
    else:
        hidden = F.linear(hidden_states, gate_up)
    hidden = hidden.unflatten(-1, (len(packed.down), -1))
    if packed.gate_up_bias is not None:
        hidden = hidden + packed.gate_up_bias
    return packed.gated(hidden) * weights[..., None]


def grouped(packed: PackedExperts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """All used pairs in one grouped product. Gain: 1.1 to 1.3 times `one_by_one` for up to 64 tokens of SmolLM2's layer
    with 16 experts, 1.3 to 4 times for 512 tokens on an H200."""
    slots = (hidden_states, top_k_index, top_k_weights)
    if len(hidden_states) > MOST_GROUPED_TOKENS:
        chunks = zip(*(t.split(MOST_GROUPED_TOKENS) for t in slots), strict=True)
        return torch.cat([grouped(packed, *chunk) for chunk in chunks])
    tokens, weights, experts = _used_pairs(top_k_index, top_k_weights)
    ends = torch.searchsorted(experts, torch.arange(len(packed.down), device=experts.device), right=True)
    ends = ends.to(torch.int32)
    rows = hidden_states.index_select(0, tokens).to(packed.gate_up.dtype)  # grouped_mm knows no autocast
    hidden = F.grouped_mm(rows, packed.gate_up.transpose(1, 2), offs=ends)
    if packed.gate_up_bias is not None:
        hidden = hidden + packed.gate_up_bias[experts]
    hidden = (packed.gated(hidden) * weights).to(rows.dtype)
    outputs = F.grouped_mm(hidden, packed.down.transpose(1, 2), offs=ends)
    sums = torch.zeros_like(hidden_states, dtype=torch.float32)
    return sums.index_add_(0, tokens, outputs.float()).to(hidden_states.dtype)


def _used_pairs(index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Slots `[T, K]` -> the used pairs sorted by expert: tokens `[P]`, weights `[P, 1]`, experts `[P]`."""
    used = weights.flatten().nonzero().squeeze(-1)
    experts, order = index.flatten()[used].sort(stable=True)
    pairs = used[order]
    return pairs // index.shape[-1], weights.flatten()[pairs, None], experts


# By compute capability: up to how many tokens which kernel was measured to be the fastest. GPUs that nobody measured
# do as an H200 does. No GPU has measured `triton_kernels`; where one finds them faster, they go in here.
FASTEST_ON_GPUS = {(9, 0): ((FEW_TOKENS, masked_dense), (sys.maxsize, grouped))}


class TritonExperts(torch.autograd.Function):
    """`run_triton_kernels`. Its gradients are those of the default's kernel, which computes the layer again."""

    @staticmethod
    def forward(ctx, *inputs: Tensor | None) -> Tensor:
        """The arguments of `run_triton_kernels`."""
        ctx.save_for_backward(*inputs)
        return run_triton_kernels(*inputs)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """A gradient for each input that needs one."""
        needed = ctx.needs_input_grad
        saved = zip(ctx.saved_tensors, needed, strict=True)
        copies = [t.detach().requires_grad_(n) if t is not None else None for t, n in saved]
        hidden_states, index, weights, *matrices = copies
        packed = PackedExperts(*matrices, F.silu)
        with torch.enable_grad():
            # For "threshold" it is a kernel of ours: for "top_k" it may be transformers' own, which wants the module.
            kernel = choose_kernel(packed, hidden_states, weights, "threshold")
            output = kernel(packed, hidden_states, index, weights)
        gradients = iter(torch.autograd.grad(output, [t for t, n in zip(copies, needed, strict=True) if n], gradient))
        return tuple(next(gradients) if n else None for n in needed)


# For graphs: an operator that they do not look into, without gradients. Its name is this copy's of the code alone.
triton_experts = torch.library.custom_op(
    re.sub(r"\W", "_", __name__) + "::triton_experts", run_triton_kernels, mutates_args=()
)


@triton_experts.register_fake
def _(hidden_states: Tensor, *_) -> Tensor:
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
