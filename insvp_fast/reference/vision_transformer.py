"""timm's ``VisionTransformer`` with prompts."""

from __future__ import annotations

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from insvp_fast.reference.structure import Prompts

__all__ = ["apply_block", "embed", "final_norm", "insert", "patch_size", "split", "widths"]


def patch_size(backbone: VisionTransformer) -> int:
    """P, the side of the backbone's patches; of a hybrid, of what each token comes from in the grid of the image."""
    height, width = backbone.patch_embed.feat_ratio(as_scalar=False)
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


def insert(tokens: Tensor, prompts: Prompts, prefix: int) -> Tensor:
    """Prompts [B, L, D] between the first ``prefix`` tokens and the others, [B, T+L, D]."""
    return torch.cat([tokens[:, :prefix], prompts.tokens.to(tokens.dtype), tokens[:, prefix:]], dim=1)


def split(z: Tensor, length: int, prefix: int) -> tuple[Tensor, Tensor]:
    """The inverse of ``insert``: tokens [B, T, D] and the ``length`` prompts, [B, L, D]."""
    return torch.cat([z[:, :prefix], z[:, prefix + length :]], dim=1), z[:, prefix : prefix + length]


def apply_block(
    backbone: VisionTransformer, block: int, h: Tensor, prompts: Prompts | None
) -> tuple[Tensor, Tensor | None]:
    """A block of tokens [B, T, D] and prompts, which stand between prefix tokens and patches (eq. 2 and 11)."""
    run, prefix = backbone.blocks[block], backbone.num_prefix_tokens
    if prompts is None:
        return run(h), None  # (2)
    return split(run(insert(h, prompts, prefix)), prompts.tokens.shape[1], prefix)  # (11)


def final_norm(backbone: VisionTransformer, h: Tensor) -> Tensor:
    """The norm after the last block."""
    normed: Tensor = backbone.norm(h)
    return normed
