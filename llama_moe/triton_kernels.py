"""Routed experts on a GPU, in Triton: `experts_implementation="llama_moe_triton"`.

Two ways, by the number of tokens, both without a synchronisation with the host, so that CUDA graphs can hold them:

* Few tokens are bound by the weights they read. One program per used expert and block of its neurons computes all
  tokens at once; one program per block of outputs then sums over the used experts. What no token uses is not read.
* Many tokens are bound by arithmetic. The used token-expert pairs are listed by expert; grouped products gather the
  rows of `hidden_states` as they load them, and leave the outputs of pairs for a kernel that sums those of each token.

Sums are float32 and in a fixed order: the same inputs give the same bits. Axes: T tokens, E routed experts, K slots per
token, H hidden size, W expert width. A *slot* is a place in the flattened `[T, K]` routing.
"""

import torch
from torch import Tensor

try:
    import triton
    from triton import language as tl
    from triton.language import constexpr
except ImportError:  # no checkpoint needs Triton to load
    triton = tl = constexpr = None

INTERPRETS = triton is not None and triton.knobs.runtime.interpret
IN_INTERPRETER = triton and constexpr(INTERPRETS)  # what kernels can read

TRITON_IMPLEMENTATION = "llama_moe_triton"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FEW_TOKENS = 64
TOKENS_PER_CHUNK = 4096
OUTPUT_BYTES = 2**28  # of pairs at a time: columns of the outputs come in chunks, which stay in the L2 cache
FEWEST_COLUMNS = 128
SMALLEST_TILE = 16  # of a matrix product
LIST_BLOCK = 1024


def can_run_on(device: torch.device) -> bool:
    """Whether the kernels run on this device: a GPU, or any where Triton interprets (`TRITON_INTERPRET=1`)."""
    return triton is not None and (device.type == "cuda" or INTERPRETS)


def _tile(num_warps: int, num_stages: int, **sizes: int):
    return triton and triton.Config(sizes, num_warps=num_warps, num_stages=num_stages)


def _kernel(*tiles, key: tuple[str, ...] = ()):
    """A decorator: the compiled kernel; of several tiles the fastest for each `key`, measured once and kept on disk."""

    def compiled(function):
        if triton is None:
            return function
        function = triton.jit(function)
        chosen = tiles[:1] if INTERPRETS else tiles
        return triton.autotune(list(chosen), list(key), cache_results=True)(function) if tiles else function

    return compiled


def run_triton_kernels(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
) -> Tensor:
    """Weighted sum of the SwiGLU experts of the used slots, without gradients: `[T, H]`, `[T, K]`, `[T, K]`, weights
    `[E, 2W, H]` (gate rows first) and `[E, H, W]`, bias `[E, 2W]` -> `[T, H]`.

    Beside the output it holds `[E, T, W]` activations, for at most 4,096 tokens at once: what a dense MLP holds. For
    more than 64 tokens it also holds `OUTPUT_BYTES`, or 128 columns of the slots' outputs if these are more.
    """
    inputs = hidden_states.to(gate_up.dtype).contiguous()  # products know no autocast
    output = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    weights = (gate_up.contiguous(), down.contiguous(), gate_up_bias)
    chunks = zip(*(t.split(TOKENS_PER_CHUNK) for t in (inputs, top_k_index, top_k_weights, output)), strict=True)
    with torch.cuda.device_of(inputs):  # Triton starts its programs on the current GPU, wherever the tensors are
        for x, index, slot_weights, out in chunks:
            run = _few_tokens if len(x) <= FEW_TOKENS else _many_tokens
            if len(x):
                run(x, index.contiguous(), slot_weights.contiguous(), *weights, out)
    return output


