"""timm's ``VisionTransformer`` with prompts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from insvp_fast.reference.structure import Prompts

__all__ = ["apply_block", "embed", "final_norm", "insert", "patch_size", "require_block", "split", "widths"]

SUPPORTS = frozenset({"reads_tokens", "gives_keys_values", "carry_prompts"})


def patch_size(backbone: VisionTransformer) -> int:
    """P, the side of the backbone's patches."""
    height, width = backbone.patch_embed.patch_size
    if height != width:
        raise ValueError(f"the backbone has {height}x{width} patches: expected square ones")
    return int(height)


def widths(backbone: VisionTransformer) -> list[int]:
    """D of each block."""
    return [backbone.embed_dim] * len(backbone.blocks)


def embed(backbone: VisionTransformer, image: Tensor) -> Tensor:  # [B, C, H, W] -> [B, T, D]
    """Patch and position embedding, and prefix tokens (eq. 1)."""
    tokens = backbone._pos_embed(backbone.patch_embed(image))
    embedded: Tensor = backbone.norm_pre(backbone.patch_drop(tokens))
    return embedded


def insert(tokens: Tensor, prompts: Prompts, prefix: int) -> Tensor:
    """Prompts [B, L, D] between the first ``prefix`` tokens and the others, [B, T+L, D]."""
    return torch.cat([tokens[:, :prefix], prompts.tokens.to(tokens.dtype), tokens[:, prefix:]], dim=1)


def split(z: Tensor, length: int, prefix: int) -> tuple[Tensor, Tensor]:
    """The inverse of ``insert``: tokens [B, T, D] and the ``length`` prompts, [B, L, D]."""
    return torch.cat([z[:, :prefix], z[:, prefix + length :]], dim=1), z[:, prefix : prefix + length]


def apply_block(
    backbone: VisionTransformer, block: int, h: Tensor, prompts: Prompts | None
) -> tuple[Tensor, Tensor | None]:
    """A block of tokens [B, T, D] and prompts, which stand between prefix tokens and patches (eq. 2 and 11)."""
    run, prefix = backbone.blocks[block], backbone.num_prefix_tokens
    if prompts is None:
        return run(h), None  # (2)
    z = insert(h, prompts, prefix)
    z = run(z) if prompts.keys_values is None else _run_with_keys_values(run, z, prompts.keys_values)
    return split(z, prompts.tokens.shape[1], prefix)  # (11)


def require_block(block: Any) -> None:
    """Check that a block is one into which keys and values can be put.

    Raises:
        TypeError: if it is of another class than timm's ``Block``, and may compute something else.
    """
    attn: Any = getattr(block, "attn", None)
    if type(block) is not Block or type(attn) is not Attention or attn.gate is not None:
        raise TypeError(
            f"a block is a {type(block).__name__} with a {type(attn).__name__}: expected timm's Block with an Attention"
            " without a gate, into which keys and values can be put"
        )


def _run_with_keys_values(block: Any, x: Tensor, keys_values: Tensor) -> Tensor:
    """timm's ``Block.forward`` with further keys and values."""
    require_block(block)
    x = x + block.drop_path1(block.ls1(_attend(block.attn, block.norm1(x), keys_values)))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _attend(attn: Attention, x: Tensor, keys_values: Tensor) -> Tensor:
    q, k, v = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, heads, S, d]
    more_k, more_v = keys_values.to(v.dtype).unflatten(-1, (2, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    k, v = torch.cat([attn.k_norm(k).to(v.dtype), more_k], dim=2), torch.cat([v, more_v], dim=2)
    dropout = attn.attn_drop.p if attn.training else 0.0
    attended = F.scaled_dot_product_attention(attn.q_norm(q).to(v.dtype), k, v, dropout_p=dropout, scale=attn.scale)
    projected: Tensor = attn.proj_drop(attn.proj(attn.norm(attended.transpose(1, 2).flatten(2))))
    return projected


def final_norm(backbone: VisionTransformer, h: Tensor) -> Tensor:
    """The norm after the last block."""
    normed: Tensor = backbone.norm(h)
    return normed
