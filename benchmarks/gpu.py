"""Measurements on a GPU: correctness, then the speed of the parts and of whole models.

python -m benchmarks.gpu --output gpu.json                      # all that ten minutes allow, in this order
python -m benchmarks.gpu --output models.json --sections models

Each section prints its rows, writes each as it comes, and stands alone: if one fails, that is reported and the next one
runs. By itself a section fits into ten minutes; where the time is over, what is left out is named. Where rows differ
only in what computes them, the fastest is named as a decision. Without a GPU the sizes are tiny and the figures mean
nothing; that is to try the script.
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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from benchmarks import (
    bench_conv,
    bench_gated_mlp,
    bench_gelu,
    bench_mlp,
    bench_norm_insert,
    bench_rotate,
    bench_superpose,
)
from benchmarks.cuda_graphs import graphed
from benchmarks.models import RELEASE, make_model, without_dropout
from benchmarks.operations import Operation, evaluate
from benchmarks.parity import assert_parity
from benchmarks.rates import peak_bandwidth, peak_flops
from insvp_fast import ops
from insvp_fast.bench.jobs import AUTOCAST_DTYPES, JOBS, Run, forward_backward
from insvp_fast.bench.machine import machine_facts
from insvp_fast.bench.models import CONFIGS
from insvp_fast.bench.timing import Row, alternate, clock, compare, median_and_spread
from insvp_fast.ops.heads import merge_heads, split_packed
from insvp_fast.reference import unfold
from insvp_fast.testing import DEVICE

ON_GPU = DEVICE.type == "cuda"
NAME, CUT = "vit_base_patch16_224", {} if ON_GPU else {"depth": 1}
BATCHES = (64, 256) if ON_GPU else (1,)
DTYPE, SIZE, T, L, D, HEADS = torch.bfloat16, 2, 197, 9, 768, 12
COPIES = 4 if ON_GPU else 1  # sets of operands used in turn, together larger than the cache
ROUNDS, RUNS = (20, 10) if ON_GPU else (2, 1)
CASE = ("operation", "job", "precision", "config", "batch", "direction")  # what a row is about, where it says so


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="gpu.json", help="where the rows go (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=10, help="start no row later than this (default: 10)")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    arguments = parser.parse_args()
    end, file, found = time.monotonic() + 60 * arguments.minutes, Path(arguments.output), {"machine": machine_facts()}
    print(json.dumps(found["machine"], indent=1))
    for name in arguments.sections:
        print(f"\n{name}", flush=True)
        found[name] = section = {"rows": []}
        measure(SECTIONS[name](), section, end, lambda: file.write_text(json.dumps(found, indent=1) + "\n"))
        if ON_GPU:
            torch.cuda.empty_cache()
    print(f"\nwritten: {file}")


def measure(rows: Iterator[Row], section: Row, end: float, write: Callable[[], object]) -> None:
    """Collect the rows of a section and ``write`` after each of them, since whatever runs this may be stopped."""
    begin = time.monotonic()
    try:
        while time.monotonic() < end and (row := next(rows, None)) is not None:
            section["rows"].append(row)
            print("  " + ", ".join(f"{key} {shown(value)}" for key, value in row.items()), flush=True)
            write()
        if time.monotonic() >= end:
            section["left out"] = "the rest, or all: no time left"
            print(f"left out: {section['left out']}")
    except Exception as error:  # any: the other sections shall run
        section["failed"] = traceback.format_exc()
        print(f"failed: {type(error).__name__}: {error}")
    section |= {"seconds": time.monotonic() - begin, "decisions": decisions(section["rows"])}
    for text in section["decisions"]:
        print(f"decision: {text}", flush=True)
    write()


def decisions(rows: Sequence[Row]) -> list[str]:
    """The fastest of the rows that differ in ``by`` and in what was measured alone, and how slow the others are."""
    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        if "us" in row and "by" in row:
            what = ", ".join(f"{key} {row[key]}" if key == "batch" else str(row[key]) for key in CASE if key in row)
            groups.setdefault(what, {})[row["by"]] = row["us"] / 1e3
    texts = []
    for what, times in groups.items():
        (best, ms), *others = sorted(times.items(), key=lambda item: item[1])
        if others:
            against = ", ".join(f"{other:.3g} ({by})" for by, other in others)
            texts.append(f"{what}: {best}, {ms:.3g} ms against {against}")
    return texts


def shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def correctness() -> Iterator[Row]:
    """Logits and gradients of whole models against float64, without dropout and without TF32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
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
        yield from attention_rows("default", batch, attend)
        for name in backends:
            with sdpa_kernel(getattr(SDPBackend, name)):
                rows = list(attention_rows(name, batch, attend))
            yield from rows


