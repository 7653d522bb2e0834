"""timm's ``VisionTransformer``: what the fast path requires of it, and how it runs as a sequence of operations.

It is exact, and saves what the equations allow: prompts give keys and values but no queries, the last block asks one
query where the head reads one token, and nothing is kept that only the gradient of a weight would need.

The distilled DeiT is one more such class: it has two prefix tokens, and its head reads both. In a hybrid a network
makes the tokens; it is called as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from timm.layers import Format, HybridEmbed, PatchDropout, PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from insvp_fast import ops
from insvp_fast.backbones.family import BlockOptions
from insvp_fast.backbones.layers import in_own_dtype, is_operation, norm_requirements
from insvp_fast.backbones.vit_blocks import absorbs, block_requirements, prefixed, run_block
from insvp_fast.coverage import Rule, Table, rule, watch
from insvp_fast.coverage.rules import CALLED, DROPOUT_OFF, IDENTITY, convolution, difference
from insvp_fast.ops import FrozenLinear
from insvp_fast.reference import Prompts, fold
from insvp_fast.reference.structure import pixel_layer
from insvp_fast.runtime import buffers, torch_private
from insvp_fast.runtime.elementwise import put, put_sum
from insvp_fast.runtime.prepack import packed

__all__ = [
    "SUPPORTS",
    "add_positions",
    "check_image",
    "check_shape",
    "embed",
    "embed_patches",
    "embeds_by_operations",
    "filled_size",
    "final_norm",
    "forward_block",
    "only_operations",
    "patch_embed_requirements",
    "patch_projection",
    "pixel_weight",
    "read_tokens",
    "requirements",
    "shared",
]

SUPPORTS = frozenset({"reads_tokens", "gives_keys_values", "carry_prompts", "lengths"})

# What is supported

PATCH_DROPOUT_OFF = (IDENTITY, rule(PatchDropout, "prob num_prefix_tokens ordered", dropout_rate="prob"))

watch("forward __call__", VisionTransformer, PatchEmbed, PatchDropout)
watch("_pos_embed pool forward_head", VisionTransformer, VisionTransformerDistilled)


def requirements(backbone: VisionTransformer, patch_size: int) -> Table:
    """What the fast path requires of the backbone's modules."""
    width, any_attributes = backbone.embed_dim, " ".join(vars(backbone))  # timm's methods read them, on both paths
    tokens = "cls_token reg_token pos_embed"
    embedding: Table = {"patch_embed": CALLED}
    if not _is_hybrid(backbone):
        embedding = patch_embed_requirements(backbone, patch_size)
    table: Table = {
        "": (
            rule(VisionTransformer, any_attributes, optional=tokens),
            rule(VisionTransformerDistilled, any_attributes, optional=f"{tokens} dist_token"),
        ),
        **embedding,
        "pos_drop": DROPOUT_OFF,
        "patch_drop": PATCH_DROPOUT_OFF,
        "norm_pre": CALLED,
        "blocks": (rule(nn.Sequential), rule(nn.ModuleList)),
        "norm": (IDENTITY, *norm_requirements(width)),
        **dict.fromkeys(("fc_norm", "attn_pool", "head_drop", "head"), CALLED),
    }
    if isinstance(backbone, VisionTransformerDistilled):
        table["head_dist"] = CALLED
    for j, block in enumerate(backbone.blocks):
        table |= prefixed(f"blocks.{j}", block_requirements(block, width))
    return table


def patch_embed_requirements(backbone: Any, patch_size: int) -> Table:
    """What the fast path requires of a patch embedding, which may take images of any size."""
    dynamic, sides = getattr(backbone, "dynamic_img_size", False), (patch_size, patch_size)
    embedding: dict[str, Any] = {
        "patch_size": sides,
        "flatten": not dynamic,
        "output_fmt": Format.NHWC if dynamic else Format.NCHW,
        "dynamic_img_pad": False,
        "img_size": filled_size(backbone.patch_embed),
    }
    if not dynamic and getattr(backbone, "pos_embed", None) is not None:
        embedding["strict_img_size"] = True  # else the one token of a small image is broadcast to all positions
    return {
        "patch_embed": (rule(PatchEmbed, "grid_size num_patches strict_img_size", **embedding),),
        "patch_embed.proj": (patch_projection(patch_size),),
        "patch_embed.norm": (IDENTITY, *norm_requirements(backbone.embed_dim)),
    }


