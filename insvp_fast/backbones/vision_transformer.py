"""timm's ``VisionTransformer``: what the fast path requires of it, and how it runs as a sequence of operations.

It is exact, and saves what the equations allow: prompts give keys and values but no queries, the last block asks one
query where the head reads one token, and nothing is kept that only the gradient of a weight would need.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Format, LayerNorm, LayerScale, Mlp, PatchDropout, PatchEmbed
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from insvp_fast import ops
from insvp_fast.backbones.family import BlockOptions
from insvp_fast.coverage import Rule, Table, rule, watch
from insvp_fast.coverage.rules import CALLED, DROPOUT_OFF, IDENTITY, LINEAR, convolution
from insvp_fast.ops import FrozenLinear
from insvp_fast.reference import Prompts
from insvp_fast.runtime import buffers

__all__ = [
    "check_image",
    "embed",
    "final_norm",
    "forward_block",
    "pixel_weight",
    "reads_one_token",
    "requirements",
]

SUPPORTS = frozenset({"reads_tokens", "gives_keys_values", "carry_prompts"})

# What is supported

DROP_PATH_OFF = (IDENTITY, rule(DropPath, "drop_prob scale_by_keep", dropout_rate="drop_prob"))
PATCH_DROPOUT_OFF = (IDENTITY, rule(PatchDropout, "prob num_prefix_tokens ordered", dropout_rate="prob"))
LAYER_SCALE = (IDENTITY, rule(LayerScale, "init_values", required="gamma", inplace=False))

watch("forward __call__", VisionTransformer, PatchEmbed, Block, Attention, Mlp, LayerNorm, LayerScale, DropPath)
watch("forward __call__", PatchDropout, nn.LayerNorm, nn.GELU)
watch("_pos_embed pool forward_head", VisionTransformer)
watch("scaled_dot_product_attention layer_norm gelu", F)


def requirements(backbone: VisionTransformer, patch_size: int) -> Table:
    """What the fast path requires of the backbone's modules."""
    sides, dynamic, width = (patch_size, patch_size), backbone.dynamic_img_size, backbone.embed_dim
    embedding = {
        "patch_size": sides,
        "flatten": not dynamic,
        "output_fmt": Format.NHWC if dynamic else Format.NCHW,
        "dynamic_img_pad": False,
    }
    projection = convolution(sides, padding=(0, 0), dilation=(1, 1))
    table: Table = {
        # any attributes: they are read by timm's methods, which both paths call
        "": (rule(VisionTransformer, " ".join(vars(backbone)), optional="cls_token reg_token pos_embed"),),
        "patch_embed": (rule(PatchEmbed, "img_size grid_size num_patches strict_img_size", **embedding),),
        "patch_embed.proj": (projection._replace(parameters={"weight": True, "bias": False}),),
        "patch_embed.norm": (IDENTITY,),
        "pos_drop": DROPOUT_OFF,
        "patch_drop": PATCH_DROPOUT_OFF,
        "norm_pre": CALLED,
        "blocks": (rule(nn.Sequential), rule(nn.ModuleList)),
        "norm": (IDENTITY, *_layer_norm(width)),
        "fc_norm": CALLED,
        "attn_pool": CALLED,
        "head_drop": CALLED,
        "head": CALLED,
    }
    for j, block in enumerate(backbone.blocks):
        table |= {f"blocks.{j}{path}": rules for path, rules in _block_requirements(block, width).items()}
    return table


