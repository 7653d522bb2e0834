"""timm's ``Eva`` (EVA-02, DINOv3, Perception Encoder): as ``vision_transformer``, with rotary position embedding.

The patches' queries and keys are rotated by angles that depend on their places; prefix tokens and prompts are not.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.layers import PatchDropoutWithIndices, PatchEmbed, attention, pos_embed_sincos
from timm.layers.attention import AttentionRope
from timm.layers.pos_embed_sincos import (
    RotaryEmbeddingCat,
    RotaryEmbeddingDinoV3,
    RotaryEmbeddingMixed,
    RotaryEmbeddingMRope,
)
from timm.models import eva as timm_eva
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor, nn

from insvp_fast import ops
from insvp_fast.backbones.family import BlockOptions
from insvp_fast.backbones.layers import Affine, in_own_dtype, is_operation, norm_requirements
from insvp_fast.backbones.qkv import (
    BIASES,
    bias_tensors,
    is_one_product,
    norm_heads,
    project_q_kv,
    project_qkv,
    qkv_requirements,
)
from insvp_fast.backbones.vision_transformer import (
    add_positions,
    check_image,
    embed_patches,
    final_norm,
    patch_embed_requirements,
    pixel_weight,
    read_tokens,
)
from insvp_fast.backbones.vit_blocks import (
    branch_requirements,
    inactive_dropout,
    num_keys_of,
    post_norm_block,
    pre_norm_block,
    prefixed,
)
from insvp_fast.coverage import Rule, Table, rule, watch
from insvp_fast.coverage.rules import CALLED, DROPOUT_OFF, IDENTITY, LINEAR
from insvp_fast.reference import Prompts
from insvp_fast.runtime.dtypes import widened

__all__ = [
    "INDEXED_DROPOUT_OFF",
    "SUPPORTS",
    "block_requirements",
    "check_image",
    "embed",
    "final_norm",
    "forward_block",
    "only_operations",
    "pixel_weight",
    "read_tokens",
    "requirements",
    "rotation_requirements",
    "run_block",
    "shared",
]

SUPPORTS = frozenset({"reads_tokens", "carry_prompts", "lengths"})

# What is supported

ROTATIONS = (RotaryEmbeddingCat, RotaryEmbeddingDinoV3, RotaryEmbeddingMixed, RotaryEmbeddingMRope)
INDEXED_DROPOUT_OFF = (rule(PatchDropoutWithIndices, "prob num_prefix_tokens ordered", dropout_rate="prob"),)

watch("forward __call__", Eva, EvaBlock, EvaBlockPostNorm, EvaAttention, AttentionRope, PatchEmbed)
watch("forward __call__", PatchDropoutWithIndices)
watch("_pos_embed pool forward_head", Eva)
watch("apply_rot_embed_cat", timm_eva, attention)
watch("apply_rot_embed rot rope_rotate_half", pos_embed_sincos)
watch("scaled_dot_product_attention", F)


def requirements(backbone: Eva, patch_size: int) -> Table:
    """What the fast path requires of the backbone's modules."""
    prefix = sum(token.shape[1] for token in (backbone.cls_token, backbone.reg_token) if token is not None)
    places: dict[str, Any] = {
        "num_prefix_tokens": prefix,
        "rope_mixed": isinstance(backbone.rope, RotaryEmbeddingMixed),
    }
    table: Table = {
        # any other attributes: they are read by timm's methods, which both paths call
        "": (rule(Eva, " ".join(vars(backbone)), optional="cls_token reg_token pos_embed", **places),),
        **patch_embed_requirements(backbone, patch_size),
        "pos_drop": DROPOUT_OFF,
        "norm_pre": CALLED,
        "blocks": (rule(nn.ModuleList), rule(nn.Sequential)),
        "norm": (IDENTITY, *norm_requirements(backbone.embed_dim)),
        **dict.fromkeys(("fc_norm", "attn_pool", "head_drop", "head"), CALLED),
    }
    if backbone.patch_drop is not None:
        table["patch_drop"] = INDEXED_DROPOUT_OFF
    if backbone.rope is not None:
        table["rope"] = rotation_requirements(backbone.rope)
    for j, block in enumerate(backbone.blocks):
        table |= prefixed(f"blocks.{j}", block_requirements(block, backbone))
    return table


