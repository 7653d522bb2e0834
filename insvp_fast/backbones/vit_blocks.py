"""The blocks of timm's ``VisionTransformer``: what the fast path requires of each kind, and how it runs.

Block                  x + attention(norm(x)), then x + mlp(norm(x))
ResPostBlock           x + norm(attention(x)), then x + norm(mlp(x))
ParallelThingsBlock    x + a sum of attentions with norms of their own, then x + such a sum of MLPs
ParallelScalingBlock   x + attention(y) + mlp(y) with y = norm(x)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, ParallelScalingBlock, ParallelThingsBlock, ResPostBlock
from torch import Tensor, nn

from insvp_fast import ops
from insvp_fast.backbones.family import BlockOptions
from insvp_fast.backbones.layers import (
    DROP_PATH_OFF,
    LAYER_SCALE,
    Affine,
    activation_name,
    activation_requirements,
    forward_mlp,
    in_own_dtype,
    mlp_requirements,
    norm_insert,
    norm_requirements,
)
from insvp_fast.backbones.qkv import norm_heads, qkv_requirements
from insvp_fast.coverage import Table, rule, watch
from insvp_fast.coverage.rules import DROPOUT_OFF, IDENTITY, LINEAR
from insvp_fast.ops import FrozenLinear
from insvp_fast.reference import Prompts
from insvp_fast.reference.vision_transformer import require_block
from insvp_fast.runtime import buffers
from insvp_fast.runtime.elementwise import put

__all__ = [
    "absorbs",
    "attend_from_first",
    "block_requirements",
    "branch_requirements",
    "first_tokens",
    "inactive_dropout",
    "num_keys_of",
    "post_norm_block",
    "pre_norm_block",
    "prefixed",
    "run_block",
]

# of what ``norm_insert`` returns, but the residual, to the attended values of the tokens that go on, not yet projected
Attend = Callable[[Tensor, Affine], Tensor]

# What is supported

watch("forward __call__", Block, ResPostBlock, ParallelThingsBlock, ParallelScalingBlock, Attention, nn.Sequential)
watch("scaled_dot_product_attention", F)


def block_requirements(block: nn.Module, width: int) -> Table:
    """What the fast path requires of a block, by paths that begin with a point."""
    if isinstance(block, ParallelThingsBlock):
        return _things_requirements(block, width)
    if isinstance(block, ParallelScalingBlock):
        return _scaling_requirements(block, width)
    post = isinstance(block, ResPostBlock)
    attention = _attention_requirements(getattr(block, "attn", None), width)
    return {
        "": (rule(Block), rule(ResPostBlock, "init_values")),
        **branch_requirements(block, width, attention),
        **({} if post else {".ls1": LAYER_SCALE, ".ls2": LAYER_SCALE}),
    }


def branch_requirements(block: nn.Module, width: int, attention: Table) -> Table:
    """What the fast path requires of the parts of a block with one attention and one MLP, but for layer scales."""
    norm = norm_requirements(width)
    return {
        ".norm1": norm,
        **prefixed(".attn", attention),
        ".drop_path1": DROP_PATH_OFF,
        ".norm2": norm,
        **prefixed(".mlp", mlp_requirements(getattr(block, "mlp", None))),
        ".drop_path2": DROP_PATH_OFF,
    }


def prefixed(prefix: str, table: Table) -> Table:
    """The table of a submodule as a part of that of its parent."""
    return {prefix + path: rules for path, rules in table.items()}


def _attention_requirements(attn: nn.Module | None, width: int) -> Table:
    heads, head_width = getattr(attn, "num_heads", 1), getattr(attn, "head_dim", 1)
    attention = {
        "attn_dim": width,
        "head_dim": width // max(heads, 1),
        "scale": max(head_width, 1) ** -0.5,
        "gate": None,
    }
    return {
        "": (rule(Attention, "num_heads fused_attn", **attention, **inactive_dropout(attn)),),
        **qkv_requirements(attn, head_width),
        ".attn_drop": DROPOUT_OFF,
        ".norm": (IDENTITY, *norm_requirements(width)),
        ".proj": LINEAR,
        ".proj_drop": DROPOUT_OFF,
    }


def inactive_dropout(module: nn.Module | None) -> dict[str, Any]:
    """The fused attention drops by the mode of the module that calls it, not by that of its dropout."""
    return {"training": False} if getattr(getattr(module, "attn_drop", None), "p", 0) else {}


def _things_requirements(block: ParallelThingsBlock, width: int) -> Table:
    table: Table = {"": (rule(ParallelThingsBlock, "num_parallel"),)}
    for name in ("attns", "ffns"):
        table[f".{name}"] = (rule(nn.ModuleList),)
        for i, branch in enumerate(getattr(block, name, ())):
            table |= prefixed(f".{name}.{i}", _thing_requirements(branch, width, name == "attns"))
    return table


def _thing_requirements(branch: nn.Module, width: int, attends: bool) -> Table:
    """Norm, attention or MLP, scale and drop path, in this order, whatever their names."""
    children = [*branch._modules.items()]
    module = children[1][1] if len(children) > 1 else None
    thing = _attention_requirements(module, width) if attends else mlp_requirements(module)
    parts: list[Table] = [{"": norm_requirements(width)}, thing, {"": LAYER_SCALE}, {"": DROP_PATH_OFF}]
    table: Table = {"": (rule(nn.Sequential),)}
    for i, part in enumerate(parts):
        table |= prefixed(f".{children[i][0] if i < len(children) else i}", part)
    return table


def _scaling_requirements(block: ParallelScalingBlock, width: int) -> Table:
    heads, in_proj = getattr(block, "num_heads", 1), getattr(block, "in_proj", None)
    weight, bias = getattr(in_proj, "weight", torch.empty(0)), getattr(in_proj, "bias", None)
    head_width, fused = width // max(heads, 1), block._modules.get("out_proj") is not None
    sizes: dict[str, Any] = {
        "head_dim": head_width,
        "scale": max(head_width, 1) ** -0.5,
        "in_split": [len(weight) - 3 * width] + [width] * 3,
        **dict.fromkeys(("attn_out_proj", "mlp_out_proj") if fused else ("out_proj",)),
    }
    own = rule(
        ParallelScalingBlock,
        "num_heads fused_attn",
        optional="" if bias is not None else "mlp_bias",  # one bias or the other
        **sizes,
        **inactive_dropout(block),
    )
    head_norm = (IDENTITY, *norm_requirements(head_width))
    return {
        "": (own,),
        ".in_norm": norm_requirements(width),
        ".in_proj": LINEAR,
        ".q_norm": head_norm,
        ".k_norm": head_norm,
        ".attn_drop": DROPOUT_OFF,
        ".mlp_drop": DROPOUT_OFF,
        ".mlp_act": activation_requirements(getattr(block, "mlp_act", None)),
        **dict.fromkeys([".out_proj"] if fused else [".attn_out_proj", ".mlp_out_proj"], LINEAR),
        ".ls": LAYER_SCALE,
        ".drop_path": DROP_PATH_OFF,
    }


# How they run


def run_block(
    block: nn.Module,
    residual: Tensor,  # [B, T, D]
    branch: Tensor | None,  # [B, T, D], not yet added to the residual
    prompts: Prompts | None,
    options: BlockOptions,
    num_queries: int | None = None,
) -> tuple[Tensor, Tensor]:  # residual and branch, [B, num_queries or T, D]
    """One block (eq. 11), whose last sum is left to the next block's norm.

    With ``num_queries`` only the first tokens go on; the others are keys and values of the attention and end there.
    """
    if prompts is not None and prompts.keys_values is not None:
        require_block(block)
    rest = residual, branch, prompts, options, num_queries
    if isinstance(block, ParallelThingsBlock):
        return _things(block, *rest)
    if isinstance(block, ParallelScalingBlock):
        return _scaling(block, *rest)
    attn: Any = block.attn

    def attend(y: Tensor, affine: Affine) -> Tensor:
        return _attention(attn, y, affine, prompts, options, num_queries)

    return (post_norm_block if isinstance(block, ResPostBlock) else pre_norm_block)(block, attend, *rest)


def pre_norm_block(
    block: Any,
    attend: Attend,
    residual: Tensor,
    branch: Tensor | None,
    prompts: Prompts | None,
    options: BlockOptions,
    num_queries: int | None,
) -> tuple[Tensor, Tensor]:
    """``run_block`` of any block that has its norms before attention and MLP, with its attention as a function."""
    residual, y, affine = norm_insert(block.norm1, residual, branch, prompts, options)
    inner, outer = _layer_scale(block, 1, options)
    branch = _times(outer, ops.linear(attend(y, affine), FrozenLinear.of(block.attn.proj, scale=inner)))
    residual = first_tokens(residual, num_queries)
    residual, y, affine = norm_insert(block.norm2, residual, branch, None, options)
    inner, outer = _layer_scale(block, 2, options)
    return residual, _times(outer, forward_mlp(block.mlp, y, affine, options.mlp_keeps, inner))


def _layer_scale(block: Any, number: int, options: BlockOptions) -> tuple[Tensor | None, Tensor | None]:
    """The block's layer scale, a module in most classes of timm and a parameter in others: folded, and not folded."""
    module = getattr(block, f"ls{number}", None)
    gamma = getattr(block, f"gamma_{number}") if module is None else getattr(module, "gamma", None)
    return (gamma, None) if options.folds_scale else (None, gamma)


