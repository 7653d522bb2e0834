"""The frozen Vision Transformer as a sequence of operations: which of timm's are understood, and how one runs.

The exact savings that the equations allow live here: prompts give keys and values only, the last block asks one query
where the head reads
one token, and nothing that only a weight gradient would need is kept.
"""

from __future__ import annotations

import torch
from timm.layers import LayerNorm, LayerScale, Mlp, PatchEmbed
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from insvp_fast import ops, reference

__all__ = ["embed", "forward_block", "misfit"]


def misfit(backbone: VisionTransformer) -> str | None:
    """What in a backbone the operations here do not cover, in words, or None if they cover all of it."""
    embedding = backbone.patch_embed
    if type(backbone) is not VisionTransformer:
        return f"the backbone is a {type(backbone).__name__}"
    if type(embedding) is not PatchEmbed or not isinstance(embedding.norm, nn.Identity) or embedding.dynamic_img_pad:
        return "the patch embedding is not one convolution"
    for j, block in enumerate(backbone.blocks):
        if type(block) is not Block:
            return f"block {j} is a {type(block).__name__}"
        attention, mlp = block.attn, block.mlp
        if type(attention) is not Attention or getattr(attention, "gate", None) is not None:
            return f"the attention of block {j} is a {type(attention).__name__}"
        if attention.proj.out_features != backbone.embed_dim or attention.attn_dim != attention.proj.in_features:
            return f"the attention of block {j} changes the width"
        if type(mlp) is not Mlp or not isinstance(mlp.fc1, nn.Linear) or not isinstance(mlp.norm, nn.Identity):
            return f"the MLP of block {j} is not two linear layers"
        if not _is_erf_gelu(mlp.act):
            return f"the activation of block {j} is {mlp.act}"
        if not all(
            type(norm) in (nn.LayerNorm, LayerNorm) and norm.weight is not None for norm in (block.norm1, block.norm2)
        ):
            return f"block {j} is not normalised by LayerNorm"
        if not all(type(scale) in (nn.Identity, LayerScale) for scale in (block.ls1, block.ls2)):
            return f"block {j} scales its branches by a {type(block.ls1).__name__}"
    return None


def _is_erf_gelu(activation: nn.Module) -> bool:
    return type(activation) is nn.GELU and activation.approximate == "none"


def embed(backbone: VisionTransformer, patches: Tensor, grid: tuple[int, int]) -> Tensor:  # [B, N, K] -> [B, T, D]
    """The patch embedding as a product, with position embedding and prefix tokens (eq. 1)."""
    projection = backbone.patch_embed.proj
    tokens = ops.linear(patches, projection.weight.flatten(1), projection.bias)
    # position embedding and prefix tokens are what timm makes of an image whose patches embed to zero
    zeros = tokens.new_zeros((1, *grid, tokens.shape[-1]) if backbone.dynamic_img_size else (1, *tokens.shape[1:]))
    constant = backbone._pos_embed(zeros)
    return backbone.norm_pre(nn.functional.pad(tokens, (0, 0, backbone.num_prefix_tokens, 0)) + constant)


def forward_block(
    block: Block,
    residual: Tensor,  # [B, T, D]
    branch: Tensor | None,  # [B, T, D], not yet added to the residual
    prompts: Tensor | None,  # [B, L, D]
    dtype: torch.dtype,
    num_queries: int | None = None,
) -> tuple[Tensor, Tensor]:  # residual and branch, [B, num_queries or T, D]
    """One transformer block (eq. 11); its last sum is left to the next block's norm.

    With ``num_queries``, only the first tokens are carried on: all others serve as keys and values and end here.
    """
    norm1, norm2, attn, mlp = block.norm1, block.norm2, block.attn, block.mlp
    residual, y = ops.norm_insert(residual, branch, prompts, norm1.weight, norm1.bias, norm1.eps, dtype=dtype)
    if num_queries is None:
        attended = _attend(attn, y, residual.shape[1])
    else:
        attended = _attend_few(attn, y, num_queries)
        residual = residual[:, :num_queries]
    branch = block.ls1(ops.linear(_widened(attn.norm, attended), attn.proj.weight, attn.proj.bias))
    residual, y = ops.norm_insert(residual, branch, None, norm2.weight, norm2.bias, norm2.eps, dtype=dtype)
    hidden = ops.gelu(ops.linear(y, mlp.fc1.weight, mlp.fc1.bias))
    return residual, block.ls2(ops.linear(hidden, mlp.fc2.weight, mlp.fc2.bias))


def _attend(attn: Attention, y: Tensor, num_queries: int) -> Tensor:  # [B, S, D] -> [B, T, D]
    qkv = ops.linear(y, attn.qkv.weight, attn.qkv.bias)
    if not isinstance(attn.q_norm, nn.Identity):
        q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).unbind(2)
        qkv = torch.stack([_widened(attn.q_norm, q), _widened(attn.k_norm, k), v], dim=2).flatten(2)
    return ops.attention(qkv, attn.num_heads, num_queries, attn.scale)


def _attend_few(attn: Attention, y: Tensor, num_queries: int) -> Tensor:  # [B, S, D] -> [B, num_queries, D]
    weight, bias, D = attn.qkv.weight, attn.qkv.bias, attn.attn_dim
    q = ops.linear(y[:, :num_queries], weight[:D], None if bias is None else bias[:D])
    kv = ops.linear(y, weight[D:], None if bias is None else bias[D:])
    q = _widened(attn.q_norm, q.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2))
    k, v = kv.unflatten(-1, (2, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    # so few queries that the probabilities are cheaper to keep than to make again
    probabilities = (attn.scale * q @ _widened(attn.k_norm, k).mT).softmax(dim=-1)
    return reference.merge_heads(probabilities @ v)


def _widened(norm: nn.Module, x: Tensor) -> Tensor:
    """A norm inside the attention, in the dtype of its weights, back in that of its input."""
    return x if isinstance(norm, nn.Identity) else norm(x.to(next(norm.parameters()).dtype)).to(x.dtype)
