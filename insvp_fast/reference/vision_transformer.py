"""timm's ``VisionTransformer`` with prompts."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from insvp_fast.reference.structure import Prompts

__all__ = ["apply_block", "embed", "final_norm", "patch_size", "widths"]


def patch_size(backbone: VisionTransformer) -> int:
    """P, the side of the backbone's patches."""
    height, width = backbone.patch_embed.patch_size
    if height != width:
        raise ValueError(f"the backbone has {height}x{width} patches: expected square ones")
    return int(height)


def widths(backbone: VisionTransformer) -> list[int]:
    """D of each block."""
    return [backbone.embed_dim] * len(backbone.blocks)


def embed(backbone: VisionTransformer, image: Tensor) -> Tensor:  # [B, C, H, W] -> [B, T, D]
    """Patch and position embedding, and prefix tokens (eq. 1)."""
    tokens = backbone._pos_embed(backbone.patch_embed(image))
    embedded: Tensor = backbone.norm_pre(backbone.patch_drop(tokens))
    return embedded


def apply_block(
    backbone: VisionTransformer, block: int, h: Tensor, prompts: Prompts | None
) -> tuple[Tensor, Tensor | None]:
    """A block of tokens [B, T, D] and prompts, which stand between prefix tokens and patches (eq. 2 and 11)."""
    if prompts is None:
        return backbone.blocks[block](h), None  # (2)
    p_j = prompts.tokens
    n, L = backbone.num_prefix_tokens, p_j.shape[1]
    z = backbone.blocks[block](torch.cat([h[:, :n], p_j.to(h.dtype), h[:, n:]], dim=1))  # (11)
    return torch.cat([z[:, :n], z[:, n + L :]], dim=1), z[:, n : n + L]


def final_norm(backbone: VisionTransformer, h: Tensor) -> Tensor:
    """The norm after the last block."""
    normed: Tensor = backbone.norm(h)
    return normed