def _times(scale: Tensor | None, branch: Tensor) -> Tensor:
    return branch if scale is None else scale * branch


def post_norm_block(
    block: Any,
    attend: Attend,
    residual: Tensor,
    branch: Tensor | None,
    prompts: Prompts | None,
    options: BlockOptions,
    num_queries: int | None,
) -> tuple[Tensor, Tensor]:
    """As ``pre_norm_block``, for the norms behind attention and MLP."""
    residual = residual if branch is None else residual + branch
    y = residual.to(options.dtype)
    y = y if prompts is None else torch.cat([y, prompts.tokens.to(y.dtype)], dim=1)
    branch = in_own_dtype(block.norm1, ops.linear(attend(y, Affine()), FrozenLinear.of(block.attn.proj)))
    residual = first_tokens(residual, num_queries) + branch
    y = residual.to(options.dtype)
    return residual, in_own_dtype(block.norm2, forward_mlp(block.mlp, y, Affine(), options.mlp_keeps))


def _things(
    block: ParallelThingsBlock,
    residual: Tensor,
    branch: Tensor | None,
    prompts: Prompts | None,
    options: BlockOptions,
    num_queries: int | None,
) -> tuple[Tensor, Tensor]:
    attended, hidden = [], []
    for one in block.attns:
        norm, attn, scale, _ = one
        residual, y, affine = norm_insert(norm, residual, branch, prompts, options)
        values = _attention(attn, y, affine, prompts, options, num_queries)
        attended.append(scale(ops.linear(values, FrozenLinear.of(attn.proj))))
        branch = None
    residual, branch = first_tokens(residual, num_queries), reduce(torch.add, attended)
    for one in block.ffns:
        norm, mlp, scale, _ = one
        residual, y, affine = norm_insert(norm, residual, branch, None, options)
        hidden.append(scale(forward_mlp(mlp, y, affine, options.mlp_keeps)))
        branch = None
    return residual, reduce(torch.add, hidden)


