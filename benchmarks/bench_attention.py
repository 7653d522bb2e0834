"""attention of a ViT-B from the packed product, by implementation; for CPUs."""

import functools

import pytest
import torch

from benchmarks.operations import DTYPES
from insvp_fast import ops
from insvp_fast.ops.attention import attention_bwd_reference, attention_reference
from insvp_fast.testing import DEVICE, relative_error

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="compares implementations for CPUs")

S, T, HEADS, D = 206, 197, 12, 768
SHAPE = HEADS, T, (D // HEADS) ** -0.5


@functools.cache
def inputs(batch, dtype):
    return torch.randn(batch, S, 3 * D).to(dtype), torch.randn(batch, T, D).to(dtype)


@functools.cache
def exact(batch, dtype, direction):
    qkv, grad = (t.double() for t in inputs(batch, dtype))
    return attention_bwd_reference(grad, qkv, *SHAPE) if direction == "backward" else attention_reference(qkv, *SHAPE)


def make_run(direction, impl, qkv, grad):
    """The forward or the backward pass, as a function without arguments."""

    def forward():
        with torch.no_grad():
            return ops.attention(qkv, *SHAPE, impl=impl)

    if direction == "forward":
        return forward
    x = qkv.detach().requires_grad_()
    out = ops.attention(x, *SHAPE, impl=impl)
    return lambda: torch.autograd.grad(out, x, grad, retain_graph=True)[0]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("impl", ["native", "sdpa", "explicit"])
def bench_attention(benchmark, impl, batch, direction, dtype):
    benchmark.group = f"attention {direction} batch {batch} {dtype}"
    run = make_run(direction, impl, *inputs(batch, dtype))
    result = benchmark.pedantic(run, rounds=30, warmup_rounds=3)
    assert relative_error(result, exact(batch, dtype, direction)) < 20 * torch.finfo(dtype).eps
    flops = (2 if direction == "forward" else 5) * 2 * batch * T * S * D
    benchmark.extra_info["FLOP"] = flops
    if benchmark.stats is not None:
        benchmark.extra_info["GFLOP/s"] = flops / benchmark.stats.stats.min / 1e9
