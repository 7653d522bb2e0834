"""How an operation is timed: rotating operands, parity on the timed values, rates beside what the machine can do."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from insvp_fast import InsVPConfig, InsVPReference, ops
from insvp_fast.bench import DEVICE, alternate, clock, peak_bytes, spread
from insvp_fast.runtime import hardware
from insvp_fast.testing import assert_within_budget, relative_error

__all__ = [
    "CASES",
    "add_rates",
    "median_seconds",
    "model_flops",
    "peak_bandwidth",
    "peak_flops",
    "time_operation",
    "time_run",
]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HOT = 200e6 if DEVICE.type == "cuda" else 0.0  # bytes of operands that no cache of a GPU holds


def _cases() -> list[tuple[str, str, str]]:
    """Implementation, direction and precision; on a CPU few are compiled, which takes longer than all the rest."""
    cases = []
    for direction, dtype in itertools.product(("forward", "forward + backward"), DTYPES):
        cases += [(implementation, direction, dtype) for implementation in ("reference", "insvp_fast")]
        if DEVICE.type != "cpu":
            cases += [
                (f"{implementation} compiled", direction, dtype) for implementation in ("reference", "insvp_fast")
            ]
    return cases if DEVICE.type != "cpu" else [*cases, ("reference compiled", "forward + backward", "fp32")]


CASES = pytest.mark.parametrize(
    ("implementation", "direction", "precision"), _cases(), ids=lambda part: part.replace(" ", "_")
)


def time_operation(
    benchmark: Any,
    implementation: str,
    direction: str,
    precision: str,
    *,
    name: str,
    plain: Callable[..., Any],
    fast: Callable[..., Any],
    make: Callable[[torch.dtype], Sequence[Tensor]],
    flops: float = 0.0,
    nbytes: float = 0.0,
    products: bool = True,
) -> None:
    """Time one implementation of an operation and check the values that it gave in the last round.

    Args:
        name: the group, with the operation's shape.
        plain, fast: the reference, also right in double precision, and ours; of the operands, with one result or more.
        make: new random operands for a precision; those that require a gradient get it.
        flops, nbytes: work and traffic of this direction, at least.
        products: it multiplies matrices, which some CPUs cannot do in 16 bits.
    """
    dtype = DTYPES[precision]
    ours, backward = implementation.startswith("insvp_fast"), direction != "forward"
    if products and DEVICE.type == "cpu" and not hardware.has_products(dtype) and not ours:
        pytest.skip("without instructions for bf16, PyTorch's own products take minutes")
    benchmark.group = f"{name}, {direction}, {precision}"
    function = fast if ours else plain
    if implementation.endswith("compiled"):
        torch.compiler.reset()
        function = torch.compile(function, dynamic=False, fullgraph=True)

    sets = [list(make(dtype))]
    size = sum(t.nbytes for t in sets[0])
    sets += [list(make(dtype)) for _ in range(int(min(HOT // size, 15)))]
    grads = [[torch.randn_like(y) for y in results_of(function, operands)] for operands in sets] if backward else sets
    turn = itertools.count()

    def run() -> tuple[int, list[Tensor]]:
        i = next(turn) % len(sets)
        results = results_of(function, sets[i])
        if backward:
            results = list(torch.autograd.grad(results, wanted(sets[i]), grads[i]))
        return i, results

    i, results = time_run(benchmark, run)
    add_rates(benchmark, dtype, flops, nbytes)
    if DEVICE.type == "cuda":
        benchmark.extra_info["peak MB"] = peak_bytes(run) / 1e6

    def again(convert: Callable[[Tensor], Tensor]) -> list[Tensor]:
        operands = [convert(t.detach()).requires_grad_(t.requires_grad) for t in sets[i]]
        values = results_of(plain, operands)
        return list(torch.autograd.grad(values, wanted(operands), list(map(convert, grads[i])))) if backward else values

    exact = again(Tensor.double)
    for k, (value, right) in enumerate(zip(results, exact, strict=True)):
        if dtype == torch.float32:
            error = relative_error(value, right)
            assert error < 1e-5, f"result {k}: relative error {error:.1e}"
        elif not (DEVICE.type == "cpu" and not hardware.has_products(dtype)):  # else the plain one takes minutes
            assert_within_budget(value, again(lambda t: t)[k], right, dtype, f"result {k}")


def results_of(function: Callable[..., Any], operands: Sequence[Tensor]) -> list[Tensor]:
    results = function(*operands)
    return [results] if isinstance(results, Tensor) else list(results)


def wanted(operands: Sequence[Tensor]) -> list[Tensor]:
    return [t for t in operands if t.requires_grad]


def time_run(benchmark: Any, run: Callable[[], Any], budget: float = 1.0) -> Any:
    """Time a run in as many rounds as take about ``budget`` seconds, several runs a round where one is short."""
    if benchmark.disabled:
        return benchmark(run)
    run()
    start = clock()
    run()
    one = clock() - start
    iterations = max(1, min(10, int(1e-3 / one)))
    rounds = max(3, min(50, int(budget / (one * iterations))))
    return benchmark.pedantic(run, rounds=rounds, iterations=iterations, warmup_rounds=1)


# ------------------------------------------------------------------------------------------------------ rates and peaks


def add_rates(benchmark: Any, dtype: torch.dtype, flops: float, nbytes: float = 0.0) -> None:
    """TFLOP/s and GB/s, and their shares of the best that this machine did in this session."""
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
    """FLOP/s of the best large square product that is known here: with a packed weight, on a GPU PyTorch's own."""
    n = 1536 if DEVICE.type == "cpu" else 8192
    x, weight = (torch.randn(n, n, device=DEVICE).to(dtype) for _ in range(2))  # zeros would be faster on a GPU
    return 2 * n**3 / best(lambda: ops.linear(x, ops.FrozenLinear(weight)))