def _scaling(
    block: ParallelScalingBlock,
    residual: Tensor,
    branch: Tensor | None,
    prompts: Prompts | None,
    options: BlockOptions,
    num_queries: int | None,
) -> tuple[Tensor, Tensor]:
    residual, y, affine = norm_insert(block.in_norm, residual, branch, prompts, options)
    weight, bias, M = block.in_proj.weight, block.in_proj.bias, block.in_split[0]
    qkv = FrozenLinear(weight[M:], None if bias is None else bias[M:], *affine)
    attended = _attend(block, qkv, y, prompts, options, num_queries)
    residual = first_tokens(residual, num_queries)
    up = FrozenLinear(weight[:M], block.mlp_bias if bias is None else bias[:M], *affine)
    if block.out_proj is None:
        proj, down = map(FrozenLinear.of, (block.attn_out_proj, block.mlp_out_proj))
    else:
        weight, D = block.out_proj.weight, residual.shape[2]
        proj, down = FrozenLinear(weight[:, :D], block.out_proj.bias), FrozenLinear(weight[:, D:])
    y = first_tokens(y, residual.shape[1] if y.shape[1] > residual.shape[1] else None)
    hidden = ops.mlp(y, up, down, activation=activation_name(block.mlp_act), keep=options.mlp_keeps)
    return residual, block.ls(ops.linear(attended, proj) + hidden)