def attention() -> Iterator[Row]:
    """This package's attention by implementation."""
    for batch in BATCHES:
        for impl in ("auto", "sdpa", "triton", "xformers"):
            scale = (D // HEADS) ** -0.5
            attend = functools.partial(ops.attention, num_heads=HEADS, num_queries=T, scale=scale, impl=impl)
            yield from attention_rows(impl, batch, attend)


def attention_rows(by: str, batch: int, attend: Callable[[Tensor], Tensor]) -> Iterator[Row]:
    row: Row = {"operation": "attention", "by": by, "batch": batch}
    qkv, grad = normal(batch, T + L, 3 * D, grad=True), normal(batch, T, D)
    flops, nbytes = 4 * batch * T * (T + L) * D, batch * (3 * (T + L) + T) * D * SIZE
    # backward reads the same again, the result and its gradient, and writes the operands' gradients
    both = nbytes + batch * (6 * (T + L) + 2 * T) * D * SIZE
    try:
        yield from direction_rows(row, attend, [[x] for x in qkv], grad[:1], (flops, 3.5 * flops), (nbytes, both))
    except (ImportError, RuntimeError, ValueError) as error:  # not every implementation exists on every device
        yield row | {"refused": (str(error) or repr(error)).splitlines()[0]}


def kernels() -> Iterator[Row]:
    """The fused operations as the model runs them, and their references, with the least bytes over the time."""
    for batch in BATCHES:
        for operation in (
            bench_norm_insert.operation(batch, SIZE, folded=True),
            bench_gelu.operation(batch * T, SIZE),
            bench_mlp.operation(batch * T, SIZE),
            bench_gated_mlp.operation(batch * T, SIZE),
            *(bench_rotate.operation(batch, SIZE, half) for half in (True, False)),
            bench_superpose.operation(batch, SIZE, autocast=True),
        ):
            yield from operation_rows(operation, batch)


def convolutions() -> Iterator[Row]:
    """The release's dense convolutions by cuDNN, whose fastest algorithm is searched for, and by this package."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        for batch, shape in itertools.product(BATCHES, bench_conv.DENSE.values()):
            yield from operation_rows(bench_conv.conv(shape, batch), batch)


def operation_rows(operation: Operation, batch: int) -> Iterator[Row]:
    sets = [list(operation.make(DTYPE)) for _ in range(COPIES)]
    for by, function in (("reference", operation.plain), ("insvp_fast", operation.fast)):
        row: Row = {"operation": operation.name, "by": by, "batch": batch}
        grads = [torch.randn_like(y) for y in evaluate(function, sets[0])]
        yield from direction_rows(row, function, sets, grads, operation.flops, operation.nbytes)


def prompters() -> Iterator[Row]:
    """All prompters and the patches that they make, as the model runs them under autocast."""
    for batch, config in itertools.product(BATCHES, CONFIGS):
        image = torch.randn(batch, 3, 224, 224, device=DEVICE)
        for by, options in PROMPTERS.items():
            kind = "insvp_fast" if options else "reference"
            model: Any = make_model(kind, NAME, CONFIGS[config], options=options, depth=1)
            run = functools.partial(_prompt, model.train(), bool(options))
            modules = model.global_prompter, model.patch_prompter, model.specific_prompter
            operands = [image, *(p for module in modules for p in module.parameters())]
            row: Row = {"operation": "prompters", "config": config, "by": by, "batch": batch}
            grads = [torch.randn_like(y) for y in evaluate(run, operands)]
            yield from direction_rows(row, run, [operands] * COPIES, grads)


PROMPTERS: dict[str, Row] = {
    "reference": {},
    "insvp_fast eager": {"compile_prompters": False},
    "insvp_fast compiled": {"compile_prompters": True},
}


def _prompt(model: Any, fast: bool, image: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    """The unfolded prompted image and the specific prompts."""
    with torch.autocast(DEVICE.type, DTYPE):
        if fast:
            return model._prompted_patches(image)
        prompted, prompts = model.prompt_image(image)
        return unfold(prompted, model.patch_size), prompts


def models() -> Iterator[Row]:
    """Whole steps: the bare ViT, also compiled, and InsVPViT; the latency of an image by itself."""
    cases = [(batch, job) for batch in BATCHES[::-1] for job in ("training step", "inference")]
    for batch, job in [*cases, (1, "inference")]:
        yield from model_rows(job, batch, "paper", ["bare", *["bare compiled"] * ON_GPU, "insvp_fast"])
    for batch, job in [*cases, (1, "inference")]:
        yield from model_rows(job, batch, "released", ["bare", "insvp_fast"])


def others() -> Iterator[Row]:
    """Whole steps of the references, of the release and of InsVPViT compiled, at the smaller batch."""
    for config, job in itertools.product(CONFIGS, ("training step", "inference")):
        release = RELEASE if config == "released" else ()
        yield from model_rows(job, BATCHES[0], config, ["bare", *release, "reference", "insvp_fast"])
    if ON_GPU:
        yield from model_rows("training step", BATCHES[0], "paper", ["bare", "insvp_fast", "insvp_fast compiled"])


def model_rows(job: str, batch: int, config: str, providers: Sequence[str]) -> Iterator[Row]:
    rounds = 20 if ON_GPU else 1
    for row in compare(job, "bf16", providers, NAME, batch, rounds, config, make_model, **CUT):
        yield row | {"by": row["provider"], "us": 1e6 * row["seconds"]}


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
        found = [k for k in profiler.key_averages() if k.device_type != DeviceType.CPU and k.self_device_time_total > 0]
        found = [k for k in found if not k.is_user_annotation]  # as of the optimizer's step: its kernels, once more
        found.sort(key=lambda kernel: -kernel.self_device_time_total)
        yield row | {"kernels": sum(k.count for k in found), "ms": sum(k.self_device_time_total for k in found) / 1e3}
        for kernel in found[:30]:
            yield row | {"ms": kernel.self_device_time_total / 1e3, "calls": kernel.count, "kernel": kernel.key[:100]}


def graphs() -> Iterator[Row]:
    """InsVPViT, which replays CUDA graphs of its own, without them, and inside of one graph of the whole job."""
    if not ON_GPU:
        raise NotImplementedError("CUDA graphs need a GPU")
    for batch, job in itertools.product((1, 8, *BATCHES), ("inference", "training step")):
        runs: dict[str, Run] = {}
        for by, provider, options in GRAPHS:
            model = make_model(provider, NAME, options=options)
            whole = {"capturable": True} if by == "InsVPViT, one graph" and job != "inference" else {}
            run = JOBS[job](model, batch, DTYPE, **whole)
            runs[by] = graphed(run) if by.endswith("one graph") else run
        seconds = alternate(runs, ROUNDS, warmup=1.0)
        for by, values in seconds.items():
            median, p20, p80 = median_and_spread(values)
            row: Row = {"job": job, "precision": "bf16", "batch": batch, "by": by, "us": median * 1e6}
            yield row | {"p20": p20 * 1e6, "p80": p80 * 1e6, "images/s": batch / median}


GRAPHS: tuple[tuple[str, str, Row], ...] = (
    ("bare", "bare", {}),
    ("bare, one graph", "bare", {}),
    ("InsVPViT", "insvp_fast", {}),
    ("InsVPViT, kernel by kernel", "insvp_fast", {"cuda_graphs": False}),
    ("InsVPViT, one graph", "insvp_fast", {"cuda_graphs": False}),
)


IN_ORDER = (
    correctness,
    peaks,
    models,
    launches,
    kernels,
    attention,
    sdpa,
    prompters,
    convolutions,
    products,
    graphs,
    others,
)
SECTIONS: dict[str, Callable[[], Iterator[Row]]] = {section.__name__: section for section in IN_ORDER}


def direction_rows(
    row: Row,
    function: Callable[..., object],
    sets: Sequence[Sequence[Tensor]],
    grads: Sequence[Tensor],
    flops: tuple[float, float] = (0.0, 0.0),
    nbytes: tuple[float, float] = (0.0, 0.0),
) -> Iterator[Row]:
    """Time forward, forward + backward, and so backward, of a function of the operands in ``sets``.

    Args:
        flops, nbytes: of forward, and of forward + backward.
    """
    with torch.no_grad():
        forward = timed(lambda i: evaluate(function, sets[i]), flops[0], nbytes[0])
    yield row | {"direction": "forward"} | forward
    both = timed(lambda i: evaluate(function, sets[i], grads), flops[1], nbytes[1])
    yield row | {"direction": "forward + backward"} | both
    yield row | {"direction": "backward, by difference", "us": both["us"] - forward["us"]}


def timed(run: Callable[[int], object], flops: float, nbytes: float = 0.0) -> Row:
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


def normal(*shape: int, grad: bool = False) -> list[Tensor]:
    """``COPIES`` normally distributed tensors."""
    return [torch.randn(shape, device=DEVICE).to(DTYPE).requires_grad_(grad) for _ in range(COPIES)]


if __name__ == "__main__":
    main()
