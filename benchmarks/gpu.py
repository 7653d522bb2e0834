"""First measurements on a GPU, within ten minutes: is it right, how fast are the parts, how fast is the whole.

python -m benchmarks.gpu --output gpu.json

Each section prints its rows and stands alone: one that fails is reported and the next goes on. Sections that there is
no time left for are named. Without a GPU, which is how this script is tried, sizes are tiny and figures mean nothing.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import itertools
import json
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import bench_mlp, steps
from benchmarks.measure import median_seconds, model_flops, peak_bandwidth, peak_flops
from insvp_fast import bench, ops
from insvp_fast.bench import DEVICE
from insvp_fast.ops import Blend, PatchWeights
from insvp_fast.ops.heads import merge_heads, split_packed
from insvp_fast.ops.norm_insert import norm_insert_reference
from insvp_fast.ops.superpose import superpose_reference

ON_GPU = DEVICE.type == "cuda"
NAME, CUT = "vit_base_patch16_224", {} if ON_GPU else {"depth": 1}
BATCHES = (64, 256) if ON_GPU else (1,)
DTYPE, SIZE, T, L, D, HEADS = torch.bfloat16, 2, 197, 9, 768, 12
COPIES = 4 if ON_GPU else 1  # operands taken in turns, more than the cache holds
ROUNDS, RUNS = (20, 10) if ON_GPU else (2, 1)
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="gpu.json", help="where the rows go")
    parser.add_argument("--minutes", type=float, default=10, help="no section is begun after so long")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    arguments = parser.parse_args()
    begin, found = time.monotonic(), {"machine": bench.machine()}
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
            except Exception as error:  # whatever it is, the other sections shall run
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


def timed(run: Callable[[int], object], flops: float = 0.0, nbytes: float = 0.0) -> Row:
    """Microseconds of a run, which takes the operands of its turn, and its rates."""
    turn = iter(range(10**9))
    median, p20, p80 = median_seconds(lambda: run(next(turn) % COPIES), ROUNDS, RUNS)
    row = {"us": median * 1e6, "p20": p20 * 1e6, "p80": p80 * 1e6}
    if flops:
        row |= {"TFLOP/s": flops / median / 1e12, "of peak": flops / median / peak_flops(DTYPE)}
    if nbytes:
        row |= {"GB/s": nbytes / median / 1e9, "of copy": nbytes / median / peak_bandwidth()}
    return row


def normal(*shape: int, dtype: torch.dtype = DTYPE, grad: bool = False) -> list[Tensor]:
    return [torch.randn(shape, device=DEVICE).to(dtype).requires_grad_(grad) for _ in range(COPIES)]


# ------------------------------------------------------------------------------------------------------------- sections


def correctness() -> Iterator[Row]:
    """Logits and gradients of whole models against float64, without dropout, convolutions in full fp32."""
    torch.backends.cudnn.allow_tf32 = False
    for config, providers in (("paper", ("reference", "insvp_fast")), ("released", ("released", "insvp_fast"))):
        still = steps.without_dropout(bench.CONFIGS[config])
        for provider in providers:
            for precision in ("fp32", "bf16"):
                amp, batch = bench.AMP[precision], 8 if ON_GPU else 1
                model = steps.make_model(provider, NAME, still, **CUT)
                values = bench.forward_backward(model, batch, amp)()
                row: Row = {"config": config, "provider": provider, "precision": precision}
                try:
                    yield row | steps.assert_parity(values, provider, amp, NAME, batch, still, **CUT) | {"right": True}
                except AssertionError as error:
                    yield row | {"right": False, "why": str(error)}


def peaks() -> Iterator[Row]:
    """What shares refer to."""
    for dtype in (torch.float32, DTYPE):
        yield {"matmul": str(dtype), "TFLOP/s": peak_flops(dtype) / 1e12}
    yield {"copy": "float32", "GB/s": peak_bandwidth() / 1e9}


def products() -> Iterator[Row]:
    """The four products of a block, with the weight as it lies (NT) and transposed (NN), as backward has it."""
    for batch in BATCHES:
        for name, (d_in, d_out) in {"qkv": (D, 3 * D), "proj": (D, D), "fc1": (D, 4 * D), "fc2": (4 * D, D)}.items():
            M = batch * (T + L if name == "qkv" else T)
            yield from product_rows({"product": name, "batch": batch}, M, d_in, d_out)


def product_rows(row: Row, M: int, d_in: int, d_out: int) -> Iterator[Row]:
    x, g, w = normal(M, d_in), normal(M, d_out), normal(d_out, d_in)
    yield row | {"form": "NT"} | timed(lambda i: x[i] @ w[i].T, 2 * M * d_in * d_out)
    yield row | {"form": "NN"} | timed(lambda i: g[i] @ w[i], 2 * M * d_in * d_out)


def sdpa() -> Iterator[Row]:
    """PyTorch's attention by backend, 197 queries and 206 keys, from the packed product."""

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
    """This package's attention in each way that it can be asked for."""
    asked = "impl" in inspect.signature(ops.attention).parameters
    for batch in BATCHES:
        for way in ("auto", "sdpa", "triton", "xformers") if asked else ("auto",):
            attend = functools.partial(ops.attention, num_heads=HEADS, num_queries=T, scale=(D // HEADS) ** -0.5)
            attend = functools.partial(attend, impl=way) if asked else attend
            yield from attention_rows({"way": way, "batch": batch}, attend)


def attention_rows(row: Row, attend: Callable[[Tensor], Tensor]) -> Iterator[Row]:
    batch = row["batch"]
    qkv, grad = normal(batch, T + L, 3 * D, grad=True), normal(batch, T, D)
    flops, nbytes = 4 * batch * T * (T + L) * D, batch * (3 * (T + L) + T) * D * SIZE
    # backward reads the same again, the result and its gradient, and writes the operands' gradients
    both = nbytes + batch * (6 * (T + L) + 2 * T) * D * SIZE
    try:
        yield from directions(row, lambda i: (attend(qkv[i]),), lambda i: [qkv[i]], [grad[0]], nbytes, both, flops)
    except (ImportError, RuntimeError, ValueError) as error:  # not every way exists on every device
        yield row | {"refused": (str(error) or repr(error)).splitlines()[0]}


def kernels() -> Iterator[Row]:
    """The fused operations beside their formula: bytes that have to move over the time."""
    for batch in BATCHES:
        for case in (norm_insert, mlp, superpose):
            for fast in (False, True):
                row: Row = {"operation": case.__name__, "by": "ops" if fast else "formula", "batch": batch}
                call, operands, forward, both = case(fast, batch)
                grads = [torch.randn_like(y) for y in call(0)]
                yield from directions(row, call, operands, grads, forward, both)


def norm_insert(fast: bool, batch: int) -> Any:
    residual, branch = normal(batch, T, D, dtype=torch.float32, grad=True), normal(batch, T, D, grad=True)
    prompts = normal(batch, L, D, dtype=torch.float32, grad=True)
    scale, shift = torch.rand(D, device=DEVICE) + 0.5, torch.randn(D, device=DEVICE)
    run = functools.partial(ops.norm_insert, dtype=DTYPE) if fast else norm_insert_reference

    def call(i: int) -> tuple[Tensor, Tensor]:
        total, normed = run(residual[i], branch[i], prompts[i], scale, shift, 1e-6)
        return total, normed.to(DTYPE)

    forward = batch * D * (T * (8 + 2 * SIZE) + L * (4 + SIZE))
    backward = batch * D * (T * (12 + 2 * SIZE) + L * (8 + SIZE))
    return call, lambda i: [residual[i], branch[i], prompts[i]], forward, forward + backward


def mlp(fast: bool, batch: int) -> Any:
    x, weights = normal(batch, T, D, grad=True), bench_mlp.make_weights()
    function = bench_mlp.fast if fast else bench_mlp.plain
    once = batch * T * 4 * D * SIZE  # of the hidden layer: written and read; backward reads it and its gradient moves
    return lambda i: (function(x[i], *weights),), lambda i: [x[i]], 2 * once, 5 * once


def superpose(fast: bool, batch: int) -> Any:
    image, prompt = normal(batch, 3, 224, 224), normal(batch, 3, 224, 224, grad=True)
    shapes = (16, 768), (16,), (768, 16), (768,)
    weights = [(torch.randn(shape, device=DEVICE) / shape[-1] ** 0.5).requires_grad_() for shape in shapes]

    def call(i: int) -> tuple[Tensor]:
        own = PatchWeights(*(weights if fast else (w.to(DTYPE) for w in weights)))  # as autocast would have them
        run = ops.superpose if fast else superpose_reference
        return (run(image[i], prompt[i], own, Blend(16, 0.7, 0.3)),)

    return call, lambda i: [prompt[i], *weights], 3 * image[0].nbytes, 6 * image[0].nbytes


def directions(
    row: Row,
    call: Callable[[int], tuple[Tensor, ...]],
    operands: Callable[[int], list[Tensor]],
    grads: list[Tensor],
    forward: float,
    both: float,
    flops: float = 0.0,
) -> Iterator[Row]:
    with torch.no_grad():
        yield row | {"direction": "forward"} | timed(call, flops, forward)
    rates = timed(lambda i: torch.autograd.grad(call(i), operands(i), grads), 3.5 * flops, both)
    yield row | {"direction": "forward + backward"} | rates


def models() -> Iterator[Row]:
    """Whole steps of all providers, with memory: as benchmarks/paired.py, with fewer rounds and little compiled."""
    for batch in BATCHES:
        for config, job in itertools.product(bench.CONFIGS, ("training step", "inference")):
            providers = ["bare", *(steps.RELEASE if config == "released" else ()), "reference", "insvp_fast"]
            if ON_GPU and (config, job, batch) == ("paper", "training step", 64):
                providers += ["bare compiled", "insvp_fast compiled"]
            rounds = 10 if ON_GPU else 1
            for row in bench.compare(job, "bf16", providers, NAME, batch, rounds, config, steps.make_model, **CUT):
                kind = "bare" if row["provider"].startswith("bare") else "reference"
                flops = model_flops(kind, NAME, bench.CONFIGS[config], job != "inference", **CUT)
                yield row | {"TFLOP/s": flops * row["images per second"] / 1e12}


def graphs() -> Iterator[Row]:
    """A training step launched kernel by kernel, and as one CUDA graph."""
    if not ON_GPU:
        raise NotImplementedError("CUDA graphs need a GPU")
    for batch in (8, 16, 64):
        for provider in ("bare", "insvp_fast"):
            eager = bench.training_step(steps.make_model(provider, NAME), batch, DTYPE)
            capturable = {} if provider == "bare" else {"capturable": True}
            graph = steps.graphed(bench.training_step(steps.make_model(provider, NAME), batch, DTYPE, **capturable))
            seconds = bench.alternate({"eager": eager, "graph": graph}, 20, warmup=1.0)
            for way, values in seconds.items():
                median, p20, p80 = bench.spread(values)
                row: Row = {"provider": provider, "batch": batch, "way": way, "ms": median * 1e3}
                yield row | {"p20": p20 * 1e3, "p80": p80 * 1e3, "images/s": batch / median}


SECTIONS: dict[str, Callable[[], Iterator[Row]]] = {
    section.__name__: section for section in (correctness, peaks, products, sdpa, kernels, models, attention, graphs)
}


if __name__ == "__main__":
    main()
