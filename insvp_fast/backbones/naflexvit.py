"""timm's ``NaFlexVit``, given whole images: as ``vision_transformer``, or as ``eva`` where its blocks are those of Eva.

Its position embedding is resampled for the grid of the image, by timm's own methods. Patches of images of several sizes
in one batch, which timm packs into a dictionary, are no images.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.pos_embed_sincos import RotaryEmbeddingMixed
from timm.models import naflexvit
from timm.models.eva import EvaBlock
from timm.models.naflexvit import NaFlexEmbeds, NaFlexVit
from torch import Tensor, nn

from insvp_fast import ops
from insvp_fast.backbones import eva, vision_transformer, vit_blocks
from insvp_fast.backbones.family import BlockOptions
from insvp_fast.backbones.layers import in_own_dtype, norm_requirements
from insvp_fast.backbones.vision_transformer import (
    add_positions,
    check_shape,
    final_norm,
    patch_projection,
    read_tokens,
)
from insvp_fast.backbones.vit_blocks import prefixed
from insvp_fast.coverage import Rule, Table, rule, watch
from insvp_fast.coverage.rules import CALLED, DROPOUT_OFF, IDENTITY, LINEAR
from insvp_fast.ops import FrozenLinear
from insvp_fast.reference import Prompts
from insvp_fast.runtime.dtypes import widened

__all__ = [
    "SUPPORTS",
    "check_image",
    "embed",
    "final_norm",
    "forward_block",
    "only_operations",
    "pixel_weight",
    "read_tokens",
    "requirements",
    "shared",
]

SUPPORTS = eva.SUPPORTS

# What is supported

POSITIONS = "pos_embed pos_embed_y pos_embed_x"

watch("forward __call__", NaFlexVit, NaFlexEmbeds)
watch("_forward_embeds _pool forward_head", NaFlexVit)
watch("_apply_learned_pos_embed _apply_factorized_pos_embed", NaFlexEmbeds)
watch("batch_patchify", naflexvit)


def requirements(backbone: NaFlexVit, patch_size: int) -> Table:
    """What the fast path requires of the backbone's modules."""
    width, embeds = backbone.embed_dim, backbone.embeds
    tokens = (getattr(embeds, name, None) for name in ("cls_token", "reg_token"))
    places: dict[str, Any] = {
        "num_prefix_tokens": sum(token.shape[1] for token in tokens if token is not None),
        "rope_is_mixed": isinstance(backbone.rope, RotaryEmbeddingMixed),
    }
    table: Table = {
        # any other attributes: they are read by timm's methods, which both paths call
        "": (rule(NaFlexVit, " ".join(vars(backbone)), **places),),
        "embeds": (_embeds_rule(embeds, patch_size),),
        "embeds.proj": (*LINEAR, patch_projection(patch_size)),
        "embeds.norm": (IDENTITY, *norm_requirements(width)),
        "embeds.pos_drop": DROPOUT_OFF,
        "norm_pre": CALLED,
        "blocks": (rule(nn.Sequential),),
        "norm": (IDENTITY, *norm_requirements(width)),
        **dict.fromkeys(("fc_norm", "attn_pool", "head_drop", "head"), CALLED),
    }
    if backbone.patch_drop is not None:
        table["patch_drop"] = eva.INDEXED_DROPOUT_OFF
    if backbone.rope is not None:
        table["rope"] = eva.rotation_requirements(backbone.rope)
    for j, block in enumerate(backbone.blocks):
        of_eva = isinstance(block, EvaBlock)
        own = eva.block_requirements(block, backbone) if of_eva else vit_blocks.block_requirements(block, width)
        table |= prefixed(f"blocks.{j}", own)
    return table


def _embeds_rule(embeds: nn.Module, patch_size: int) -> Rule:
    """timm's embedding of whole images, without padding."""
    linear = isinstance(getattr(embeds, "proj", None), nn.Linear)
    needed: dict[str, Any] = {
        "patch_size": (patch_size, patch_size),
        "is_linear": linear,
        "flatten": not linear,
        "dynamic_img_pad": False,
        "norm_input": None,
    }
    return rule(NaFlexEmbeds, " ".join(vars(embeds)), optional=f"cls_token reg_token {POSITIONS}", **needed)


# How it runs


def pixel_weight(backbone: NaFlexVit) -> Tensor:
    """The weight of the patch embedding, [D, C, P, P]: of a linear layer, a view."""
    embeds = backbone.embeds
    weight: Tensor = embeds.proj.weight
    if not embeds.is_linear:
        return weight
    if embeds.channels_last:
        return torch.unflatten(weight, 1, (*embeds.patch_size, -1)).movedim(-1, 1)
    return torch.unflatten(weight, 1, (-1, *embeds.patch_size))


def check_image(backbone: NaFlexVit, image: Tensor) -> None:
    """Raise ValueError for an image of another shape than [B, C, H, W], or of a size that the backbone cannot take."""
    check_shape(image, pixel_weight(backbone).shape[1], backbone.embeds.patch_size[0])


def embed(backbone: NaFlexVit, patches: Tensor, grid: tuple[int, int]) -> Tensor:  # [B, N, K] -> [B, T, D]
    """The patch embedding as a product, with position embedding and prefix tokens (eq. 1)."""
    embeds = backbone.embeds
    projection = FrozenLinear(pixel_weight(backbone), embeds.proj.bias)
    tokens = in_own_dtype(embeds.norm, ops.linear(patches, projection))
    positions = tokens.new_zeros(1, *tokens.shape[1:], dtype=projection.weight.dtype)
    if embeds.pos_embed_type == "learned":
        embeds._apply_learned_pos_embed(positions, grid)
    elif embeds.pos_embed_type == "factorized":
        embeds._apply_factorized_pos_embed(positions, grid)
    prefix = [token for token in (embeds.cls_token, embeds.reg_token) if token is not None]
    constant = torch.cat([*prefix, positions], dim=1) if prefix else positions.to(tokens.dtype)
    embedded: Tensor = backbone.norm_pre(add_positions(tokens, constant, backbone.blocks))
    return embedded


def shared(backbone: NaFlexVit, grid: tuple[int, int]) -> Tensor | None:
    """The sines and cosines of the patches' rotations, as ``eva.shared`` gives them."""
    if backbone.rope is None:
        return None
    rotation: Tensor = backbone.rope.get_embed(shape=grid)
    return rotation.to(widened(rotation.dtype))


def forward_block(
    backbone: NaFlexVit,
    block: int,
    residual: Tensor,  # [B, T, D]
    branch: Tensor | None,  # [B, T, D], not yet added to the residual
    prompts: Prompts | None,
    options: BlockOptions,
    num_queries: int | None = None,
) -> tuple[Tensor, Tensor]:  # residual and branch, [B, num_queries or T, D]
    """One block (eq. 11)."""
    rest = residual, branch, prompts, options, num_queries
    if isinstance(backbone.blocks[block], EvaBlock):
        return eva.run_block(backbone, block, *rest, mixed=backbone.rope_is_mixed)
    return vision_transformer.forward_block(backbone, block, *rest)


def only_operations(
    backbone: NaFlexVit, block: int, options: BlockOptions, num_tokens: int, num_queries: int | None
) -> bool:
    """As of the family that a block is of."""
    family: Any = eva if isinstance(backbone.blocks[block], EvaBlock) else vision_transformer
    answer: bool = family.only_operations(backbone, block, options, num_tokens, num_queries)
    return answer
