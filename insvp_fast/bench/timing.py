"""Runs that alternate in one process, and the rows of results that come of them.

A ratio is the median over pairs of runs that followed one another, so that a machine that is slower for a while slows
both. So is the floor ratio: the products of a block are timed in the same rounds. What else runs at the same time can
still slow one model more than another, above all if OpenMP's threads spin while they wait (OMP_WAIT_POLICY).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from insvp_fast.bench.floor import BlockProducts, needed_flops
from insvp_fast.bench.jobs import AUTOCAST_DTYPES, JOBS
from insvp_fast.bench.models import CONFIGS, make_images, make_model
from insvp_fast.testing import DEVICE, relative_error, saved_bytes

__all__ = ["Row", "alternate", "clock", "compare", "median_and_spread", "peak_bytes", "saved_mb_per_image", "summarize"]

Row = dict[str, Any]


def clock() -> float:
    """Seconds, after waiting for the GPU to finish what was launched."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def alternate(
    runs: Mapping[str, Callable[[], object]], rounds: int, warmup: float | None = None
) -> dict[str, list[float]]:
    """Time all runs in turn, ``rounds`` times.

    Args:
        warmup: seconds of untimed rounds before, at least one round; by default 0, and 3 on a GPU, whose clocks have to
            rise first.

    Returns:
        The seconds of each run in each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    begin, warmup = clock(), (3.0 if DEVICE.type == "cuda" else 0.0) if warmup is None else warmup
    warm = False
    while len(next(iter(seconds.values()))) < rounds:
        for name, run in runs.items():
            start = clock()
            run()
            elapsed = clock() - start
            if warm:
                seconds[name].append(elapsed)
        warm = warm or clock() - begin >= warmup
    return seconds


def median_and_spread(values: Sequence[float]) -> tuple[float, float, float]:
    """The median and the 20th and 80th percentile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    p20, _, _, p80 = statistics.quantiles(values, n=5, method="inclusive")
    return statistics.median(values), p20, p80


def summarize(seconds: Sequence[float], baseline: Sequence[float]) -> Row:
    """The median of ``seconds``, and of their ratios to those of ``baseline`` in the same rounds, with its spread."""
    ratio, p20, p80 = median_and_spread([mine / other for mine, other in zip(seconds, baseline, strict=True)])
    return {"seconds": median_and_spread(seconds)[0], "ratio": ratio, "ratio p20": p20, "ratio p80": p80}


def compare(
    job: str,
    precision: str,
    providers: Sequence[str],
    name: str,
    batch: int,
    rounds: int,
    config: str = "paper",
    make: Callable[..., nn.Module] = make_model,
    **backbone_kwargs: Any,
) -> list[Row]:
    """Time models against each other.

    Args:
        job: one of ``JOBS``.
        precision: one of ``AUTOCAST_DTYPES``.
        providers: what ``make`` builds; ratios are to the first.
        name: of the model in timm, a ViT or a Swin.
        config: one of ``CONFIGS``.
        backbone_kwargs: for ``timm.create_model``; ``make`` gets them too.

    Returns:
        One row per provider: median seconds, ratio, the floor ratio and the rates of products that it is made of, and
        for inference the relative error of the logits against float64, for the other jobs the memory that the forward
        pass saves for backward; on a GPU also its peak memory.
    """
    amp = AUTOCAST_DTYPES[precision]
    models = {provider: make(provider, name, CONFIGS[config], **backbone_kwargs) for provider in providers}
    runs = {provider: JOBS[job](model, batch, amp) for provider, model in models.items()}
    block = BlockProducts(name, CONFIGS[config], batch, amp or torch.float32, **backbone_kwargs)
    seconds = alternate({**runs, **block.runs}, rounds)
    exact: dict[str, Tensor] = {}
    rows = []
    for provider, model in models.items():
        row: Row = {"job": job, "precision": precision, "provider": provider, "model": name, "config": config}
        row |= {"batch": batch, "rounds": rounds, **summarize(seconds[provider], seconds[providers[0]])}
        row["images per second"] = batch / row["seconds"]
        kind = "bare" if provider.startswith("bare") else "reference"
        flops = batch * needed_flops(kind, name, CONFIGS[config], job != "inference", **backbone_kwargs)
        row |= {"floor ratio": block.floor_ratio(seconds[provider], flops, seconds), "products": block.rates(seconds)}
        if DEVICE.type == "cuda":
            row["peak MB"] = peak_bytes(runs[provider], model) / 1e6
        if job != "inference":
            row["saved MB per image"] = saved_mb_per_image(provider, model, batch, amp)
        elif provider != "authors":  # its weights are its own
            if kind not in exact:
                exact[kind] = _exact_logits(kind, name, batch, config, **backbone_kwargs)
            row["error"] = relative_error(runs[provider]()["logits"], exact[kind])
        rows.append(row)
    return rows


def _exact_logits(kind: str, name: str, batch: int, config: str, **kwargs: Any) -> Tensor:
    model = make_model(kind, name, CONFIGS[config], **kwargs).double().eval()
    with torch.inference_mode():
        return model(make_images(model, batch)[0].double())


def saved_mb_per_image(provider: str, model: nn.Module, batch: int, amp: torch.dtype | None) -> float:
    """Megabytes per image that a forward pass saves for backward; the batch is that of the timed runs, or a compiled
    model would be compiled again."""
    image, _ = make_images(model, batch)
    image.requires_grad_(provider.startswith("bare"))
    return saved_bytes(model, image, amp) / batch / 1e6


def peak_bytes(run: Callable[[], object], model: Any = None) -> int:
    """Peak GPU memory of a run, beyond what was allocated before it.

    A ``model`` runs without its CUDA graphs, which take as much, but hold it before the run.
    """
    graphs = getattr(model, "cuda_graphs", None)
    if graphs is not None:
        model.cuda_graphs = False
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    if graphs is not None:
        model.cuda_graphs = graphs
    return torch.cuda.max_memory_allocated() - before