def _attention(
    attn: Attention, y: Tensor, affine: Affine, prompts: Prompts | None, options: BlockOptions, num_queries: int | None
) -> Tensor:  # [B, S, D] -> [B, num_queries or T, D]
    qkv = FrozenLinear.of(attn.qkv, *affine)
    attended = _attend(attn, qkv, y, prompts, options, num_queries)
    return in_own_dtype(attn.norm, attended).to(y.dtype)


def _attend(
    attn: Any, qkv: FrozenLinear, y: Tensor, prompts: Prompts | None, options: BlockOptions, num_queries: int | None
) -> Tensor:  # [B, S, D] -> [B, num_queries or T, D]
    """Softmax attention of a module with ``num_heads``, ``scale``, ``q_norm`` and ``k_norm``."""
    L, keys_values = (0, None) if prompts is None else (prompts.tokens.shape[1], prompts.keys_values)
    T = y.shape[1] - L
    num_keys = num_keys_of(prompts, T)
    if num_queries is not None:
        return attend_from_first(attn, qkv, y, num_queries, num_keys, keys_values)
    packed = norm_heads(attn, ops.linear(y, qkv), 3)
    packed = _append(packed, keys_values, num_keys)
    return ops.attention(packed, attn.num_heads, T, attn.scale, num_keys=num_keys, impl=options.attention)


def attend_from_first(
    attn: Any,
    qkv: FrozenLinear,
    y: Tensor,
    num_queries: int,
    num_keys: Tensor | None = None,
    keys_values: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:  # [B, S, D] -> [B, num_queries, D]
    """As ``_attend``, for few queries, and without keys and values where these would be more work.

    ``bias``: [heads, num_queries, T], of the scores of the first T keys.
    """
    if keys_values is None and absorbs(attn, num_queries, y.shape[1], qkv.out_features // 3):
        return ops.absorbed_attention(y, num_queries, qkv, attn.num_heads, attn.scale, num_keys=num_keys, bias=bias)
    q, kv = ops.project_q_kv(y, num_queries, qkv)
    q = in_own_dtype(attn.q_norm, torch.unflatten(q, -1, (attn.num_heads, -1))).to(kv.dtype).flatten(2)
    kv = _append(norm_heads(attn, kv, 2), keys_values, num_keys)
    return ops.query_attention(q, kv, attn.num_heads, attn.scale, num_keys=num_keys, bias=bias)


def num_keys_of(prompts: Prompts | None, num_tokens: int) -> Tensor | None:  # [B]
    """How many keys each image has, of tokens and the prompts behind them; None where all have the same number."""
    return None if prompts is None or prompts.lengths is None else num_tokens + prompts.lengths


def absorbs(attn: Any, num_queries: int, num_keys: int, width: int) -> bool:
    """Whether few queries are attended to without keys and values; with more keys than these, too."""
    plain = isinstance(attn.q_norm, nn.Identity) and isinstance(attn.k_norm, nn.Identity)
    return plain and attn.num_heads * num_queries * (width + num_keys) < num_keys * width


def _append(packed: Tensor, keys_values: Tensor | None, num_keys: Tensor | None) -> Tensor:
    """Keys and values [B, M, 2·D] behind those of [B, S, 2·D or 3·D], whose queries they have none of."""
    if keys_values is None:
        return packed
    if num_keys is not None:
        raise ValueError("prompts have lengths and keys_values: expected one of them, padding has to stand last")
    return torch.cat([packed, F.pad(keys_values.to(packed.dtype), (packed.shape[2] - keys_values.shape[2], 0))], dim=1)


def first_tokens(x: Tensor, count: int | None) -> Tensor:  # [B, T, D] -> [B, count or T, D]
    """The first tokens, or all."""
    return x if count is None else _FirstTokens.apply(x, count)


class _FirstTokens(torch.autograd.Function):
    """``x[:, :n]``, contiguous; the zeros of its gradient are written into a buffer that is used again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, n: int) -> Tensor:
        ctx.shape = x.shape
        first = buffers.empty((x.shape[0], n, x.shape[2]), x.dtype, x.device)
        put(first, x[:, :n])
        return first

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        d_x = buffers.empty(ctx.shape, grad.dtype, grad.device)
        put(d_x[:, : grad.shape[1]], grad)
        put(d_x[:, grad.shape[1] :], None)
        return d_x, None
