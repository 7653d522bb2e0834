"""linear: the four products of a ViT-B block with their frozen weights, which autocast casts at every use."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.operations import Operation, each_case, time_operation
from insvp_fast import ops
from insvp_fast.testing import DEVICE

PRODUCTS = {"qkv": (768, 2304), "proj": (768, 768), "fc1": (768, 3072), "fc2": (3072, 768)}


def plain(x, weight, bias):
    return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))


def fast(x, weight, bias):
    return ops.linear(x, ops.FrozenLinear(weight, bias))


def operation(product, M):
    D_in, D_out = PRODUCTS[product]
    weight, bias = torch.randn(D_out, D_in, device=DEVICE) / D_in**0.5, torch.randn(D_out, device=DEVICE)
    flops = 2 * M * D_in * D_out
    return Operation(
        name=f"linear {product} {M}x{D_in}x{D_out}",
        plain=plain,
        fast=fast,
        make=lambda dtype: [torch.randn(M, D_in, device=DEVICE).to(dtype).requires_grad_(), weight, bias],
        flops=(flops, 2 * flops),
    )


@each_case
@pytest.mark.parametrize("product", PRODUCTS)
def bench_linear(benchmark, tiny, product, implementation, direction, precision):
    if DEVICE.type == "cpu" and implementation.endswith("compiled"):
        pytest.skip("a single product gains nothing from it")
    M = 7 if tiny else (2 if DEVICE.type == "cpu" else 256) * 197
    time_operation(benchmark, operation(product, M), implementation, direction, precision)
