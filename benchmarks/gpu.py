"""First measurements on a GPU, within ten minutes: correctness, then the speed of the parts and of whole models.

python -m benchmarks.gpu --output gpu.json

Each section prints its rows and stands alone: if one fails, that is reported and the next one runs. Sections for which
no time is left are named. Without a GPU the sizes are tiny and the figures mean nothing; that is to try the script.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from benchmarks import bench_mlp, bench_norm_insert, bench_superpose
from benchmarks.cuda_graphs import graphed
from benchmarks.models import RELEASE, make_model, without_dropout
from benchmarks.operations import evaluate
from benchmarks.parity import assert_parity
from benchmarks.rates import model_flops, peak_bandwidth, peak_flops
from insvp_fast import ops
from insvp_fast.bench.jobs import AUTOCAST_DTYPES, JOBS, forward_backward, training_step
from insvp_fast.bench.machine import machine_facts
from insvp_fast.bench.models import CONFIGS
from insvp_fast.bench.timing import Row, alternate, clock, compare, median_and_spread
from insvp_fast.ops.heads import merge_heads, split_packed
from insvp_fast.testing import DEVICE

ON_GPU = DEVICE.type == "cuda"
NAME, CUT = "vit_base_patch16_224", {} if ON_GPU else {"depth": 1}
BATCHES = (64, 256) if ON_GPU else (1,)
DTYPE, SIZE, T, L, D, HEADS = torch.bfloat16, 2, 197, 9, 768, 12
COPIES = 4 if ON_GPU else 1  # sets of operands used in turn, together larger than the cache
ROUNDS, RUNS = (20, 10) if ON_GPU else (2, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="gpu.json", help="where the rows go (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=10, help="start no section later than this (default: 10)")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    arguments = parser.parse_args()
    begin, found = time.monotonic(), {"machine": machine_facts()}
    print(json.dumps(found["machine"], indent=1))
    for name in arguments.sections:
        print(f"\n{name}")
        rows: list[Row] = []
        section: Row = {"rows": rows}
        if time.monotonic() - begin > 60 * arguments.minutes:
            section["left out"] = "no time left"
            print("left out: no time left")
        else:
            try:
                for row in SECTIONS[name]():
                    rows.append(row)
                    print("  " + ", ".join(f"{key} {shown(value)}" for key, value in row.items()), flush=True)
            except Exception as error:  # any: the other sections shall run
                section["failed"] = traceback.format_exc()
                print(f"failed: {type(error).__name__}: {error}")
        section["seconds so far"] = time.monotonic() - begin
        found[name] = section
        Path(arguments.output).write_text(json.dumps(found, indent=1) + "\n")
        if ON_GPU:
            torch.cuda.empty_cache()
    print(f"\nwritten: {arguments.output}")


def shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def correctness() -> Iterator[Row]:
    """Logits and gradients of whole models against float64, without dropout and without TF32."""
    torch.backends.cudnn.allow_tf32 = False
    for config, providers in (("paper", ("reference", "insvp_fast")), ("released", ("released", "insvp_fast"))):
        still = without_dropout(CONFIGS[config])
        for provider in providers:
            for precision in ("fp32", "bf16"):
                amp, batch = AUTOCAST_DTYPES[precision], 8 if ON_GPU else 1
                values = forward_backward(make_model(provider, NAME, still, **CUT), batch, amp)()
                row: Row = {"config": config, "provider": provider, "precision": precision}
                try:
                    yield row | assert_parity(values, provider, amp, NAME, batch, still, **CUT) | {"right": True}
                except AssertionError as error:
                    yield row | {"right": False, "why": str(error)}


def peaks() -> Iterator[Row]:
    """The peaks that the shares in other sections refer to."""
    for dtype in (torch.float32, DTYPE):
        yield {"matmul": str(dtype), "TFLOP/s": peak_flops(dtype) / 1e12}
    yield {"copy": "float32", "GB/s": peak_bandwidth() / 1e9}


def products() -> Iterator[Row]:
    """The four products of a block, with the transposed weight (NT), as forward has it, and without (NN)."""
    for batch in BATCHES:
        for name, (d_in, d_out) in {"qkv": (D, 3 * D), "proj": (D, D), "fc1": (D, 4 * D), "fc2": (4 * D, D)}.items():
            M = batch * (T + L if name == "qkv" else T)
            yield from product_rows({"product": name, "batch": batch}, M, d_in, d_out)


def product_rows(row: Row, M: int, d_in: int, d_out: int) -> Iterator[Row]:
    x, g, w = normal(M, d_in), normal(M, d_out), normal(d_out, d_in)
    yield row | {"form": "NT"} | timed(lambda i: x[i] @ w[i].T, 2 * M * d_in * d_out)
    yield row | {"form": "NN"} | timed(lambda i: g[i] @ w[i], 2 * M * d_in * d_out)


def sdpa() -> Iterator[Row]:
    """PyTorch's attention by backend: 197 queries, 206 keys, from the packed product."""

    def attend(qkv: Tensor) -> Tensor:
        q, k, v = split_packed(qkv, HEADS)
        return merge_heads(F.scaled_dot_product_attention(q[:, :, :T], k, v))

    backends = ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
    for batch in BATCHES:
        yield from attention_rows({"backend": "default", "batch": batch}, attend)
        for name in backends:
            with sdpa_kernel(getattr(SDPBackend, name)):
                rows = list(attention_rows({"backend": name, "batch": batch}, attend))
            yield from rows


