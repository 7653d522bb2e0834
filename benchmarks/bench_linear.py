"""The four products of a ViT-B block with their frozen weights, which autocast casts anew at every use."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.measure import CASES, DEVICE, time_operation
from insvp_fast import ops

SHAPES = {"qkv": (768, 2304), "proj": (768, 768), "fc1": (768, 3072), "fc2": (3072, 768)}


@CASES
@pytest.mark.parametrize("product", SHAPES)
def bench_linear(benchmark, tiny, product, implementation, direction, precision):
    if DEVICE.type == "cpu" and implementation.endswith("compiled"):
        pytest.skip("a single product gains nothing from it")
    D_in, D_out = SHAPES[product]
    M = 7 if tiny else (2 if DEVICE.type == "cpu" else 256) * 197

    def make(dtype):
        x = torch.randn(M, D_in, device=DEVICE).to(dtype).requires_grad_()
        return x, weight, bias

    weight, bias = torch.randn(D_out, D_in, device=DEVICE) / D_in**0.5, torch.randn(D_out, device=DEVICE)
    times = 1 if direction == "forward" else 2
    time_operation(
        benchmark,
        implementation,
        direction,
        precision,
        name=f"linear {product} {M}x{D_in}x{D_out}",
        plain=lambda x, weight, bias: F.linear(x, weight.to(x.dtype), bias.to(x.dtype)),
        fast=lambda x, weight, bias: ops.linear(x, ops.FrozenLinear(weight, bias)),
        make=make,
        flops=times * 2 * M * D_in * D_out,
    )