def rotation_requirements(rope: nn.Module) -> tuple[Rule, ...]:
    """What the fast path requires of a module that makes rotations."""
    return tuple(_rotation_rule(rope, cls) for cls in ROTATIONS)


def _rotation_rule(rope: nn.Module, cls: type[nn.Module]) -> Rule:
    """Any content: the fast path calls the module as timm does. It may only not be trained, or draw random numbers."""
    fixed: dict[str, Any] = {"training": False} if getattr(rope, "aug_active", False) else {}
    return rule(cls, " ".join(vars(rope)), optional="freqs", buffers=" ".join(rope._buffers), **fixed)


def block_requirements(block: nn.Module, backbone: Any) -> Table:
    """What the fast path requires of a block of such a backbone, by paths that begin with a point."""
    attn = getattr(block, "attn", None)
    scales: dict[str, Any] = {"free": "init_values gamma_1 gamma_2", "optional": "gamma_1 gamma_2"}
    return {
        "": (rule(EvaBlock, **scales), rule(EvaBlockPostNorm)),
        **branch_requirements(block, backbone.embed_dim, _attention_requirements(attn, backbone)),
    }


def _attention_requirements(attn: nn.Module | None, backbone: Any) -> Table:
    width, heads = backbone.embed_dim, getattr(attn, "num_heads", 1)
    head_width = width // max(heads, 1)
    needed: dict[str, Any] = {
        "head_dim": head_width,
        "scale": max(head_width, 1) ** -0.5,
        "num_prefix_tokens": backbone.num_prefix_tokens,
        "gate": None,
        **inactive_dropout(attn),
    }
    fused = getattr(attn, "qkv", None) is not None
    absent: dict[str, Any] = dict.fromkeys(("q_proj", "k_proj", "v_proj") if fused else ("qkv",))
    free = "num_heads fused_attn rotate_half"
    parts = bias_tensors(attn)
    eva_free = free + " qkv_bias_separate" + ("" if parts else " " + " ".join(BIASES))
    groups = max(getattr(attn, "num_kv_groups", 1), 1)
    sizes = {"attn_dim": width, "kv_dim": width // groups, "num_kv_heads": heads // groups}
    return {
        "": (
            rule(EvaAttention, eva_free, **parts, **needed, **absent),
            rule(AttentionRope, free + " num_kv_groups", **needed, **sizes, **absent),
        ),
        **qkv_requirements(attn, head_width),
        ".attn_drop": DROPOUT_OFF,
        ".norm": (IDENTITY, *norm_requirements(width)),
        ".proj": LINEAR,
        ".proj_drop": DROPOUT_OFF,
    }


# How it runs


def embed(backbone: Eva, patches: Tensor, grid: tuple[int, int]) -> Tensor:  # [B, N, K] -> [B, T, D]
    """The patch embedding as a product, with position embedding and prefix tokens (eq. 1)."""
    tokens = embed_patches(backbone.patch_embed, patches)
    constant, _ = _constants(backbone, tokens, grid)
    embedded: Tensor = backbone.norm_pre(add_positions(tokens, constant, backbone.blocks))
    return embedded


def shared(backbone: Eva, grid: tuple[int, int]) -> Tensor | None:
    """The sines and cosines of the patches' rotations, [..., N, 2·d]; in mixed mode for each block.

    In at least fp32, which the kernels read: models in 16 bits have some in theirs.
    """
    rotation = _constants(backbone, pixel_weight(backbone), grid)[1]
    if rotation is None:
        return None
    if rotation.shape[-2] != (patches := grid[0] * grid[1]):
        raise ValueError(f"the image has {patches} patches: the backbone has rotations of {rotation.shape[-2]}")
    return rotation.to(widened(rotation.dtype))


def _constants(backbone: Eva, like: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor | None]:
    """What does not depend on the image: timm adds positions and prefix tokens to the embedding of zeros."""
    shape = grid if backbone.dynamic_img_size else (grid[0] * grid[1],)
    tokens, rotation = backbone._pos_embed(like.new_zeros(1, *shape, backbone.embed_dim))
    return tokens, rotation


def forward_block(
    backbone: Eva,
    block: int,
    residual: Tensor,  # [B, T, D]
    branch: Tensor | None,  # [B, T, D], not yet added to the residual
    prompts: Prompts | None,
    options: BlockOptions,
    num_queries: int | None = None,
) -> tuple[Tensor, Tensor]:  # residual and branch, [B, num_queries or T, D]
    """One block (eq. 11)."""
    return run_block(backbone, block, residual, branch, prompts, options, num_queries, mixed=backbone.rope_mixed)


def only_operations(backbone: Eva, block: int, options: BlockOptions, num_tokens: int, num_queries: int | None) -> bool:
    """Only of blocks with norms in front, and one product for queries, keys and values."""
    blk: Any = backbone.blocks[block]
    if not isinstance(blk, EvaBlock) or num_queries is not None:
        return False
    scaled = blk.gamma_1 is not None or blk.gamma_2 is not None
    plain = all(isinstance(norm, nn.Identity) for norm in (blk.attn.q_norm, blk.attn.k_norm, blk.attn.norm))
    folded = options.folds_scale or not scaled
    return plain and folded and is_operation(blk.mlp) and is_one_product(blk.attn)


def run_block(
    backbone: Any,
    block: int,
    residual: Tensor,
    branch: Tensor | None,
    prompts: Prompts | None,
    options: BlockOptions,
    num_queries: int | None,
    mixed: bool,
) -> tuple[Tensor, Tensor]:
    """One block (eq. 11).

    ``mixed``: whether each block has rotations of its own.
    """
    run, rotation, T = backbone.blocks[block], options.shared, residual.shape[1]
    if rotation is not None and mixed:
        rotation = rotation[block]
    num_keys = num_keys_of(prompts, T)

    def attend(y: Tensor, affine: Affine) -> Tensor:
        queries = T if num_queries is None else num_queries
        return _attention(run.attn, y, affine, rotation, queries, num_keys, options)

    order = post_norm_block if isinstance(run, EvaBlockPostNorm) else pre_norm_block
    return order(run, attend, residual, branch, prompts, options, num_queries)


def _attention(
    attn: Any,
    y: Tensor,  # [B, S, D]
    affine: Affine,
    rotation: Tensor | None,
    num_queries: int,
    num_keys: Tensor | None,
    options: BlockOptions,
) -> Tensor:  # [B, num_queries, D]
    def prepared(packed: Tensor, parts: int) -> Tensor:
        normed = norm_heads(attn, packed, parts)
        if rotation is None:
            return normed
        return ops.rotate(normed, attn.num_heads, rotation, attn.num_prefix_tokens, half=attn.rotate_half)

    if num_queries <= attn.num_prefix_tokens:  # whose queries are not rotated
        q, kv = project_q_kv(attn, y, affine, num_queries)
        q = in_own_dtype(attn.q_norm, q.unflatten(-1, (attn.num_heads, -1))).to(kv.dtype).flatten(2)
        attended = ops.query_attention(q, prepared(kv, 2), attn.num_heads, attn.scale, num_keys=num_keys)
    else:
        packed = prepared(project_qkv(attn, y, affine), 3)
        rest = attn.num_heads, num_queries, attn.scale
        attended = ops.attention(packed, *rest, num_keys=num_keys, impl=options.attention)
    return in_own_dtype(attn.norm, attended).to(y.dtype)