def _few_tokens(x, index, slot_weights, gate_up, down, bias, out) -> None:
    num_tokens, num_slots = index.shape
    num_experts, hidden_size, width = down.shape
    by_expert = torch.empty(num_experts, num_tokens, dtype=torch.int32, device=x.device)
    used = torch.empty(num_experts + 2, dtype=torch.int32, device=x.device)  # how many, which, and one to read beyond
    tokens = triton.next_power_of_2(max(num_tokens, SMALLEST_TILE))
    _list_experts[(1,)](
        index, slot_weights, by_expert, used, num_tokens, num_slots, num_experts,
        EXPERTS=triton.next_power_of_2(num_experts), TOKENS=tokens, BLOCK=LIST_BLOCK,
    )  # fmt: skip
    hidden = x.new_empty(num_experts, num_tokens, width)
    _few_gate_up[lambda tile: (num_experts, triton.cdiv(width, tile["ROWS"]))](
        x, gate_up, gate_up if bias is None else bias, slot_weights, by_expert, hidden,
        num_tokens, hidden_size, width, TOKENS=tokens, HAS_BIAS=bias is not None,
    )  # fmt: skip
    _few_down[lambda tile: (triton.cdiv(hidden_size, tile["ROWS"]),)](
        hidden, down, used, out, num_tokens, hidden_size, width, TOKENS=tokens
    )


def _many_tokens(x, index, slot_weights, gate_up, down, bias, out) -> None:
    num_tokens, num_slots = index.shape
    num_experts, hidden_size, width = down.shape
    by_expert = torch.zeros(num_experts, num_tokens, dtype=torch.int32, device=x.device)
    _map_slots[(triton.cdiv(index.numel(), LIST_BLOCK),)](
        index, slot_weights, by_expert, num_tokens, num_slots, num_experts, BLOCK=LIST_BLOCK
    )
    slots = torch.empty_like(by_expert)  # of each expert, those used, in the order of tokens
    counts = torch.empty(num_experts, dtype=torch.int32, device=x.device)
    _list_slots[(num_experts,)](by_expert, slots, counts, num_tokens, BLOCK=LIST_BLOCK)
    hidden = x.new_empty(num_experts, num_tokens, width)

    def grid(columns: int):
        def programs(tile):
            return (num_experts * triton.cdiv(num_tokens, tile["PAIRS"]) * triton.cdiv(columns, tile["ROWS"]),)

        return programs

    size = _size_class(num_tokens)
    _gate_up[grid(width)](
        x, gate_up, gate_up if bias is None else bias, slot_weights, slots, counts, hidden,
        num_tokens, num_slots, hidden_size, width, size, HAS_BIAS=bias is not None,
    )  # fmt: skip
    columns = min(output_columns(index.numel(), x.element_size()), hidden_size)
    outputs = x.new_empty(index.numel(), columns)
    for first in range(0, hidden_size, columns):
        last = min(first + columns, hidden_size)
        _down[grid(last - first)](
            hidden, down, slots, counts, outputs, num_tokens, hidden_size, width, first, last, columns, size
        )
        block = min(LIST_BLOCK, triton.next_power_of_2(last - first))
        _sum_slots[(num_tokens, triton.cdiv(last - first, block))](
            outputs, index, slot_weights, out, num_slots, num_experts, hidden_size, first, last, columns, BLOCK=block
        )


