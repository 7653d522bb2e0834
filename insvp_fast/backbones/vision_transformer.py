"""The frozen Vision Transformer as a sequence of operations, for those that ``plan.py`` covers.

The exact savings that the equations allow live here: prompts give keys and values only, the last block asks one query
where the head reads one token, and nothing that only a weight gradient would need is kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from insvp_fast import ops
from insvp_fast.ops import FrozenLinear
from insvp_fast.runtime import buffers

__all__ = ["How", "embed", "forward_block"]


def embed(backbone: VisionTransformer, patches: Tensor, grid: tuple[int, int]) -> Tensor:  # [B, N, K] -> [B, T, D]
    """The patch embedding as a product, with position embedding and prefix tokens (eq. 1)."""
    projection = backbone.patch_embed.proj
    tokens = ops.linear(patches, FrozenLinear(projection.weight, projection.bias))
    # position embedding and prefix tokens are what timm makes of an image whose patches embed to zero
    zeros = tokens.new_zeros((1, *grid, tokens.shape[-1]) if backbone.dynamic_img_size else (1, *tokens.shape[1:]))
    return backbone.norm_pre(_Embed.apply(tokens, backbone._pos_embed(zeros)))


class _Embed(torch.autograd.Function):
    """Add [1, T, D] to tokens [B, N, D] that lack the first of T; [B, T, D]."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, constant: Tensor) -> Tensor:
        ctx.prefix, ctx.dtype = constant.shape[1] - tokens.shape[1], tokens.dtype
        dtype = torch.promote_types(tokens.dtype, constant.dtype)
        x = buffers.empty((tokens.shape[0], *constant.shape[1:]), dtype, tokens.device)
        x[:, : ctx.prefix] = constant[:, : ctx.prefix]
        x[:, ctx.prefix :].copy_(tokens).add_(constant[:, ctx.prefix :])
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        d_tokens = grad[:, ctx.prefix :]
        return buffers.empty(d_tokens.shape, ctx.dtype, grad.device).copy_(d_tokens), None


class How(NamedTuple):
    """How the blocks are computed; the numbers are the same."""

    dtype: torch.dtype  # of the products
    fold_norm: bool  # the affine map of a norm into the product behind it
    attention: str  # the implementation, see ``ops.attention``; not for blocks that ask only some queries
    mlp_keeps: str  # for backward, see ``ops.mlp``


def forward_block(
    block: Block,
    residual: Tensor,  # [B, T, D]
    branch: Tensor | None,  # [B, T, D], not yet added to the residual
    prompts: Tensor | None,  # [B, L, D]
    how: How,
    num_queries: int | None = None,
) -> tuple[Tensor, Tensor]:  # residual and branch, [B, num_queries or T, D]
    """One transformer block (eq. 11); its last sum is left to the next block's norm.

    With ``num_queries``, only the first tokens are carried on: all others serve as keys and values and end here.
    """
    attn, mlp = block.attn, block.mlp
    residual, y, affine = _norm(block.norm1, residual, branch, prompts, how)
    if num_queries is None:
        attended = _attend(attn, y, affine, residual.shape[1], how)
    else:
        attended = _attend_few(attn, y, affine, num_queries)
        residual = _First.apply(residual, num_queries)
    branch = block.ls1(ops.linear(_in_own_dtype(attn.norm, attended), FrozenLinear(attn.proj.weight, attn.proj.bias)))
    residual, y, affine = _norm(block.norm2, residual, branch, None, how)
    fc1 = FrozenLinear(mlp.fc1.weight, mlp.fc1.bias, **affine)
    return residual, block.ls2(ops.mlp(y, fc1, FrozenLinear(mlp.fc2.weight, mlp.fc2.bias), keep=how.mlp_keeps))


def _norm(
    norm: nn.LayerNorm, residual: Tensor, branch: Tensor | None, prompts: Tensor | None, how: How
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The stream, the normalised buffer, and what of the norm is left to the product behind it."""
    left = {"gain": norm.weight, "shift": norm.bias} if how.fold_norm else {}
    weight, bias = (None, None) if how.fold_norm else (norm.weight, norm.bias)
    return *ops.norm_insert(residual, branch, prompts, weight, bias, norm.eps, dtype=how.dtype), left


def _attend(
    attn: Attention, y: Tensor, affine: dict[str, Any], num_queries: int, how: How
) -> Tensor:  # [B, S, D] -> [B, T, D]
    qkv = ops.linear(y, FrozenLinear(attn.qkv.weight, attn.qkv.bias, **affine))
    if not (isinstance(attn.q_norm, nn.Identity) and isinstance(attn.k_norm, nn.Identity)):
        q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).unbind(2)
        qkv = torch.stack([_in_own_dtype(attn.q_norm, q), _in_own_dtype(attn.k_norm, k), v], dim=2).flatten(2)
    return ops.attention(qkv, attn.num_heads, num_queries, attn.scale, impl=how.attention)


def _attend_few(
    attn: Attention, y: Tensor, affine: dict[str, Any], num_queries: int
) -> Tensor:  # [B, S, D] -> [B, num_queries, D]
    q, kv = ops.project_q_kv(y, num_queries, FrozenLinear(attn.qkv.weight, attn.qkv.bias, **affine))
    q = _in_own_dtype(attn.q_norm, q.unflatten(-1, (attn.num_heads, -1))).flatten(2)
    if not isinstance(attn.k_norm, nn.Identity):
        k, v = kv.unflatten(-1, (2, attn.num_heads, -1)).unbind(2)
        kv = torch.stack([_in_own_dtype(attn.k_norm, k), v], dim=2).flatten(2)
    return ops.query_attention(q, kv, attn.num_heads, attn.scale)


class _First(torch.autograd.Function):
    """The first ``n`` tokens; on a CPU the zeros of its gradient do not take fresh memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, n: int) -> Tensor:
        ctx.shape = x.shape
        return x[:, :n].contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        d_x = buffers.empty(ctx.shape, grad.dtype, grad.device)
        d_x[:, : grad.shape[1]] = grad
        d_x[:, grad.shape[1] :] = 0
        return d_x, None


def _in_own_dtype(norm: nn.LayerNorm | nn.Identity, x: Tensor) -> Tensor:
    """A norm inside the attention, in the dtype of its weight, back in that of its input."""
    return x if isinstance(norm, nn.Identity) else norm(x.to(norm.weight.dtype)).to(x.dtype)