def filled_size(embedding: Any) -> Any:
    """The size that ``img_size`` of a patch embedding must have for its patches to fill an image: timm cuts the rest.

    Where it takes images of any size, or is another class, that which it has.
    """
    if type(embedding) is not PatchEmbed or not (embedding.strict_img_size and embedding.grid_size):
        return getattr(embedding, "img_size", None)
    return tuple(count * side for count, side in zip(embedding.grid_size, embedding.patch_size, strict=True))


def patch_projection(patch_size: int) -> Rule:
    """A convolution of one patch after the other."""
    sides = (patch_size, patch_size)
    projection = convolution(sides, padding=(0, 0), dilation=(1, 1))
    attributes, parameters = {**projection.attributes, "kernel_size": sides}, {"weight": True, "bias": False}
    return projection._replace(attributes=attributes, parameters=parameters)


# How it runs


def pixel_weight(backbone: VisionTransformer) -> Tensor:
    """The weight that reads the pixels: of the patch embedding, [D, C, P, P], or of a hybrid's first convolution."""
    weight: Tensor = (pixel_layer(backbone) if _is_hybrid(backbone) else backbone.patch_embed.proj).weight
    return weight


def _is_hybrid(backbone: VisionTransformer) -> bool:
    """Whether a network makes the tokens."""
    return type(backbone.patch_embed) is HybridEmbed


def check_image(backbone: VisionTransformer, image: Tensor) -> None:
    """Raise ValueError for an image of another shape than [B, C, H, W], or of a size that the backbone cannot take."""
    embedding = backbone.patch_embed
    expected = embedding.img_size if embedding.strict_img_size else None
    check_shape(image, pixel_weight(backbone).shape[1], embedding.feat_ratio(), expected)


def check_shape(image: Tensor, channels: int, patch_size: int, expected: Sequence[int] | None = None) -> None:
    """Raise ValueError for an image without these channels, of another size than expected, or not made of patches."""
    if image.ndim != 4 or image.shape[1] != channels:
        raise ValueError(f"image has shape {tuple(image.shape)}: expected [B, {channels}, H, W]")
    H, W = image.shape[-2:]
    if expected is not None and tuple(expected) != (H, W):
        raise ValueError(
            f"image has {H}x{W} pixels: this backbone expects {expected[0]}x{expected[1]};"
            " create it with `img_size` or `dynamic_img_size=True` for others"
        )
    if H % patch_size or W % patch_size:
        raise ValueError(f"image has {H}x{W} pixels: expected multiples of the patch size {patch_size}")


def read_tokens(backbone: VisionTransformer) -> int | None:
    """1 where the head reads the class token, 2 where it also reads that of distillation; None where it reads all."""
    if isinstance(backbone, VisionTransformerDistilled):
        return 2
    return 1 if backbone.global_pool == "token" and backbone.attn_pool is None else None


def shared(backbone: VisionTransformer, grid: tuple[int, int]) -> None:
    """Nothing."""


def embed(backbone: VisionTransformer, patches: Tensor, grid: tuple[int, int]) -> Tensor:  # [B, N, K] -> [B, T, D]
    """The patch embedding as a product, with position embedding and prefix tokens (eq. 1)."""
    if _is_hybrid(backbone):
        tokens = _embed_image(backbone, patches, grid)
    else:
        tokens = embed_patches(backbone.patch_embed, patches)
        tokens = torch.unflatten(tokens, 1, grid) if backbone.dynamic_img_size else tokens
    tokens = add_positions(tokens.flatten(1, -2), _constant(backbone, tokens), backbone.blocks)
    embedded: Tensor = backbone.norm_pre(tokens)
    return embedded


