"""FLOP/s and bytes per second, beside the highest that this machine reached in the same session."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from insvp_fast import ops
from insvp_fast.bench.timing import alternate
from insvp_fast.testing import DEVICE

__all__ = ["add_rates", "peak_bandwidth", "peak_flops"]


def add_rates(benchmark: Any, dtype: torch.dtype, flops: float, nbytes: float = 0.0) -> None:
    """Add TFLOP/s and GB/s to a benchmark's ``extra_info``, and their shares of the peaks of this machine."""
    if benchmark.stats is None:
        return
    median = benchmark.stats.stats.median
    if flops:
        benchmark.extra_info["TFLOP/s"] = flops / median / 1e12
        benchmark.extra_info["share of matmul peak"] = flops / median / peak_flops(dtype)
    if nbytes:
        benchmark.extra_info["GB/s"] = nbytes / median / 1e9
        benchmark.extra_info["share of copy peak"] = nbytes / median / peak_bandwidth()


@functools.cache
def peak_flops(dtype: torch.dtype) -> float:
    """FLOP/s of a large square product by the fastest known way: on a CPU with a packed weight, on a GPU PyTorch's."""
    n = 1536 if DEVICE.type == "cpu" else 8192 if dtype.itemsize == 2 else 4096  # milliseconds for one
    x, weight = (torch.randn(n, n, device=DEVICE).to(dtype) for _ in range(2))  # zeros would be faster on a GPU
    return 2 * n**3 / _fastest(lambda: ops.linear(x, ops.FrozenLinear(weight)))


@functools.cache
def peak_bandwidth() -> float:
    """Bytes per second that a large copy reads and writes."""
    x = torch.randn(2**25 if DEVICE.type == "cpu" else 2**28, device=DEVICE)
    y = torch.empty_like(x)
    return 2 * x.nbytes / _fastest(lambda: y.copy_(x))


def _fastest(run: Callable[[], object]) -> float:
    """Seconds of the fastest of 50 runs, the one that other processes disturbed the least."""
    with torch.no_grad():
        return min(alternate({"": run}, 50, warmup=0.5)[""])
