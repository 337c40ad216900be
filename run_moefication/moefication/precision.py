"""How exactly float32 products are computed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn import functional as F


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Float32 products whose factors may be rounded to bfloat16, and whose sums are float32.

    On CPUs with AMX products take a third of the time, with AVX512-BF16 alone those of `linear` half; GPUs use TF32.
    Rounding errors of 2^-9 average out in sums over tokens or channels. Also a decorator.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def product_dtype(device: str | torch.device) -> torch.dtype:
    """The dtype to keep weights for `linear` in: bfloat16 within `bfloat16_products` on CPUs with units for it, unless
    oneDNN's instruction set is capped; else float32."""
    rounds = torch.get_float32_matmul_precision() == "medium" and "ONEDNN_MAX_CPU_ISA" not in os.environ
    on_units = torch.device(device).type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if rounds and on_units else torch.float32


def linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear` of factors in the weight's dtype, float32 `[..., out]`, rounded to that dtype before the bias."""
    output = F.linear(inputs.to(weight.dtype), weight).float()
    return output if bias is None else output + bias