def _constant(backbone: VisionTransformer, tokens: Tensor) -> Tensor:  # of [B, N, D] or [B, h, w, D] -> [1, T, D]
    """Prefix tokens and positions, which do not depend on the image: timm adds just these to the embedding of zeros."""
    shape, dtype, device = tokens.shape[1:], tokens.dtype, tokens.device  # what is kept must not keep the tokens

    def make() -> Tensor:
        constant: Tensor = backbone._pos_embed(torch.zeros(1, *shape, dtype=dtype, device=device))
        return constant

    if torch.compiler.is_compiling() or torch_private.dispatches([tokens]):
        return make()
    names = "pos_embed", "cls_token", "reg_token", "dist_token"
    sources = [w for name in names if (w := getattr(backbone, name, None)) is not None]
    if backbone.dynamic_img_size or not sources:  # for images of any size it would be kept too often
        return make()
    numbers = [
        (name, repr(value))
        for module in (backbone, backbone.patch_embed)
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float | str | tuple)
    ]
    return packed(sources, ("constant", shape, dtype, *numbers), make)


def _embed_image(backbone: VisionTransformer, patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """The tokens that a hybrid's network makes of the image, [B, N, D], or [B, h, w, D] where its size is dynamic."""
    P, dtype = backbone.patch_embed.feat_ratio(), pixel_weight(backbone).dtype
    image = fold(patches, P, grid[0] * P, grid[1] * P)
    with torch.autocast(image.device.type, image.dtype, enabled=image.dtype != dtype):  # as it was when we were called
        tokens: Tensor = backbone.patch_embed(image)
    return tokens


def embed_patches(patch_embed: PatchEmbed, patches: Tensor) -> Tensor:  # [B, N, K] -> [B, N, D]
    """The patch embedding as a product, and its norm."""
    projection = patch_embed.proj
    return in_own_dtype(patch_embed.norm, ops.linear(patches, FrozenLinear.of(projection)))


def add_positions(tokens: Tensor, constant: Tensor, blocks: nn.Module) -> Tensor:
    """Put prefix tokens before the patch tokens [B, N, D] and add the positions: ``constant``, [1, T, D], has both.

    The result has the dtype that the residual has in timm: autocast casts neither positions nor layer scales.
    """
    if constant.dtype != next(blocks.parameters(), constant).dtype:  # that of all parameters
        scales = [p.dtype for name, p in blocks.named_parameters() if "gamma" in name]
        constant = constant.to(reduce(torch.promote_types, scales, constant.dtype))
    embedded: Tensor = _AddPositions.apply(tokens, constant)
    return embedded


class _AddPositions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, constant: Tensor) -> Tensor:
        ctx.prefix, ctx.dtype = constant.shape[1] - tokens.shape[1], tokens.dtype
        dtype = torch.promote_types(tokens.dtype, constant.dtype)
        x = buffers.empty((tokens.shape[0], *constant.shape[1:]), dtype, tokens.device)
        put(x[:, : ctx.prefix], constant[:, : ctx.prefix].to(dtype).expand(x.shape[0], -1, -1))
        put_sum(x[:, ctx.prefix :], tokens, 1, constant[:, ctx.prefix :], 1)
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
    """One block (eq. 11); see ``run_block``."""
    return run_block(backbone.blocks[block], residual, branch, prompts, options, num_queries)


def only_operations(
    backbone: VisionTransformer, block: int, options: BlockOptions, num_tokens: int, num_queries: int | None
) -> bool:
    """Only of timm's plain ``Block``, without norms of heads, and with layer scales only where they are folded."""
    blk: Any = backbone.blocks[block]
    if not isinstance(blk, Block):
        return False
    if num_queries is not None and not absorbs(blk.attn, num_queries, num_tokens, backbone.embed_dim):
        return False
    scales = () if options.folds_scale else (blk.ls1, blk.ls2)
    absent = blk.attn.q_norm, blk.attn.k_norm, blk.attn.norm, *scales
    return is_operation(blk.mlp) and all(isinstance(module, nn.Identity) for module in absent)


def embeds_by_operations(backbone: VisionTransformer) -> bool:
    """Not where a network makes the tokens, nor with a norm before the blocks, which is called and may be anything."""
    return not _is_hybrid(backbone) and difference(backbone.norm_pre, (IDENTITY,), False) is None


def final_norm(backbone: VisionTransformer, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """The norm after the last block."""
    normed: Tensor = backbone.norm(tokens)
    return normed