def _block_requirements(block: nn.Module, width: int) -> Table:
    attn = getattr(block, "attn", None)
    heads, head_width = getattr(attn, "num_heads", 1), getattr(attn, "head_dim", 1)
    attention = {"attn_dim": width, "head_dim": width // max(heads, 1), "scale": head_width**-0.5, "gate": None}
    if getattr(getattr(attn, "attn_drop", None), "p", 0):
        attention["training"] = False  # the fused attention drops by its own mode, not by that of attn_drop
    head_norm = (IDENTITY, *_layer_norm(head_width))
    return {
        "": (rule(Block),),
        ".norm1": _layer_norm(width),
        ".attn": (rule(Attention, "num_heads fused_attn", **attention),),
        ".attn.qkv": LINEAR,
        ".attn.q_norm": head_norm,
        ".attn.k_norm": head_norm,
        ".attn.attn_drop": DROPOUT_OFF,
        ".attn.norm": (IDENTITY, *_layer_norm(width)),
        ".attn.proj": LINEAR,
        ".attn.proj_drop": DROPOUT_OFF,
        ".ls1": LAYER_SCALE,
        ".drop_path1": DROP_PATH_OFF,
        ".norm2": _layer_norm(width),
        ".mlp": (rule(Mlp),),
        ".mlp.fc1": LINEAR,
        ".mlp.act": (rule(nn.GELU, approximate="none"),),
        ".mlp.drop1": DROPOUT_OFF,
        ".mlp.norm": (IDENTITY,),
        ".mlp.fc2": LINEAR,
        ".mlp.drop2": DROPOUT_OFF,
        ".ls2": LAYER_SCALE,
        ".drop_path2": DROP_PATH_OFF,
    }


def _layer_norm(width: int) -> tuple[Rule, Rule]:
    """PyTorch's or timm's, with or without an affine map."""
    plain = rule(nn.LayerNorm, "eps elementwise_affine", required="weight", optional="bias", normalized_shape=(width,))
    return plain, plain._replace(type=LayerNorm, attributes={**plain.attributes, "_fast_norm": False})


# How it runs


def pixel_weight(backbone: VisionTransformer) -> Tensor:
    """The weight of the patch embedding, [D, C, P, P]."""
    weight: Tensor = backbone.patch_embed.proj.weight
    return weight


def check_image(backbone: VisionTransformer, image: Tensor) -> None:
    """Raise ValueError for an image of another shape than [B, C, H, W], or of a size that the backbone cannot take."""
    embedding, channels = backbone.patch_embed, pixel_weight(backbone).shape[1]
    if image.ndim != 4 or image.shape[1] != channels:
        raise ValueError(f"image has shape {tuple(image.shape)}: expected [B, {channels}, H, W]")
    (H, W), (P, _), expected = image.shape[-2:], embedding.patch_size, embedding.img_size
    if expected is not None and embedding.strict_img_size and tuple(expected) != (H, W):
        raise ValueError(
            f"image has {H}x{W} pixels: this backbone expects {expected[0]}x{expected[1]};"
            " create it with `img_size` or `dynamic_img_size=True` for others"
        )
    if H % P or W % P:
        raise ValueError(f"image has {H}x{W} pixels: expected multiples of the patch size {P}")


def reads_one_token(backbone: VisionTransformer) -> bool:
    """Whether the head reads only the class token."""
    return backbone.global_pool == "token" and backbone.attn_pool is None


def embed(backbone: VisionTransformer, patches: Tensor, grid: tuple[int, int]) -> Tensor:  # [B, N, K] -> [B, T, D]
    """The patch embedding as a product, with position embedding and prefix tokens (eq. 1)."""
    projection = backbone.patch_embed.proj
    tokens = ops.linear(patches, FrozenLinear(projection.weight, projection.bias))
    # timm adds to the embedding of zeros just what does not depend on the image: positions and prefix tokens
    zeros = tokens.new_zeros((1, *grid, tokens.shape[-1]) if backbone.dynamic_img_size else (1, *tokens.shape[1:]))
    embedded: Tensor = backbone.norm_pre(_AddPositions.apply(tokens, backbone._pos_embed(zeros)))
    return embedded


class _AddPositions(torch.autograd.Function):
    """Put prefix tokens before the patch tokens [B, N, D] and add the positions: ``constant``, [1, T, D], has both."""

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


def forward_block(
    backbone: VisionTransformer,
    block: int,
    residual: Tensor,  # [B, T, D]
    branch: Tensor | None,  # [B, T, D], not yet added to the residual
    prompts: Prompts | None,
    options: BlockOptions,
    num_queries: int | None = None,
) -> tuple[Tensor, Tensor]:  # residual and branch, [B, num_queries or T, D]
    """One block (eq. 11), whose last sum is left to the next block's norm.

    With ``num_queries`` only the first tokens go on; the others are keys and values of the attention and end there.
    """
    blk = backbone.blocks[block]
    attn, mlp = blk.attn, blk.mlp
    inserted, keys_values = (None, None) if prompts is None else (prompts.tokens, prompts.keys_values)
    residual, y, affine = _norm(blk.norm1, residual, branch, inserted, options)
    if num_queries is None:
        attended = _attend(attn, y, affine, residual.shape[1], keys_values, options)
    else:
        attended = _attend_from_first(attn, y, affine, num_queries, keys_values)
        residual = _FirstTokens.apply(residual, num_queries)
    branch = blk.ls1(ops.linear(_in_own_dtype(attn.norm, attended), FrozenLinear(attn.proj.weight, attn.proj.bias)))
    residual, y, affine = _norm(blk.norm2, residual, branch, None, options)
    fc1, fc2 = FrozenLinear(mlp.fc1.weight, mlp.fc1.bias, *affine), FrozenLinear(mlp.fc2.weight, mlp.fc2.bias)
    return residual, blk.ls2(ops.mlp(y, fc1, fc2, keep=options.mlp_keeps))


def final_norm(backbone: VisionTransformer, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """The norm after the last block."""
    normed: Tensor = backbone.norm(tokens)
    return normed


class Affine(NamedTuple):
    """The affine map of a norm, where it is folded into the product behind; else nothing."""

    gain: Tensor | None = None
    shift: Tensor | None = None


def _norm(
    norm: nn.LayerNorm, residual: Tensor, branch: Tensor | None, prompts: Tensor | None, options: BlockOptions
) -> tuple[Tensor, Tensor, Affine]:
    """The new residual [B, T, D], the normalized tokens and prompts [B, T+L, D], and the affine map left to apply."""
    folded, own = Affine(), Affine(norm.weight, norm.bias)
    if options.fold_norm:
        folded, own = own, folded
    return *ops.norm_insert(residual, branch, prompts, *own, norm.eps, dtype=options.dtype), folded


def _attend(
    attn: Attention, y: Tensor, affine: Affine, num_queries: int, keys_values: Tensor | None, options: BlockOptions
) -> Tensor:  # [B, S, D] -> [B, num_queries, D]
    qkv = ops.linear(y, FrozenLinear(attn.qkv.weight, attn.qkv.bias, *affine))
    if not (isinstance(attn.q_norm, nn.Identity) and isinstance(attn.k_norm, nn.Identity)):
        q, k, v = torch.unflatten(qkv, -1, (3, attn.num_heads, -1)).unbind(2)
        qkv = torch.stack([_in_own_dtype(attn.q_norm, q), _in_own_dtype(attn.k_norm, k), v], dim=2).flatten(2)
    qkv = _append(qkv, keys_values)
    return ops.attention(qkv, attn.num_heads, num_queries, attn.scale, impl=options.attention)


def _attend_from_first(
    attn: Attention, y: Tensor, affine: Affine, num_queries: int, keys_values: Tensor | None
) -> Tensor:  # [B, S, D] -> [B, num_queries, D]
    """As ``_attend``, for few queries: the products of the other tokens with the query weights are not computed."""
    q, kv = ops.project_q_kv(y, num_queries, FrozenLinear(attn.qkv.weight, attn.qkv.bias, *affine))
    q = _in_own_dtype(attn.q_norm, torch.unflatten(q, -1, (attn.num_heads, -1))).flatten(2)
    if not isinstance(attn.k_norm, nn.Identity):
        k, v = torch.unflatten(kv, -1, (2, attn.num_heads, -1)).unbind(2)
        kv = torch.stack([_in_own_dtype(attn.k_norm, k), v], dim=2).flatten(2)
    return ops.query_attention(q, _append(kv, keys_values), attn.num_heads, attn.scale)


def _append(packed: Tensor, keys_values: Tensor | None) -> Tensor:
    """Keys and values [B, M, 2·D] behind those of [B, S, 2·D or 3·D], whose queries they have none of."""
    if keys_values is None:
        return packed
    return torch.cat([packed, F.pad(keys_values.to(packed.dtype), (packed.shape[2] - keys_values.shape[2], 0))], dim=1)


class _FirstTokens(torch.autograd.Function):
    """``x[:, :n]``, contiguous; the zeros of its gradient are written into a buffer that is used again."""

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
    """A norm inside the attention, computed in the dtype of its weight and returned in that of its input."""
    if isinstance(norm, nn.Identity):
        return x
    normed: Tensor = norm(x.to(norm.weight.dtype))
    return normed.to(x.dtype)
