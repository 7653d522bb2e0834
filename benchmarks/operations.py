"""Timing an operation against its reference: operands in rotation, and parity asserted on the timed values."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.rates import add_rates
from insvp_fast.bench.timing import clock, peak_bytes
from insvp_fast.runtime import hardware
from insvp_fast.testing import DEVICE, assert_within_budget, relative_error

__all__ = ["DTYPES", "Operation", "each_case", "evaluate", "time_operation", "time_run"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COLD_BYTES = 200e6 if DEVICE.type == "cuda" else 0.0  # operands of this size in all do not fit the cache of any GPU


@dataclass(frozen=True)
class Operation:
    """An operation at one shape, and its reference.

    Attributes:
        name: with the shape; names the group of benchmarks.
        plain: the reference, which must also be right in float64; returns one tensor or several, as ``fast``.
        fast: ours, of the same operands.
        make: new random operands in a dtype; those that require a gradient get it in backward.
        flops, nbytes: the least work and memory traffic, of forward and of forward + backward.
        matmul: it multiplies matrices, which PyTorch does very slowly in 16 bits on CPUs without instructions for it.
        tolerance: the relative error against float64 that fp32 results may have.
    """

    name: str
    plain: Callable[..., Any]
    fast: Callable[..., Any]
    make: Callable[[torch.dtype], Sequence[Tensor]]
    flops: tuple[float, float] = (0.0, 0.0)
    nbytes: tuple[float, float] = (0.0, 0.0)
    matmul: bool = True
    tolerance: float = 1e-5


def _cases() -> list[tuple[str, str, str]]:
    """Implementation, direction and precision; on a CPU only one is compiled, since compiling takes the longest."""
    directions, implementations = ("forward", "forward + backward"), ["reference", "insvp_fast"]
    if DEVICE.type != "cpu":
        implementations += ["reference compiled", "insvp_fast compiled"]
    cases = [(i, direction, dtype) for direction in directions for dtype in DTYPES for i in implementations]
    return cases if DEVICE.type != "cpu" else [*cases, ("reference compiled", "forward + backward", "fp32")]


each_case = pytest.mark.parametrize(
    ("implementation", "direction", "precision"), _cases(), ids=lambda part: part.replace(" ", "_")
)


def time_operation(benchmark: Any, operation: Operation, implementation: str, direction: str, precision: str) -> None:
    """Time one implementation of an operation and check the values of its last run."""
    dtype, backward = DTYPES[precision], direction != "forward"
    ours = implementation.startswith("insvp_fast")
    if operation.matmul and not ours and not _multiplies(dtype):
        pytest.skip("without instructions for bf16, PyTorch's own products take minutes")
    benchmark.group = f"{operation.name}, {direction}, {precision}"
    function = operation.fast if ours else operation.plain
    if implementation.endswith("compiled"):
        torch.compiler.reset()
        function = torch.compile(function, dynamic=False, fullgraph=True)

    sets = [list(operation.make(dtype))]
    size = sum(t.nbytes for t in sets[0])
    sets += [list(operation.make(dtype)) for _ in range(int(min(COLD_BYTES // size, 15)))]
    grads = [[torch.randn_like(y) for y in evaluate(function, operands)] if backward else [] for operands in sets]
    turn = itertools.count()

    def run() -> tuple[int, list[Tensor]]:
        i = next(turn) % len(sets)
        return i, evaluate(function, sets[i], grads[i])

    i, results = time_run(benchmark, run)
    add_rates(benchmark, dtype, operation.flops[backward], operation.nbytes[backward])
    if DEVICE.type == "cuda":
        benchmark.extra_info["peak MB"] = peak_bytes(run) / 1e6
    _assert_parity(operation, results, sets[i], grads[i], dtype)


def _multiplies(dtype: torch.dtype) -> bool:
    return DEVICE.type != "cpu" or hardware.has_products(dtype)


def _assert_parity(
    operation: Operation, results: Sequence[Tensor], operands: Sequence[Tensor], grads: Sequence[Tensor], dtype: Any
) -> None:
    def plain(convert: Callable[[Tensor], Tensor]) -> list[Tensor]:
        converted = [convert(t.detach()).requires_grad_(t.requires_grad) for t in operands]
        return evaluate(operation.plain, converted, list(map(convert, grads)))

    exact = plain(Tensor.double)
    if dtype == torch.float32:
        for k, (value, right) in enumerate(zip(results, exact, strict=True)):
            error = relative_error(value, right)
            assert error < operation.tolerance, f"result {k}: relative error {error:.1e}"
    elif _multiplies(dtype):  # else the reference in 16 bits would take minutes
        for k, (value, rough, right) in enumerate(zip(results, plain(lambda t: t), exact, strict=True)):
            assert_within_budget(value, rough, right, dtype, f"result {k}")


def evaluate(function: Callable[..., Any], operands: Sequence[Tensor], grads: Sequence[Tensor] = ()) -> list[Tensor]:
    """A function's results; if their gradients are given, the gradients of the operands that require one."""
    results = function(*operands)
    results = [results] if isinstance(results, Tensor) else list(results)
    return list(torch.autograd.grad(results, [t for t in operands if t.requires_grad], grads)) if grads else results


def time_run(benchmark: Any, run: Callable[[], Any], budget: float = 1.0) -> Any:
    """Time a run for about ``budget`` seconds, several runs to a round where one is short; returns the last result."""
    if benchmark.disabled:
        return benchmark(run)
    run()
    start = clock()
    run()
    one = clock() - start
    iterations = max(1, min(10, int(1e-3 / one)))
    rounds = max(3, min(50, int(budget / (one * iterations))))
    return benchmark.pedantic(run, rounds=rounds, iterations=iterations, warmup_rounds=1)
