"""timm's ``SwinTransformer``: what the fast path requires of it, and how it runs as a sequence of operations.

The tokens of all stages stay [B, T, D] in the order of the picture. A window is a list of tokens, and shifted windows
are other lists: nothing is rolled, cut, padded or put together again.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import timm.models.swin_transformer as timm_swin
import torch
import torch.nn.functional as F
from timm.layers import Format, PatchEmbed
from timm.models.swin_transformer import (
    PatchMerging,
    SwinTransformer,
    SwinTransformerBlock,
    SwinTransformerStage,
    WindowAttention,
)
from torch import Tensor, nn

from insvp_fast import ops
from insvp_fast.backbones.family import BlockOptions
from insvp_fast.backbones.layers import forward_mlp, is_operation, norm_insert, norm_requirements
from insvp_fast.backbones.vision_transformer import check_image, filled_size, patch_projection, pixel_weight
from insvp_fast.backbones.vit_blocks import branch_requirements, inactive_dropout, prefixed
from insvp_fast.backbones.windows import position_bias, tokens_of_windows
from insvp_fast.coverage import Table, rule, watch
from insvp_fast.coverage.rules import CALLED, DROPOUT_OFF, IDENTITY, LINEAR, difference
from insvp_fast.ops import FrozenLinear
from insvp_fast.reference import Prompts
from insvp_fast.reference.swin import locate
from insvp_fast.runtime import buffers, native
from insvp_fast.runtime.elementwise import put, put_sum

__all__ = [
    "SUPPORTS",
    "attention_choices",
    "check_image",
    "embed",
    "embeds_by_operations",
    "final_norm",
    "forward_block",
    "only_operations",
    "pixel_weight",
    "read_tokens",
    "requirements",
    "shared",
]

SUPPORTS: frozenset[str] = frozenset()

# What is supported

watch("forward __call__", SwinTransformer, SwinTransformerStage, SwinTransformerBlock, WindowAttention, PatchMerging)
watch("forward __call__", PatchEmbed, nn.Softmax)
watch("_attn get_attn_mask", SwinTransformerBlock)
watch("_get_rel_pos_bias", WindowAttention)
watch("forward_head", SwinTransformer)
watch("window_partition window_reverse", timm_swin)
watch("scaled_dot_product_attention", F)


def requirements(backbone: SwinTransformer, patch_size: int) -> Table:
    """What the fast path requires of the backbone's modules."""
    sides, grid = (patch_size, patch_size), getattr(backbone.patch_embed, "grid_size", None) or (0, 0)
    embedding = {
        "patch_size": sides,
        "flatten": False,
        "output_fmt": Format.NHWC,
        "strict_img_size": True,  # else the attention masks are made anew for each image
        "dynamic_img_pad": False,
        "img_size": filled_size(backbone.patch_embed),
    }
    table: Table = {
        # any attributes: they are read by timm's methods, which both paths call
        "": (rule(SwinTransformer, " ".join(vars(backbone))),),
        "patch_embed": (rule(PatchEmbed, "grid_size num_patches", **embedding),),
        "patch_embed.proj": (patch_projection(patch_size),),
        "patch_embed.norm": CALLED,
        "layers": (rule(nn.Sequential),),
        "norm": CALLED,
        "head": CALLED,
    }
    for i, stage in enumerate(backbone.layers):
        merged = tuple(side // 2 for side in grid) if i else grid
        resolutions: dict[str, Any] = {"input_resolution": grid, "output_resolution": merged}
        if i and any(side % 2 for side in grid):
            resolutions["input_resolution"] = "even sides, which patches can be merged in without padding"
        table[f"layers.{i}"] = (rule(SwinTransformerStage, "dim depth grad_checkpointing", **resolutions),)
        table |= prefixed(f"layers.{i}.downsample", _merging(stage, first=i == 0))
        table[f"layers.{i}.blocks"] = (rule(nn.Sequential),)
        for n, block in enumerate(getattr(stage, "blocks", ())):
            table |= prefixed(f"layers.{i}.blocks.{n}", _block_requirements(block, merged))
        grid = merged
    return table


def _merging(stage: nn.Module, first: bool) -> Table:
    if first:
        return {"": (IDENTITY,)}
    width = 4 * getattr(getattr(stage, "downsample", None), "dim", 0)
    return {"": (rule(PatchMerging, "dim out_dim"),), ".norm": norm_requirements(width), ".reduction": LINEAR}


def _block_requirements(block: nn.Module, grid: tuple[int, ...]) -> Table:
    width, window = getattr(block, "dim", 0), getattr(block, "window_size", (1, 1))
    fits = [side % part for side, part in zip(grid, window, strict=False)] == [0, 0]
    shape: dict[str, Any] = {
        "dim": width,
        "input_resolution": grid,
        "window_size": window if fits else f"a divisor of the grid {grid[0]}x{grid[1]}, which needs no padding",
        "dynamic_mask": False,
    }
    free = "target_shift_size always_partition shift_size window_area mlp_ratio"
    return {
        # the buffers are read, whatever they hold
        "": (rule(SwinTransformerBlock, free, buffers="attn_mask", **shape),),
        **branch_requirements(block, width, _attention_requirements(getattr(block, "attn", None), window)),
    }


def _attention_requirements(attn: nn.Module | None, window: tuple[int, int]) -> Table:
    sizes: dict[str, Any] = {"window_size": window, "window_area": math.prod(window), **inactive_dropout(attn)}
    own = rule(
        WindowAttention,
        "dim num_heads scale fused_attn",
        required="relative_position_bias_table",
        buffers="relative_position_index",
        **sizes,
    )
    return {
        "": (own,),
        ".qkv": LINEAR,
        ".attn_drop": DROPOUT_OFF,
        ".softmax": (rule(nn.Softmax, dim=-1),),
        ".proj": LINEAR,
        ".proj_drop": DROPOUT_OFF,
    }


def attention_choices(backbone: SwinTransformer) -> tuple[str, ...]:
    """The implementations of the attention in windows."""
    return ops.WINDOW_ATTENTION


# How it runs


def read_tokens(backbone: SwinTransformer) -> None:
    """All: there is no class token."""


def shared(backbone: SwinTransformer, grid: tuple[int, int]) -> None:
    """Nothing."""


def embed(backbone: SwinTransformer, patches: Tensor, grid: tuple[int, int]) -> Tensor:  # [B, N, K] -> [B, N, D]
    """The patch embedding as a product, and its norm (eq. 1)."""
    projection, norm = backbone.patch_embed.proj, backbone.patch_embed.norm
    tokens, dtype = ops.linear(patches, FrozenLinear.of(projection)), projection.weight.dtype
    if embeds_by_operations(backbone) and not isinstance(norm, nn.Identity):
        native.lasting(norm.weight, norm.bias)
        return ops.norm_insert(tokens, None, None, norm.weight, norm.bias, norm.eps, dtype=dtype)[1]
    embedded: Tensor = norm(tokens if isinstance(norm, nn.Identity) else tokens.to(dtype))
    return embedded


def embeds_by_operations(backbone: SwinTransformer) -> Hashable:
    """What is read of the norm of the embedding, which may be anything, where it is a LayerNorm.

    Its tensors by their ids, which no others get, as a program holds them. Not on GPUs, where no graph of a Swin was
    tried.
    """
    projection, norm = backbone.patch_embed.proj, backbone.patch_embed.norm
    layer_norm, of_timm, _ = norm_requirements(projection.out_channels)
    known = difference(norm, (IDENTITY, layer_norm, of_timm), frozen=True) is None
    tensors = [*norm.parameters()] if known else []
    known = known and all(x.dtype == projection.weight.dtype for x in tensors)
    return projection.weight.is_cpu and known and ("eps", getattr(norm, "eps", None), *map(id, tensors))


def forward_block(
    backbone: SwinTransformer,
    block: int,
    residual: Tensor,  # [B, T, D]
    branch: Tensor | None,  # [B, T, D], not yet added to the residual
    prompts: Prompts | None,
    options: BlockOptions,
    num_queries: int | None = None,
) -> tuple[Tensor, Tensor]:  # residual and branch, [B, T, D], or of the next stage's T and D
    """One block (eq. 11), whose last sum is left to the next block's norm; before it, where a stage begins, merging."""
    stage, number = locate(backbone, block)
    layer, (height, width) = backbone.layers[stage], options.grid
    grid = height >> stage, width >> stage
    if stage > 0 and number == 0:
        residual, branch = _merge(layer.downsample, residual, branch, grid, options), None
    blk = layer.blocks[number]
    attn, mlp = blk.attn, blk.mlp
    residual, y, affine = norm_insert(blk.norm1, residual, branch, prompts, options)
    qkv = ops.linear(y, FrozenLinear.of(attn.qkv, *affine))
    windows = tokens_of_windows(grid, tuple(blk.window_size), tuple(blk.shift_size), residual)
    summands = position_bias(attn), blk.attn_mask
    native.lasting(windows, blk.attn_mask)
    out = ops.window_attention(qkv, attn.num_heads, windows, *summands, attn.scale, impl=options.attention)
    branch = ops.linear(out, FrozenLinear.of(attn.proj))
    residual, y, affine = norm_insert(blk.norm2, residual, branch, None, options)
    return residual, forward_mlp(mlp, y, affine, options.mlp_keeps)


def only_operations(
    backbone: SwinTransformer, block: int, options: BlockOptions, num_tokens: int, num_queries: int | None
) -> bool:
    """Not of an MLP that is more than an operation."""
    stage, number = locate(backbone, block)
    return is_operation(backbone.layers[stage].blocks[number].mlp)


def _merge(
    merging: PatchMerging, residual: Tensor, branch: Tensor | None, grid: tuple[int, int], options: BlockOptions
) -> Tensor:  # [B, 4·T, D] -> [B, T, 2·D]
    """Four tokens as one, on the way to a coarser ``grid``; in a square timm counts downwards first."""
    squares: Tensor = _Squares.apply(residual, branch, *grid)
    _, y, affine = norm_insert(merging.norm, squares, None, None, options)
    return ops.linear(y, FrozenLinear.of(merging.reduction, *affine))


class _Squares(torch.autograd.Function):
    """The sum of residual and branch, [B, 4·T, D], as [B, T, 4·D], in memory that is used again."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, branch: Tensor | None, height: int, width: int) -> Tensor:
        ctx.grid, ctx.dtypes = (height, width), (residual.dtype, None if branch is None else branch.dtype)
        B, tokens, D = residual.shape
        dtype = residual.dtype if branch is None else torch.promote_types(residual.dtype, branch.dtype)
        squares = buffers.empty((B, tokens // 4, 4 * D), dtype, residual.device)
        added = None if branch is None else _of_rows(branch, ctx.grid)
        put_sum(_of_squares(squares, ctx.grid), _of_rows(residual, ctx.grid), 1, added, 1)
        return squares

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        B, T, D4 = grad.shape
        rows = buffers.empty((B, 4 * T, D4 // 4), grad.dtype, grad.device)
        put(_of_rows(rows, ctx.grid), _of_squares(grad, ctx.grid))
        grads = {grad.dtype: rows}
        for dtype in {*ctx.dtypes} - {None, grad.dtype}:
            grads[dtype] = buffers.empty(rows.shape, dtype, grad.device)
            put_sum(grads[dtype], rows, 1, None, 0)
        d_residual, d_branch = map(grads.get, ctx.dtypes)
        return d_residual, d_branch, None, None


# both as [B, height, 2, width, 2, D], a view


def _of_rows(x: Tensor, grid: tuple[int, int]) -> Tensor:
    view: Tensor = x.unflatten(1, (grid[0], 2, grid[1], 2))
    return view


def _of_squares(x: Tensor, grid: tuple[int, int]) -> Tensor:
    view: Tensor = x.unflatten(2, (2, 2, -1)).unflatten(1, grid)
    return view.permute(0, 1, 4, 2, 3, 5)


def final_norm(backbone: SwinTransformer, tokens: Tensor, grid: tuple[int, int]) -> Tensor:  # -> [B, H, W, D]
    """The norm after the last block, of the last stage's grid."""
    last = len(backbone.layers) - 1
    normed: Tensor = backbone.norm(tokens.unflatten(1, (grid[0] >> last, grid[1] >> last)))
    return normed