def attention() -> Iterator[Row]:
    """This package's attention by implementation."""
    for batch in BATCHES:
        for impl in ("auto", "sdpa", "triton", "xformers"):
            scale = (D // HEADS) ** -0.5
            attend = functools.partial(ops.attention, num_heads=HEADS, num_queries=T, scale=scale, impl=impl)
            yield from attention_rows({"impl": impl, "batch": batch}, attend)


def attention_rows(row: Row, attend: Callable[[Tensor], Tensor]) -> Iterator[Row]:
    batch = row["batch"]
    qkv, grad = normal(batch, T + L, 3 * D, grad=True), normal(batch, T, D)
    flops, nbytes = 4 * batch * T * (T + L) * D, batch * (3 * (T + L) + T) * D * SIZE
    # backward reads the same again, the result and its gradient, and writes the operands' gradients
    both = nbytes + batch * (6 * (T + L) + 2 * T) * D * SIZE
    try:
        yield from direction_rows(row, attend, [[x] for x in qkv], grad[:1], (flops, 3.5 * flops), (nbytes, both))
    except (ImportError, RuntimeError, ValueError) as error:  # not every implementation exists on every device
        yield row | {"refused": (str(error) or repr(error)).splitlines()[0]}


def kernels() -> Iterator[Row]:
    """The fused operations and their references, with the least bytes to be moved over the time."""
    for batch in BATCHES:
        for operation in (
            bench_norm_insert.operation(batch, SIZE),
            bench_mlp.operation(batch * T, SIZE),
            bench_superpose.operation(batch, SIZE),
        ):
            sets = [list(operation.make(DTYPE)) for _ in range(COPIES)]
            for by, function in (("reference", operation.plain), ("insvp_fast", operation.fast)):
                row: Row = {"operation": operation.name, "by": by, "batch": batch}
                grads = [torch.randn_like(y) for y in evaluate(function, sets[0])]
                yield from direction_rows(row, function, sets, grads, operation.flops, operation.nbytes)


def models() -> Iterator[Row]:
    """Whole steps of all providers, with memory: as benchmarks/paired.py, with fewer rounds and little compiled."""
    for batch in BATCHES:
        for config, job in itertools.product(CONFIGS, ("training step", "inference")):
            providers = ["bare", *(RELEASE if config == "released" else ()), "reference", "insvp_fast"]
            if ON_GPU and (config, job, batch) == ("paper", "training step", 64):
                providers += ["bare compiled", "insvp_fast compiled"]
            rounds = 10 if ON_GPU else 1
            for row in compare(job, "bf16", providers, NAME, batch, rounds, config, make_model, **CUT):
                kind = "bare" if row["provider"].startswith("bare") else "reference"
                flops = model_flops(kind, NAME, CONFIGS[config], job != "inference", **CUT)
                yield row | {"TFLOP/s": flops * row["images per second"] / 1e12}


def launches() -> Iterator[Row]:
    """Where the time of a step goes: the host's, and the kernels by the time that they take in all."""
    for job, provider in itertools.product(("training step", "inference"), ("insvp_fast", "bare")):
        batch = BATCHES[-1]
        run = JOBS[job](make_model(provider, NAME, **CUT), batch, DTYPE)
        row: Row = {"job": job, "provider": provider, "batch": batch}
        for _ in range(3):
            run()
        begin = clock()
        run()
        launched = time.perf_counter()
        yield row | {"launched after ms": (launched - begin) * 1e3, "done after ms": (clock() - begin) * 1e3}
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ON_GPU else [])]) as profiler:
            run()
            clock()
        kernels = [
            k for k in profiler.key_averages() if k.self_device_time_total > 0 and k.device_type != DeviceType.CPU
        ]
        kernels.sort(key=lambda kernel: -kernel.self_device_time_total)
        yield row | {
            "kernels": sum(k.count for k in kernels),
            "ms": sum(k.self_device_time_total for k in kernels) / 1e3,
        }
        for kernel in kernels[:30]:
            yield row | {"ms": kernel.self_device_time_total / 1e3, "calls": kernel.count, "kernel": kernel.key[:100]}


