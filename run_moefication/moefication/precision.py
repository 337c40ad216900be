"""How exactly float32 products are computed."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def bfloat16_products() -> Iterator[None]:
    """Float32 products whose factors may be rounded to bfloat16, and whose sums are float32.

    On CPUs with units for that (AMX, AVX512-BF16) products take a third of the time; GPUs use TF32. Rounding errors of
    the factors, 2^-9 each, average out in sums over tokens or channels. Also a decorator.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
