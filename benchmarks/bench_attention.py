"""Attention of ViT-B from the packed product: the native kernels, PyTorch's fused attention and its plain products."""

import functools

import pytest
import torch

from benchmarks.steps import DEVICE
from insvp_fast import ops
from insvp_fast.ops.attention import attention_bwd_reference, attention_reference
from insvp_fast.testing import relative_error

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="these compare ways on a CPU")

S, T, HEADS, D = 206, 197, 12, 768
SHAPE = HEADS, T, (D // HEADS) ** -0.5
BATCHES = [1, 8]


def directions(provider, qkv, grad):
    """The forward and the backward function, each without arguments."""
    x = qkv.detach().requires_grad_()
    out = ops.attention(x, *SHAPE, impl=provider)

    def forward():
        with torch.no_grad():
            return ops.attention(qkv, *SHAPE, impl=provider)

    return forward, lambda: torch.autograd.grad(out, x, grad, retain_graph=True)[0]


@functools.cache
def inputs(batch, dtype):
    return torch.randn(batch, S, 3 * D).to(dtype), torch.randn(batch, T, D).to(dtype)


@functools.cache
def exact(batch, dtype, direction):
    qkv, grad = (t.double() for t in inputs(batch, dtype))
    return attention_bwd_reference(grad, qkv, *SHAPE) if direction == "backward" else attention_reference(qkv, *SHAPE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("provider", ["native", "sdpa", "explicit"])
def bench_attention(benchmark, provider, batch, direction, dtype):
    benchmark.group = f"attention {direction} batch {batch} {dtype}"
    run = directions(provider, *inputs(batch, dtype))[direction == "backward"]
    result = benchmark.pedantic(run, rounds=30, warmup_rounds=3)
    assert relative_error(result, exact(batch, dtype, direction)) < 20 * torch.finfo(dtype).eps
    flops = (2 if direction == "forward" else 5) * 2 * batch * T * S * D
    benchmark.extra_info["FLOP"] = flops
    if benchmark.stats is not None:
        benchmark.extra_info["GFLOP/s"] = flops / benchmark.stats.stats.min / 1e9