def graphs() -> Iterator[Row]:
    """A training step launched kernel by kernel, and as one CUDA graph."""
    if not ON_GPU:
        raise NotImplementedError("CUDA graphs need a GPU")
    for batch in (8, 16, 64):
        for provider in ("bare", "insvp_fast"):
            eager = training_step(make_model(provider, NAME), batch, DTYPE)
            capturable = {} if provider == "bare" else {"capturable": True}
            graph = graphed(training_step(make_model(provider, NAME), batch, DTYPE, **capturable))
            seconds = alternate({"eager": eager, "graph": graph}, 20, warmup=1.0)
            for launched, values in seconds.items():
                median, p20, p80 = median_and_spread(values)
                row: Row = {"provider": provider, "batch": batch, "launched": launched, "ms": median * 1e3}
                yield row | {"p20": p20 * 1e3, "p80": p80 * 1e3, "images/s": batch / median}


SECTIONS: dict[str, Callable[[], Iterator[Row]]] = {
    section.__name__: section
    for section in (correctness, peaks, products, sdpa, kernels, launches, models, attention, graphs)
}


def direction_rows(
    row: Row,
    function: Callable[..., object],
    sets: Sequence[Sequence[Tensor]],
    grads: Sequence[Tensor],
    flops: tuple[float, float],
    nbytes: tuple[float, float],
) -> Iterator[Row]:
    """Time forward, and forward + backward, of a function of the operands in ``sets``; flops and bytes of each."""
    with torch.no_grad():
        yield row | {"direction": "forward"} | timed(lambda i: evaluate(function, sets[i]), flops[0], nbytes[0])
    rates = timed(lambda i: evaluate(function, sets[i], grads), flops[1], nbytes[1])
    yield row | {"direction": "forward + backward"} | rates


def timed(run: Callable[[int], object], flops: float = 0.0, nbytes: float = 0.0) -> Row:
    """Microseconds of a run, median and percentiles, and its rates; the run gets the number of the operands to use."""
    turn = itertools.count()

    def repeated() -> None:  # several runs are timed at once, so that waiting for the device costs nothing
        for _ in range(RUNS):
            run(next(turn) % COPIES)

    seconds = alternate({"": repeated}, ROUNDS, warmup=0.2 if ON_GPU else 0.0)[""]
    median, p20, p80 = median_and_spread([each / RUNS for each in seconds])
    row = {"us": median * 1e6, "p20": p20 * 1e6, "p80": p80 * 1e6}
    if flops:
        row |= {"TFLOP/s": flops / median / 1e12, "of peak": flops / median / peak_flops(DTYPE)}
    if nbytes:
        row |= {"GB/s": nbytes / median / 1e9, "of copy": nbytes / median / peak_bandwidth()}
    return row


def normal(*shape: int, dtype: torch.dtype = DTYPE, grad: bool = False) -> list[Tensor]:
    """``COPIES`` normally distributed tensors."""
    return [torch.randn(shape, device=DEVICE).to(dtype).requires_grad_(grad) for _ in range(COPIES)]


if __name__ == "__main__":
    main()
