"""FLOP/s and bytes per second, beside the highest that this machine reached in the same session."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from torch.utils.flop_counter import FlopCounterMode

from insvp_fast import InsVPConfig, InsVPReference, ops
from insvp_fast.bench.timing import alternate
from insvp_fast.testing import DEVICE

__all__ = ["add_rates", "model_flops", "peak_bandwidth", "peak_flops"]


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
    n = 1536 if DEVICE.type == "cpu" else 8192
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
        return min(alternate({"": run}, 50)[""])


@functools.cache
def model_flops(kind: str, name: str, config: InsVPConfig, backward: bool, **backbone_kwargs: Any) -> float:
    """The least floating-point operations that a model needs for one image.

    The bare backbone needs all of its own. With prompts, these are the operations left by the exact savings: prompts
    give keys and values only, and the last block of a ViT has one query. Backward adds each frozen product once,
    attention two and a half times and the prompters twice.
    """
    with torch.device("meta"):
        backbone = timm.create_model(name, **backbone_kwargs)
        model = None if kind == "bare" else InsVPReference(backbone, None, config)
        image = torch.empty(1, 3, *backbone.patch_embed.img_size)
    with FlopCounterMode(display=False) as prompters, torch.no_grad():
        if model is not None:
            model.specific_prompt(image, model.image_prompt(image).prompted)
    L = 0 if model is None else config.prompt_length
    terms = _swin_terms if isinstance(backbone, SwinTransformer) else _vit_terms
    products, scores = terms(backbone, L, model is not None)
    once, backward_too = 2 * (products + scores) + prompters.get_total_flops(), 2 * products + 5 * scores
    return once + (backward_too + 2 * prompters.get_total_flops()) * backward


def _vit_terms(backbone: Any, L: int, saves: bool) -> tuple[float, float]:
    """The multiplications of a ViT's frozen products and of its attention; ``saves``: one query in the last block."""
    D, J, N = backbone.embed_dim, len(backbone.blocks), backbone.patch_embed.num_patches
    T, hidden = N + backbone.num_prefix_tokens, backbone.blocks[0].mlp.fc1.out_features
    queries = (J - 1) * T + (1 if saves else T)
    products = _patch_embedding(backbone) + queries * 2 * D * (D + hidden) + J * (T + L) * 2 * D * D
    return products, queries * (T + L) * 2 * D


def _swin_terms(backbone: Any, L: int, saves: bool) -> tuple[float, float]:
    """As ``_vit_terms``; there is no query to save."""
    products, scores = _patch_embedding(backbone), 0.0
    for stage in backbone.layers:
        T = math.prod(stage.output_resolution)
        if stage.downsample is not backbone.layers[0].downsample:
            products += T * stage.downsample.reduction.weight.numel()
        for block in stage.blocks:
            D, hidden = block.dim, block.mlp.fc1.out_features
            products += T * 2 * D * (D + hidden) + (T + L) * 2 * D * D
            scores += T * (block.window_area + L) * 2 * D
    return products, scores


def _patch_embedding(backbone: Any) -> float:
    return float(backbone.patch_embed.num_patches * backbone.patch_embed.proj.weight.numel())
