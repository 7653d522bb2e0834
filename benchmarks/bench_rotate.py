"""rotate of the queries and keys of a ViT-B, by implementation; for CPUs."""

import functools

import pytest
import torch

from benchmarks.operations import DTYPES
from insvp_fast.ops.rotate import rotate_bwd_reference, rotate_reference
from insvp_fast.testing import DEVICE, relative_error

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="compares implementations for CPUs")

S, N, HEADS, D = 265, 256, 12, 768  # a class token, patches and eight prompts


@functools.cache
def inputs(batch, dtype):
    return torch.randn(batch, S, 3 * D).to(dtype), torch.randn(N, 2 * D // HEADS)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("half", [False, True], ids=["neighbors", "halves"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("impl", ["native", "reference"])
def bench_rotate(benchmark, impl, batch, direction, half, dtype):
    benchmark.group = f"rotate {direction} {half=} batch {batch} {dtype}"
    x, rotation = inputs(batch, dtype)
    forward = direction == "forward"
    operator = torch.ops.insvp_fast.rotate_fwd if forward else torch.ops.insvp_fast.rotate_bwd
    result = benchmark.pedantic(operator, (x, HEADS, rotation, 1, half, impl), rounds=30, warmup_rounds=3)
    formula = rotate_reference if forward else rotate_bwd_reference
    exact = formula(x.double(), HEADS, rotation.double(), 1, half)
    assert relative_error(result, exact) < 4 * torch.finfo(dtype).eps
