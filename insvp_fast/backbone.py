"""The frozen Vision Transformer as a sequence of operations: which of timm's are understood, and how one runs.

The exact savings that the equations allow live here: prompts give keys and values only, the last block asks one query
where the head reads one token, and nothing that only a weight gradient would need is kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from timm.layers import LayerNorm, LayerScale, Mlp, PatchEmbed
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from insvp_fast import memory, ops

__all__ = ["How", "embed", "forward_block", "is_patched", "misfit"]


def misfit(backbone: VisionTransformer) -> str | None:
    """What in a backbone the operations here do not cover, in words, or None if they cover all of it.

    Types are asked exactly: a subclass, a hook or a patched ``forward`` may compute anything, and a weight that is
    trained needs the gradient that is left out here.
    """
    embedding = backbone.patch_embed
    if type(backbone) is not VisionTransformer:
        return f"the backbone is a {type(backbone).__name__}"
    if type(embedding) is not PatchEmbed or type(embedding.proj) is not nn.Conv2d or embedding.dynamic_img_pad:
        return "the patch embedding is not one convolution"
    if not isinstance(embedding.norm, nn.Identity):
        return "the patch embedding has a norm"
    for j, block in enumerate(backbone.blocks):
        if reason := _block_misfit(block, backbone.embed_dim):
            return f"in block {j}, {reason}"
    pending: list[nn.Module | None] = [backbone]  # named_modules() is slower, and this runs in every forward
    while pending:
        module = pending.pop()
        if module is None:
            continue
        if is_patched(module):
            return f"a {type(module).__name__} has a hook or a forward of its own"
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad:
                return f"the {name} of a {type(module).__name__} is trained"
        pending += module._modules.values()
    return None


def is_patched(module: nn.Module) -> bool:
    """Whether calling a module does more than its class says."""
    state = vars(module)
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" in state or any(state[hook] for hook in hooks)


def _block_misfit(block: Any, width: int) -> str | None:
    if type(block) is not Block:
        return f"the block is a {type(block).__name__}"
    attention, mlp = block.attn, block.mlp
    if type(attention) is not Attention or getattr(attention, "gate", None) is not None:
        return f"the attention is another {type(attention).__name__}"
    if attention.proj.out_features != width or attention.attn_dim != width:
        return "the attention changes the width"
    if type(mlp) is not Mlp or not isinstance(mlp.norm, nn.Identity):
        return "the MLP is not two linear layers"
    for linear in (attention.qkv, attention.proj, mlp.fc1, mlp.fc2):
        if type(linear) is not nn.Linear:
            return f"a linear layer is a {type(linear).__name__}"
    if type(mlp.act) is not nn.GELU or mlp.act.approximate != "none":
        return f"the activation is {mlp.act}"
    for norm in (block.norm1, block.norm2):
        if type(norm) not in (nn.LayerNorm, LayerNorm) or norm.weight is None:
            return f"the norm is a {type(norm).__name__}"
    for scale in (block.ls1, block.ls2):
        if type(scale) not in (nn.Identity, LayerScale):
            return f"a branch is scaled by a {type(scale).__name__}"
    return None


def embed(backbone: VisionTransformer, patches: Tensor, grid: tuple[int, int]) -> Tensor:  # [B, N, K] -> [B, T, D]
    """The patch embedding as a product, with position embedding and prefix tokens (eq. 1)."""
    projection = backbone.patch_embed.proj
    tokens = ops.linear(patches, projection.weight, projection.bias)
    # position embedding and prefix tokens are what timm makes of an image whose patches embed to zero
    zeros = tokens.new_zeros((1, *grid, tokens.shape[-1]) if backbone.dynamic_img_size else (1, *tokens.shape[1:]))
    return backbone.norm_pre(_Embed.apply(tokens, backbone._pos_embed(zeros)))


class _Embed(torch.autograd.Function):
    """Add [1, T, D] to tokens [B, N, D] that lack the first of T; [B, T, D]."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, constant: Tensor) -> Tensor:
        ctx.prefix, ctx.dtype = constant.shape[1] - tokens.shape[1], tokens.dtype
        dtype = torch.promote_types(tokens.dtype, constant.dtype)
        x = memory.empty((tokens.shape[0], *constant.shape[1:]), dtype, tokens.device)
        x[:, : ctx.prefix] = constant[:, : ctx.prefix]
        x[:, ctx.prefix :].copy_(tokens).add_(constant[:, ctx.prefix :])
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        d_tokens = grad[:, ctx.prefix :]
        return memory.empty(d_tokens.shape, ctx.dtype, grad.device).copy_(d_tokens), None


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
    branch = block.ls1(ops.linear(_in_own_dtype(attn.norm, attended), attn.proj.weight, attn.proj.bias))
    residual, y, affine = _norm(block.norm2, residual, branch, None, how)
    weights = mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias
    return residual, block.ls2(ops.mlp(y, *weights, **affine, keep=how.mlp_keeps))


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
    qkv = ops.linear(y, attn.qkv.weight, attn.qkv.bias, **affine)
    if not isinstance(attn.q_norm, nn.Identity):
        q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).unbind(2)
        qkv = torch.stack([_in_own_dtype(attn.q_norm, q), _in_own_dtype(attn.k_norm, k), v], dim=2).flatten(2)
    return ops.attention(qkv, attn.num_heads, num_queries, attn.scale, impl=how.attention)


def _attend_few(
    attn: Attention, y: Tensor, affine: dict[str, Any], num_queries: int
) -> Tensor:  # [B, S, D] -> [B, num_queries, D]
    q, kv = ops.qkv_few(y, num_queries, attn.qkv.weight, attn.qkv.bias, **affine)
    if not isinstance(attn.q_norm, nn.Identity):
        q = _in_own_dtype(attn.q_norm, q.unflatten(-1, (attn.num_heads, -1))).flatten(2)
        k, v = kv.unflatten(-1, (2, attn.num_heads, -1)).unbind(2)
        kv = torch.stack([_in_own_dtype(attn.k_norm, k), v], dim=2).flatten(2)
    return ops.attention_few(q, kv, attn.num_heads, attn.scale)


class _First(torch.autograd.Function):
    """The first ``n`` tokens; on a CPU the zeros of its gradient do not take fresh memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, n: int) -> Tensor:
        ctx.shape = x.shape
        return x[:, :n].contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        d_x = memory.empty(ctx.shape, grad.dtype, grad.device)
        d_x[:, : grad.shape[1]] = grad
        d_x[:, grad.shape[1] :] = 0
        return d_x, None


def _in_own_dtype(norm: nn.Module, x: Tensor) -> Tensor:
    """A norm inside the attention, in the dtype of its weights, back in that of its input."""
    return x if isinstance(norm, nn.Identity) else norm(x.to(next(norm.parameters()).dtype)).to(x.dtype)