def output_columns(num_slots: int, element_size: int) -> int:
    """Of so many slots' outputs, the columns that are held at a time."""
    return max(OUTPUT_BYTES // (num_slots * element_size) // FEWEST_COLUMNS, 1) * FEWEST_COLUMNS


def _size_class(num_tokens: int) -> int:
    """What tiles are measured for: numbers of tokens within a factor of four."""
    return num_tokens.bit_length() // 2


@_kernel()
def _list_experts(
    index, weights, by_expert, used, num_tokens, num_slots, num_experts,
    EXPERTS: constexpr, TOKENS: constexpr, BLOCK: constexpr,
):  # fmt: skip
    """One program: `by_expert [E, T]`, the slot of each pair plus 1 (0: unused), and which experts some token uses."""
    for start in range(0, num_experts * num_tokens, BLOCK):
        pairs = start + tl.arange(0, BLOCK)
        tl.store(by_expert + pairs, tl.zeros([BLOCK], tl.int32), mask=pairs < num_experts * num_tokens)
    tl.debug_barrier()
    for start in range(0, num_tokens * num_slots, BLOCK):
        slots = start + tl.arange(0, BLOCK)
        _place(index, weights, by_expert, slots, num_tokens, num_slots, num_experts)
    tl.debug_barrier()
    experts, tokens = tl.arange(0, EXPERTS), tl.arange(0, TOKENS)
    inside = (experts < num_experts)[:, None] & (tokens < num_tokens)[None, :]
    placed = tl.load(by_expert + experts[:, None] * num_tokens + tokens[None, :], mask=inside, other=0)
    is_used = (tl.max(placed, axis=1) > 0).to(tl.int32)
    tl.store(used + tl.cumsum(is_used, axis=0), experts, mask=is_used > 0)
    tl.store(used, tl.sum(is_used, axis=0))


@_kernel()
def _place(index, weights, by_expert, slots, num_tokens, num_slots, num_experts):
    """Note slots at their experts. Other processes' experts, of expert parallelism, are `num_experts` and above."""
    inside = slots < num_tokens * num_slots
    expert = tl.load(index + slots, mask=inside, other=num_experts)
    is_used = inside & (expert < num_experts) & (tl.load(weights + slots, mask=inside, other=0.0).to(tl.float32) != 0)
    tl.store(by_expert + expert * num_tokens + slots // num_slots, slots + 1, mask=is_used)


@_kernel()
def _map_slots(index, weights, by_expert, num_tokens, num_slots, num_experts, BLOCK: constexpr):
    """`by_expert` as above, of zeros."""
    slots = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    _place(index, weights, by_expert, slots, num_tokens, num_slots, num_experts)


@_kernel()
def _list_slots(by_expert, slots, counts, num_tokens, BLOCK: constexpr):
    """One program per expert: its used slots side by side, and how many they are."""
    first = tl.program_id(0) * num_tokens
    count = 0
    for start in range(0, num_tokens, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        slot = tl.load(by_expert + first + tokens, mask=tokens < num_tokens, other=0)
        is_used = (slot > 0).to(tl.int32)
        places = count + tl.cumsum(is_used, axis=0) - 1
        tl.store(slots + first + places, slot - 1, mask=is_used > 0)
        count += tl.sum(is_used, axis=0)
    tl.store(counts + tl.program_id(0), count)


@_kernel()
def _dot(left, right, total):
    """`total` plus the product of two tiles, in float32 by three products of parts that tensor cores take."""
    if IN_INTERPRETER:  # the interpreter multiplies the bits of bfloat16, not the numbers
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="tf32x3")


@_kernel()
def _gated(
    x, x_rows, is_row, gate_up, bias, expert, neurons, hidden_size, width, HAS_BIAS: constexpr,
    DEPTH: constexpr,
):  # fmt: skip
    """SiLU(gate) * up of rows of `x` and neurons of an expert, float32; `x_rows` are offsets of rows."""
    is_neuron = neurons < width
    gate_rows = gate_up + expert * 2 * width * hidden_size + neurons.to(tl.int64) * hidden_size
    gate = tl.zeros([x_rows.shape[0], neurons.shape[0]], tl.float32)
    up = tl.zeros([x_rows.shape[0], neurons.shape[0]], tl.float32)
    for start in range(0, hidden_size, DEPTH):
        columns = start + tl.arange(0, DEPTH)
        is_column = columns < hidden_size
        rows = tl.load(x + x_rows[:, None] + columns[None, :], mask=is_row[:, None] & is_column[None, :], other=0.0)
        inside = is_column[:, None] & is_neuron[None, :]
        places = gate_rows[None, :] + columns[:, None]
        gate = _dot(rows, tl.load(places, mask=inside, other=0.0), gate)
        places += width * hidden_size
        up = _dot(rows, tl.load(places, mask=inside, other=0.0), up)
    if HAS_BIAS:
        biases = bias + expert * 2 * width + neurons
        gate += tl.load(biases, mask=is_neuron, other=0.0)[None, :].to(tl.float32)
        up += tl.load(biases + width, mask=is_neuron, other=0.0)[None, :].to(tl.float32)
    return gate * tl.sigmoid(gate) * up


@_kernel(
    _tile(4, 3, ROWS=16, DEPTH=256),
    _tile(4, 4, ROWS=16, DEPTH=128),
    _tile(4, 3, ROWS=32, DEPTH=128),
    _tile(4, 4, ROWS=64, DEPTH=64),
    _tile(4, 4, ROWS=16, DEPTH=64),  # float32 takes twice the room
    key=("TOKENS", "hidden_size", "width"),
)
def _few_gate_up(
    x, gate_up, bias, weights, by_expert, hidden, num_tokens, hidden_size, width,
    TOKENS: constexpr, HAS_BIAS: constexpr, ROWS: constexpr, DEPTH: constexpr,
):  # fmt: skip
    """One program per expert and block of neurons: weighted activations of all tokens, `hidden [E, T, W]`."""
    expert = tl.program_id(0).to(tl.int64)
    tokens = tl.arange(0, TOKENS)
    is_token = tokens < num_tokens
    slots = tl.load(by_expert + expert * num_tokens + tokens, mask=is_token, other=0)
    if tl.max(slots, axis=0) == 0:
        return
    neurons = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    rows = tokens.to(tl.int64) * hidden_size
    active = _gated(x, rows, is_token, gate_up, bias, expert, neurons, hidden_size, width, HAS_BIAS, DEPTH)
    weight = tl.load(weights + slots - 1, mask=slots > 0, other=0.0).to(tl.float32)
    # Unused pairs are zeros, even where their activations overflow.
    active = tl.where(slots[:, None] > 0, active * weight[:, None], 0.0)
    places = hidden + (expert * num_tokens + tokens[:, None]) * width + neurons[None, :]
    tl.store(places, active.to(hidden.dtype.element_ty), mask=is_token[:, None] & (neurons < width)[None, :])


@_kernel(
    _tile(4, 8, ROWS=16, DEPTH=128),
    _tile(4, 4, ROWS=16, DEPTH=128),
    _tile(4, 4, ROWS=16, DEPTH=256),
    _tile(4, 6, ROWS=32, DEPTH=64),
    _tile(2, 8, ROWS=16, DEPTH=64),
    key=("TOKENS", "hidden_size", "width"),
)
def _few_down(
    hidden, down, used, out, num_tokens, hidden_size, width,
    TOKENS: constexpr, ROWS: constexpr, DEPTH: constexpr,
):  # fmt: skip
    """One program per block of outputs: the sum over used experts, for all tokens."""
    tokens, rows = tl.arange(0, TOKENS), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_token, is_row = tokens < num_tokens, rows < hidden_size
    total = tl.zeros([TOKENS, ROWS], tl.float32)
    steps = tl.cdiv(width, DEPTH)
    # One loop over the neurons of all, each expert read a step before its turn: the compiler then keeps the weights of
    # several steps in flight, which it does not if a step reads first which expert is its own.
    expert = tl.load(used + 1).to(tl.int64)
    for step in range(0, tl.load(used) * steps):
        neurons = step % steps * DEPTH + tl.arange(0, DEPTH)
        is_neuron = neurons < width
        places = hidden + (expert * num_tokens + tokens[:, None]) * width + neurons[None, :]
        active = tl.load(places, mask=is_token[:, None] & is_neuron[None, :], other=0.0)
        places = down + (expert * hidden_size + rows[None, :]) * width + neurons[:, None]
        total = _dot(active, tl.load(places, mask=is_neuron[:, None] & is_row[None, :], other=0.0), total)
        expert = tl.load(used + 1 + (step + 1) // steps).to(tl.int64)
    places = out + tokens[:, None].to(tl.int64) * hidden_size + rows[None, :]
    tl.store(places, total.to(out.dtype.element_ty), mask=is_token[:, None] & is_row[None, :])


TILES = (
    _tile(4, 4, PAIRS=64, ROWS=64, DEPTH=64),
    _tile(8, 3, PAIRS=128, ROWS=64, DEPTH=64),
    _tile(8, 3, PAIRS=64, ROWS=128, DEPTH=64),
    _tile(8, 3, PAIRS=128, ROWS=128, DEPTH=64),
    _tile(4, 3, PAIRS=64, ROWS=32, DEPTH=32),  # float32 takes twice the room
)


@_kernel(*TILES, key=("size", "hidden_size", "width"))
def _gate_up(
    x, gate_up, bias, weights, slots, counts, hidden, num_tokens, num_slots, hidden_size, width, size,
    HAS_BIAS: constexpr, PAIRS: constexpr, ROWS: constexpr, DEPTH: constexpr,
):  # fmt: skip
    """One program per block of an expert's pairs and of its neurons: weighted activations, `hidden [E, T, W]`."""
    blocks = tl.cdiv(width, ROWS)
    expert, first = _block_of_pairs(blocks, num_tokens, PAIRS)
    count = tl.load(counts + expert)
    if first >= count:
        return
    pairs = first + tl.arange(0, PAIRS)
    is_pair = pairs < count
    slot = tl.load(slots + expert * num_tokens + pairs, mask=is_pair, other=0)
    neurons = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    rows = (slot // num_slots).to(tl.int64) * hidden_size
    active = _gated(x, rows, is_pair, gate_up, bias, expert, neurons, hidden_size, width, HAS_BIAS, DEPTH)
    active *= tl.load(weights + slot, mask=is_pair, other=0.0)[:, None].to(tl.float32)
    places = hidden + (expert * num_tokens + pairs[:, None]) * width + neurons[None, :]
    tl.store(places, active.to(hidden.dtype.element_ty), mask=is_pair[:, None] & (neurons < width)[None, :])


@_kernel()
def _block_of_pairs(blocks, num_tokens, PAIRS: constexpr):
    """Expert and first pair of a program. Programs side by side share an expert's pairs, then its weights."""
    block = tl.program_id(0) // blocks
    per_expert = tl.cdiv(num_tokens, PAIRS)
    return (block // per_expert).to(tl.int64), block % per_expert * PAIRS


@_kernel(*TILES, key=("size", "hidden_size", "width"))
def _down(
    hidden, down, slots, counts, outputs, num_tokens, hidden_size, width, first_row, last_row, columns, size,
    PAIRS: constexpr, ROWS: constexpr, DEPTH: constexpr,
):  # fmt: skip
    """One program per block of an expert's pairs and of outputs, of those from `first_row` to `last_row`: each pair's
    output at its slot, `outputs [T * K, columns]`."""
    blocks = tl.cdiv(last_row - first_row, ROWS)
    expert, first = _block_of_pairs(blocks, num_tokens, PAIRS)
    count = tl.load(counts + expert)
    if first >= count:
        return
    pairs = first + tl.arange(0, PAIRS)
    is_pair = pairs < count
    rows = first_row + tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    is_row = rows < last_row
    active_rows = hidden + (expert * num_tokens + pairs) * width
    down_rows = down + (expert * hidden_size + rows) * width
    total = tl.zeros([PAIRS, ROWS], tl.float32)
    for start in range(0, width, DEPTH):
        neurons = start + tl.arange(0, DEPTH)
        is_neuron = neurons < width
        active = tl.load(active_rows[:, None] + neurons[None, :], mask=is_pair[:, None] & is_neuron[None, :], other=0.0)
        weights = tl.load(down_rows[None, :] + neurons[:, None], mask=is_neuron[:, None] & is_row[None, :], other=0.0)
        total = _dot(active, weights, total)
    slot = tl.load(slots + expert * num_tokens + pairs, mask=is_pair, other=0).to(tl.int64)
    places = outputs + slot[:, None] * columns + (rows - first_row)[None, :]
    tl.store(places, total.to(outputs.dtype.element_ty), mask=is_pair[:, None] & is_row[None, :])


@_kernel()
def _sum_slots(
    outputs, index, weights, out, num_slots, num_experts, hidden_size, first_row, last_row, columns,
    BLOCK: constexpr,
):  # fmt: skip
    """One program per token and block of outputs: the sum over the token's used slots."""
    token = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = first_row + places < last_row
    total = tl.zeros([BLOCK], tl.float32)
    for slot in range(0, num_slots):
        is_used = tl.load(weights + token * num_slots + slot).to(tl.float32) != 0
        if is_used & (tl.load(index + token * num_slots + slot) < num_experts):
            row = outputs + (token * num_slots + slot) * columns
            total += tl.load(row + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * hidden_size + first_row + places, total.to(out.dtype.element_ty), mask=inside)
