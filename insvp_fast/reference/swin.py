"""timm's ``SwinTransformer`` with prompts: they are keys and values in every window of a block, and nothing else.

In a window the scores of its tokens get the relative position bias and the mask of shifted windows; those of prompts
get neither, because prompts have no position. h is [B, H, W, D], as in timm; D and the grid change from stage to stage.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import (
    SwinTransformer,
    SwinTransformerBlock,
    WindowAttention,
    window_partition,
    window_reverse,
)
from torch import Tensor

from insvp_fast.reference.structure import Prompts, require_plain, square_side

__all__ = ["SUPPORTS", "apply_block", "block_with_prompts", "embed", "final_norm", "locate", "patch_size", "widths"]

SUPPORTS: frozenset[str] = frozenset()


def patch_size(backbone: SwinTransformer) -> int:
    """P, the side of the backbone's patches."""
    return square_side(*backbone.patch_embed.patch_size)


def locate(backbone: SwinTransformer, block: int) -> tuple[int, int]:
    """The stage that a block of the backbone is in, and its number there."""
    for stage, layer in enumerate(backbone.layers):
        if block < len(layer.blocks):
            return stage, block
        block -= len(layer.blocks)
    raise IndexError(f"the backbone has no block {block} behind its last")


def widths(backbone: SwinTransformer) -> list[int]:
    """D of each block."""
    if empty := [i for i, stage in enumerate(backbone.layers) if not len(stage.blocks)]:
        raise ValueError(f"stage {empty[0]} of the backbone has no blocks: expected one at least")
    return [block.dim for stage in backbone.layers for block in stage.blocks]


def embed(backbone: SwinTransformer, image: Tensor) -> Tensor:  # [B, C, H, W] -> [B, H/P, W/P, D]
    """The patch embedding (eq. 1)."""
    embedded: Tensor = backbone.patch_embed(image)
    return embedded


def apply_block(
    backbone: SwinTransformer, block: int, h: Tensor, prompts: Prompts | None
) -> tuple[Tensor, Tensor | None]:
    """A block of tokens [B, H, W, D] and prompts (eq. 2 and 11), behind the merging of patches where a stage begins."""
    stage, number = locate(backbone, block)
    layer = backbone.layers[stage]
    h = layer.downsample(h) if number == 0 else h
    if prompts is None:
        return layer.blocks[number](h), None  # (2)
    return block_with_prompts(layer.blocks[number], h, prompts.tokens), None  # (11)


def block_with_prompts(block: Any, h: Tensor, prompts: Tensor) -> Tensor:
    """timm's ``SwinTransformerBlock.forward`` of h [B, H, W, D], with prompts [B, L, D].

    Neither this block nor its attention is called as a module, only those inside.

    Raises:
        TypeError: for a block of another class, with a forward of its own, or with hooks.
    """
    require_plain(block, SwinTransformerBlock)
    require_plain(block.attn, WindowAttention)
    normed, inserted = block.norm1(h), block.norm1(prompts.to(h.dtype))
    h = h + block.drop_path1(_attend_in_windows(block, normed, inserted))
    tokens = h.flatten(1, 2)
    tokens = tokens + block.drop_path2(block.mlp(block.norm2(tokens)))
    return tokens.view(h.shape)


def _attend_in_windows(block: SwinTransformerBlock, x: Tensor, prompts: Tensor) -> Tensor:
    """Attention of the tokens [B, H, W, D] of each window to one another and to the prompts [B, L, D]."""
    (H, W), (height, width), (down, right) = x.shape[1:3], block.window_size, block.shift_size
    shifted = torch.roll(x, (-down, -right), (1, 2))
    padded = F.pad(shifted, (0, 0, 0, -W % width, 0, -H % height))
    windows = window_partition(padded, block.window_size).flatten(1, 2)  # [B·n, w, D]
    mask = block.get_attn_mask(padded) if block.dynamic_mask else block.attn_mask  # [n, w, w]
    n = (padded.shape[1] // height) * (padded.shape[2] // width)
    attended = _attend(block.attn, windows, prompts.repeat_interleave(n, dim=0), mask)
    attended = attended.unflatten(1, block.window_size)
    shifted = window_reverse(attended, block.window_size, *padded.shape[1:3])[:, :H, :W]
    return torch.roll(shifted, (down, right), (1, 2))


def _attend(attn: WindowAttention, windows: Tensor, prompts: Tensor, mask: Tensor | None) -> Tensor:
    """timm's ``WindowAttention.forward`` of windows [B·n, w, D], with the prompts [B·n, L, D] of each one's image."""
    L = prompts.shape[1]
    q, k, v = _split_heads(attn.qkv(windows), attn.num_heads)  # [B·n, heads, w, d]
    _, k_prompts, v_prompts = _split_heads(attn.qkv(prompts), attn.num_heads)
    summand = attn._get_rel_pos_bias()  # [1, heads, w, w]
    if mask is not None:
        summand = (summand + mask.unsqueeze(1)).repeat(windows.shape[0] // mask.shape[0], 1, 1, 1)
    scores = (q * attn.scale) @ torch.cat([k, k_prompts], dim=2).mT + F.pad(summand, (0, L))
    probabilities = attn.attn_drop(attn.softmax(scores))
    out = probabilities @ torch.cat([v, v_prompts], dim=2)
    return attn.proj_drop(attn.proj(out.transpose(1, 2).flatten(2)))


def _split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """Queries, keys and values, [B, heads, S, d], from their packed product [B, S, 3·D]."""
    return qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def final_norm(backbone: SwinTransformer, h: Tensor) -> Tensor:
    """The norm after the last block, [B, H, W, D]."""
    normed: Tensor = backbone.norm(h)
    return normed
