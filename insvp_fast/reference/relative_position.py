"""timm's ``Beit`` and ``VisionTransformerRelPos``: a bias for each pair of tokens, and none for prompts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.beit import Attention, Beit
from timm.models.beit import Block as BeitBlock
from timm.models.vision_transformer_relpos import (
    RelPosAttention,
    RelPosBlock,
    ResPostRelPosBlock,
    VisionTransformerRelPos,
)
from torch import Tensor

from insvp_fast.reference.eva import final_norm
from insvp_fast.reference.structure import Prompts, Stream, require_plain
from insvp_fast.reference.vision_transformer import patch_size, widths

__all__ = ["SUPPORTS", "apply_block", "attention_bias", "embed", "final_norm", "patch_size", "widths"]

SUPPORTS = frozenset({"reads_tokens", "carry_prompts"})


def embed(backbone: Beit | VisionTransformerRelPos, image: Tensor) -> Stream:
    """Patch embedding, class token and, where there is one, position embedding (eq. 1)."""
    tokens = backbone.patch_embed(image)
    if backbone.cls_token is not None:
        tokens = torch.cat([backbone.cls_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
    if isinstance(backbone, VisionTransformerRelPos):
        shared = backbone.shared_rel_pos
        return Stream(tokens, shared_bias=None if shared is None else shared.get_bias())
    if backbone.pos_embed is not None:
        tokens = tokens + backbone.pos_embed
    bias = None if backbone.rel_pos_bias is None else backbone.rel_pos_bias()
    return Stream(backbone.pos_drop(tokens), shared_bias=bias)


def apply_block(
    backbone: Beit | VisionTransformerRelPos, block: int, h: Stream, prompts: Prompts | None
) -> tuple[Stream, Tensor | None]:
    """A block of tokens and prompts, written out: timm's attention takes no other number of tokens (eq. 2 and 11).

    Raises:
        TypeError: for a block or an attention of another class, with a forward of its own, or with hooks.
    """
    run, z, T = backbone.blocks[block], h.tokens, h.tokens.shape[1]
    require_plain(run, BeitBlock, RelPosBlock, ResPostRelPosBlock)
    require_plain(run.attn, Attention, RelPosAttention)
    bias = attention_bias(run.attn, h.shared_bias)
    if prompts is not None:  # behind the tokens, where the bias is filled up for them
        z, L = torch.cat([z, prompts.tokens.to(z.dtype)], dim=1), prompts.tokens.shape[1]
        bias = None if bias is None else F.pad(bias, (0, L, 0, L))
    z = _block(run, z, bias)
    return h._replace(tokens=z[:, :T]), z[:, T:] if prompts is not None else None


def attention_bias(attn: Attention | RelPosAttention, shared: Tensor | None) -> Tensor | None:
    """The bias of the scores in a block, [heads, T, T] or [1, heads, T, T]."""
    if isinstance(attn, RelPosAttention):
        return shared if attn.rel_pos is None else attn.rel_pos.get_bias()
    own: Tensor | None = None if attn.relative_position_bias_table is None else attn._get_rel_pos_bias()
    return shared if own is None else own if shared is None else own + shared


def _block(block: Any, z: Tensor, bias: Tensor | None) -> Tensor:
    if isinstance(block, ResPostRelPosBlock):  # with the norms behind the branches
        z = z + block.drop_path1(block.norm1(_attention(block.attn, z, bias)))
        return z + block.drop_path2(block.norm2(block.mlp(z)))
    if isinstance(block, BeitBlock):
        scale_1, scale_2 = (1 if gamma is None else gamma for gamma in (block.gamma_1, block.gamma_2))
        z = z + block.drop_path1(scale_1 * _attention(block.attn, block.norm1(z), bias))
        return z + block.drop_path2(scale_2 * block.mlp(block.norm2(z)))
    z = z + block.drop_path1(block.ls1(_attention(block.attn, block.norm1(z), bias)))
    return z + block.drop_path2(block.ls2(block.mlp(block.norm2(z))))


def _attention(attn: Attention | RelPosAttention, x: Tensor, bias: Tensor | None) -> Tensor:
    if isinstance(attn, Attention) and attn.q_bias is not None:  # then timm does not call the layer either
        qkv = F.linear(x, attn.qkv.weight, torch.cat([attn.q_bias, attn.k_bias, attn.v_bias]))
    else:
        qkv = attn.qkv(x)
    q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    if isinstance(attn, RelPosAttention):
        q, k = attn.q_norm(q), attn.k_norm(k)
    bias = None if bias is None else bias.to(q.dtype)
    drop = attn.attn_drop.p if attn.training else 0.0
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=drop)
    projected: Tensor = attn.proj_drop(attn.proj(attended.transpose(1, 2).flatten(2)))
    return projected
