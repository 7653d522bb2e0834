"""timm's ``Beit`` and ``VisionTransformerRelPos``: the scores of two tokens get a bias, those of prompts get none.

All tokens are one window of ``ops.window_attention``; the last block asks few queries, as in ``vision_transformer``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, RelPosBias, RelPosMlp
from timm.models.beit import Attention, Beit, RelativePositionBias
from timm.models.beit import Block as BeitBlock
from timm.models.vision_transformer_relpos import (
    RelPosAttention,
    RelPosBlock,
    ResPostRelPosBlock,
    VisionTransformerRelPos,
)
from torch import Tensor, nn

from insvp_fast import ops
from insvp_fast.backbones.family import BlockOptions
from insvp_fast.backbones.layers import LAYER_SCALE, Affine, is_operation, mlp_requirements, norm_requirements
from insvp_fast.backbones.qkv import (
    BIASES,
    bias_tensors,
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
)
from insvp_fast.backbones.vit_blocks import (
    attend_from_first,
    branch_requirements,
    inactive_dropout,
    post_norm_block,
    pre_norm_block,
    prefixed,
)
from insvp_fast.backbones.windows import position_bias, tokens_of_windows
from insvp_fast.coverage import Table, rule, watch
from insvp_fast.coverage.rules import CALLED, DROPOUT_OFF, IDENTITY, LINEAR
from insvp_fast.ops import FrozenLinear
from insvp_fast.reference import Prompts
from insvp_fast.reference.relative_position import attention_bias
from insvp_fast.runtime import native

__all__ = [
    "SUPPORTS",
    "attention_choices",
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

SUPPORTS = frozenset({"reads_tokens"})

# What is supported

watch("forward __call__", Beit, BeitBlock, Attention, RelativePositionBias)
watch("forward __call__", VisionTransformerRelPos, RelPosBlock, ResPostRelPosBlock, RelPosAttention, PatchEmbed)
watch("forward_head", Beit, VisionTransformerRelPos)
watch("_get_rel_pos_bias", Attention)
watch("get_bias", RelPosBias, RelPosMlp)
watch("scaled_dot_product_attention", F)


def requirements(backbone: Beit | VisionTransformerRelPos, patch_size: int) -> Table:
    """What the fast path requires of the backbone's modules."""
    width, any_attributes = backbone.embed_dim, " ".join(vars(backbone))  # timm's methods read them, on both paths
    norm = CALLED if isinstance(backbone.norm, nn.Identity) else norm_requirements(width)
    table: Table = {
        "": (
            rule(Beit, any_attributes, optional="cls_token pos_embed"),
            rule(VisionTransformerRelPos, any_attributes, optional="cls_token"),
        ),
        **patch_embed_requirements(backbone, patch_size),
        "blocks": (rule(nn.ModuleList), rule(nn.Sequential)),
        "norm": norm,
        **dict.fromkeys(("fc_norm", "head_drop", "head"), CALLED),
    }
    if isinstance(backbone, Beit):
        table["pos_drop"] = DROPOUT_OFF
    for name in ("rel_pos_bias", "shared_rel_pos"):
        if (source := getattr(backbone, name, None)) is not None:
            table |= prefixed(name, _bias_requirements(source))
    for j, block in enumerate(backbone.blocks):
        table |= prefixed(f"blocks.{j}", _block_requirements(block, width))
    return table


def _bias_requirements(source: nn.Module) -> Table:
    """A module that makes the bias. It is called, so that its numbers may be any, but it must not be trained."""
    free, buffers = " ".join(vars(source)), "relative_position_index rel_coords_log"
    table: Table = {
        "": (
            rule(RelativePositionBias, free, required="relative_position_bias_table", buffers=buffers),
            rule(RelPosBias, free, required="relative_position_bias_table", buffers=buffers),
            rule(RelPosMlp, free, buffers=buffers),
        )
    }
    if isinstance(source, RelPosMlp):
        relu = rule(nn.ReLU, "inplace")
        table |= {".bias_act": (IDENTITY, rule(nn.Sigmoid)), **prefixed(".mlp", mlp_requirements(source.mlp))}
        table[".mlp.act"] = (relu,)
    return table


def _block_requirements(block: nn.Module, width: int) -> Table:
    scales: Table = {".ls1": LAYER_SCALE, ".ls2": LAYER_SCALE} if isinstance(block, RelPosBlock) else {}
    return {
        "": (
            rule(BeitBlock, "init_values gamma_1 gamma_2", optional="gamma_1 gamma_2"),
            rule(RelPosBlock),
            rule(ResPostRelPosBlock, "init_values"),
        ),
        **branch_requirements(block, width, _attention_requirements(getattr(block, "attn", None), width)),
        **scales,
    }


def _attention_requirements(attn: nn.Module | None, width: int) -> Table:
    head_width = width // max(getattr(attn, "num_heads", 1), 1)
    needed: dict[str, Any] = {"scale": max(head_width, 1) ** -0.5, **inactive_dropout(attn)}
    parts = bias_tensors(attn)
    of_beit = "num_heads fused_attn qkv_bias_separate window_size num_relative_distance"
    of_beit += " relative_position_bias_table relative_position_index"  # None where it has no bias of its own
    required, buffers = parts.get("required", ""), parts.get("buffers", "") + " relative_position_index"
    no_parts = "" if parts else " ".join(BIASES)
    layers = qkv_requirements(attn, head_width)
    if isinstance(attn, Attention):  # which has no norms of queries and keys
        layers = {path: rules for path, rules in layers.items() if path == ".qkv"}
    table: Table = {
        "": (
            rule(
                Attention,
                f"{of_beit} {no_parts}",
                required=required,
                optional="relative_position_bias_table",
                buffers=buffers,
                **needed,
            ),
            rule(RelPosAttention, "num_heads fused_attn rel_pos", head_dim=head_width, **needed),
        ),
        **layers,
        ".attn_drop": DROPOUT_OFF,
        ".proj": LINEAR,
        ".proj_drop": DROPOUT_OFF,
    }
    source = getattr(attn, "rel_pos", None)
    return table if source is None else table | prefixed(".rel_pos", _bias_requirements(source))


