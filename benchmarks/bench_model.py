"""Whole models: inference, forward + backward and training step of the providers of ``benchmarks/models.py``.

Dropout and the learning rate are 0, so that every step gives the same values and parity can be asserted on them;
``benchmarks/paired.py`` times steps that do train.
"""

import pytest
import torch

from benchmarks.models import RELEASE, make_model, without_dropout
from benchmarks.operations import time_run
from benchmarks.parity import assert_parity
from benchmarks.rates import add_rates
from insvp_fast.bench.floor import needed_flops
from insvp_fast.bench.jobs import AUTOCAST_DTYPES, JOBS
from insvp_fast.bench.models import CONFIGS
from insvp_fast.bench.timing import peak_bytes, saved_mb_per_image
from insvp_fast.runtime import hardware
from insvp_fast.testing import DEVICE

PLAIN = ("bare", "reference", "insvp_fast")
COMPILED = tuple(f"{provider} compiled" for provider in PLAIN)


def cases():
    """Provider, model, configuration, precision, batch and job."""
    small, base, large = (f"vit_{size}_patch16_224" for size in ("small", "base", "large"))
    if DEVICE.type == "cpu":
        for provider in PLAIN:
            for precision, job in (
                ("fp32", "inference"),
                ("fp32", "forward + backward"),
                ("fp32", "training step"),
                ("bf16", "training step"),
            ):
                yield provider, small, "paper", precision, 2, job
            yield provider, base, "paper", "fp32", 2, "training step"
        yield from (("insvp_fast", large, "paper", "fp32", 1, job) for job in JOBS)
        yield "bare", large, "paper", "fp32", 1, "training step"
        for provider in (*RELEASE, "reference", "insvp_fast"):
            yield provider, base, "released", "fp32", 2, "training step"
        yield from (
            (provider, small, "paper", "fp32", 2, "training step")
            for provider in ("bare compiled", "insvp_fast compiled")
        )
        return
    for precision in ("fp32", "bf16"):
        for job in JOBS:
            for name in (small, base, large):
                for batch in (1, 16, 64, 256, 1024, 4096):  # those that do not fit are skipped
                    yield from ((provider, name, "paper", precision, batch, job) for provider in PLAIN)
            for batch in (64, 256):
                yield from ((provider, base, "paper", precision, batch, job) for provider in COMPILED)
                yield from ((provider, base, "released", precision, batch, job) for provider in (*RELEASE, *PLAIN[1:]))


CASES = list(dict.fromkeys(cases()))


@pytest.mark.parametrize(
    ("provider", "name", "config", "precision", "batch", "job"), CASES, ids=lambda part: str(part).replace(" ", "_")
)
def bench_model(benchmark, tiny, provider, name, config, precision, batch, job):
    amp, depth = AUTOCAST_DTYPES[precision], {"depth": 1} if tiny else {}
    batch = 1 if tiny else batch
    if DEVICE.type == "cpu" and amp is not None and not hardware.has_products(amp):
        pytest.skip(
            "without instructions for bf16, PyTorch's own products take minutes; benchmarks/paired.py times them"
        )
    benchmark.group = f"{name}, {config}, {job}, {precision}, batch {batch}"
    still = without_dropout(CONFIGS[config])
    model = make_model(provider, name, still, **depth)
    run = JOBS[job](model, batch, amp, **({"lr": 0.0} if job == "training step" else {}))
    try:
        results = time_run(benchmark, run, budget=3.0)
        if provider != "authors":  # its weights are its own
            benchmark.extra_info.update(assert_parity(results, provider, amp, name, batch, still, **depth))
    except torch.cuda.OutOfMemoryError:
        pytest.skip(f"batch {batch} does not fit")
    backward = job != "inference"
    if backward:
        benchmark.extra_info["saved MB per image"] = saved_mb_per_image(provider, model, batch, amp)
    if DEVICE.type == "cuda":
        benchmark.extra_info["peak MB"] = peak_bytes(run, model) / 1e6
    kind = "bare" if provider.startswith("bare") else "reference"
    add_rates(benchmark, amp or torch.float32, batch * needed_flops(kind, name, still, backward, **depth))
    if benchmark.stats is not None:
        benchmark.extra_info["images/s"] = batch / benchmark.stats.stats.median