@functools.cache
def peak_bandwidth() -> float:
    """Bytes per second that a large copy reads and writes."""
    x = torch.randn(2**25 if DEVICE.type == "cpu" else 2**28, device=DEVICE)
    y = torch.empty_like(x)
    return 2 * x.nbytes / best(lambda: y.copy_(x))


def best(run: Callable[[], object]) -> float:
    """Seconds of the fastest of many runs: the least that others on this machine disturbed."""
    with torch.no_grad():
        return min(alternate({"": run}, 50)[""])


def median_seconds(run: Callable[[], object], rounds: int = 20, runs: int = 10) -> tuple[float, float, float]:
    """Seconds of a run, median and percentiles 20 and 80: several are timed at once, so that waiting costs nothing."""

    def repeated() -> None:
        for _ in range(runs):
            run()

    seconds = alternate({"": repeated}, rounds, warmup=0.2 if DEVICE.type == "cuda" else 0.0)[""]
    median, p20, p80 = spread([each / runs for each in seconds])
    return median, p20, p80


# ----------------------------------------------------------------------------------------------------------------- work


@functools.cache
def model_flops(kind: str, name: str, config: InsVPConfig, backward: bool, **backbone_kwargs: Any) -> float:
    """Floating-point operations for one image that a model's function needs at least.

    Of the bare backbone all of it; with prompts what the exact savings leave: prompts give keys and values only, the
    last block asks one query. Backward: each frozen product once more, attention two and a half times, the prompters
    twice.
    """
    with torch.device("meta"):
        backbone = timm.create_model(name, **backbone_kwargs)
        model = None if kind == "bare" else InsVPReference(backbone, None, config)
        image = torch.empty(1, 3, *backbone.patch_embed.img_size)
    with FlopCounterMode(display=False) as prompters, torch.no_grad():
        if model is not None:
            model.specific_prompt(image, model.image_prompt(image).prompted)
    D, J, N, L = (
        backbone.embed_dim,
        len(backbone.blocks),
        backbone.patch_embed.num_patches,
        0 if model is None else config.prompt_length,
    )
    T, hidden = N + backbone.num_prefix_tokens, backbone.blocks[0].mlp.fc1.out_features
    queries = (J - 1) * T + (T if model is None else 1)
    products = (
        N * backbone.patch_embed.proj.weight[0].numel() * D + queries * 2 * D * (D + hidden) + J * (T + L) * 2 * D * D
    )
    scores = queries * (T + L) * 2 * D
    once, backward_too = 2 * (products + scores) + prompters.get_total_flops(), 2 * products + 5 * scores
    return once + (backward_too + 2 * prompters.get_total_flops()) * backward