def attention_choices(backbone: Beit | VisionTransformerRelPos) -> tuple[str, ...]:
    """The implementations of attention, which are fewer with a bias of the scores."""
    biased = any("rel_pos" in name or "relative_position" in name for name, _ in backbone.named_parameters())
    return ops.WINDOW_ATTENTION if biased else ops.ATTENTION


# How it runs


def read_tokens(backbone: Beit | VisionTransformerRelPos) -> int | None:
    """1 where the head reads only the class token, None where it reads all."""
    return 1 if backbone.global_pool == "token" else None


def embed(
    backbone: Beit | VisionTransformerRelPos, patches: Tensor, grid: tuple[int, int]
) -> Tensor:  # [B, N, K] -> [B, T, D]
    """The patch embedding as a product, with class token and position embedding where there are such (eq. 1)."""
    tokens = embed_patches(backbone.patch_embed, patches)
    positions = getattr(backbone, "pos_embed", None)
    constant = tokens.new_zeros(1, *tokens.shape[1:])
    if backbone.cls_token is not None:
        constant = torch.cat([backbone.cls_token, constant], dim=1)
    constant = constant if positions is None else constant + positions
    return add_positions(tokens, constant, backbone.blocks)


def shared(backbone: Beit | VisionTransformerRelPos, grid: tuple[int, int]) -> Tensor | None:
    """The bias that all blocks have, [heads, T, T] or [1, heads, T, T]."""
    if isinstance(backbone, VisionTransformerRelPos):
        return None if backbone.shared_rel_pos is None else backbone.shared_rel_pos.get_bias()
    return None if backbone.rel_pos_bias is None else backbone.rel_pos_bias()


def forward_block(
    backbone: Beit | VisionTransformerRelPos,
    block: int,
    residual: Tensor,  # [B, T, D]
    branch: Tensor | None,  # [B, T, D], not yet added to the residual
    prompts: Prompts | None,
    options: BlockOptions,
    num_queries: int | None = None,
) -> tuple[Tensor, Tensor]:  # residual and branch, [B, num_queries or T, D]
    """One block (eq. 11)."""
    run, T = backbone.blocks[block], residual.shape[1]

    def attend(y: Tensor, affine: Affine) -> Tensor:
        return _attention(run.attn, y, affine, T, options, num_queries)

    order = post_norm_block if isinstance(run, ResPostRelPosBlock) else pre_norm_block
    return order(run, attend, residual, branch, prompts, options, num_queries)


def only_operations(
    backbone: Beit | VisionTransformerRelPos,
    block: int,
    options: BlockOptions,
    num_tokens: int,
    num_queries: int | None,
) -> bool:
    """Only of BEiT's blocks, with layer scales only where they are folded."""
    blk = backbone.blocks[block]
    if not isinstance(blk, BeitBlock) or num_queries is not None:
        return False
    scaled = blk.gamma_1 is not None or blk.gamma_2 is not None
    return is_operation(blk.mlp) and (options.folds_scale or not scaled)


def _attention(
    attn: Any, y: Tensor, affine: Affine, num_tokens: int, options: BlockOptions, num_queries: int | None
) -> Tensor:  # [B, S, D] -> [B, num_queries or T, D]
    bias = _bias(attn, options.shared)
    if num_queries is None:
        return _attend(attn, y, affine, num_tokens, bias, options.attention)
    bias = None if bias is None else bias[:, :num_queries]
    if isinstance(attn, RelPosAttention):
        return attend_from_first(attn, FrozenLinear.of(attn.qkv, *affine), y, num_queries, bias=bias)
    q, kv = project_q_kv(attn, y, affine, num_queries)
    return ops.query_attention(q, kv, attn.num_heads, attn.scale, bias=bias)


def _bias(attn: Any, shared: Tensor | None) -> Tensor | None:  # [heads, T, T]
    """The bias of the scores; kept if it is looked up in a table of BEiT's alone."""
    if isinstance(attn, Attention) and attn.relative_position_bias_table is not None and shared is None:
        return position_bias(attn)
    bias = attention_bias(attn, shared)
    return None if bias is None else bias.flatten(0, -3)


def _attend(attn: Any, y: Tensor, affine: Affine, num_tokens: int, bias: Tensor | None, impl: str) -> Tensor:
    packed = project_qkv(attn, y, affine)
    if isinstance(attn, RelPosAttention):
        packed = norm_heads(attn, packed, 3)
    if bias is None:
        return ops.attention(packed, attn.num_heads, num_tokens, attn.scale, impl=impl)
    window = tokens_of_windows((1, num_tokens), (1, num_tokens), (0, 0), y)
    native.lasting(window)
    return ops.window_attention(packed, attn.num_heads, window, bias, None, attn.scale, impl=impl)
