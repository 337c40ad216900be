"""Products with factors in bfloat16."""

import os
import subprocess
import sys

import pytest
import torch

from run_moefication.moefication.precision import bfloat16_products

# In a process of its own, since the tests' own processes do without the CPU's units for bfloat16.
PRODUCT = """
import torch
from run_moefication.moefication.precision import bfloat16_products, linear, product_dtype
a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
with bfloat16_products():
    products = torch.stack([a @ b, linear(a, b.T.to(product_dtype("cpu")))])
print(*((products - a.double() @ b.double()).abs() / (a.abs() @ b.abs())).amax((1, 2)).tolist())
"""


def test_the_precision_is_as_before_even_after_an_error():
    before = torch.get_float32_matmul_precision()

    @bfloat16_products()
    def fail() -> None:
        raise ValueError(torch.get_float32_matmul_precision())

    with pytest.raises(ValueError, match="medium"):
        fail()
    assert torch.get_float32_matmul_precision() == before


def test_products_differ_by_no_more_than_the_rounding_of_their_factors():
    environment = {name: value for name, value in os.environ.items() if name != "ONEDNN_MAX_CPU_ISA"}
    run = subprocess.run([sys.executable, "-c", PRODUCT], capture_output=True, text=True, env=environment, check=True)
    product, of_linear = map(float, run.stdout.split())
    assert product < 2**-8  # two factors, half a unit of 2^-8 each
    assert of_linear < 3 * 2**-9  # and the result
