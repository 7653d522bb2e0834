"""timm's ``Cait``: attention with talking heads, and a class token that only the last blocks have."""

from __future__ import annotations

from timm.models.cait import Cait
from torch import Tensor

from insvp_fast.reference.structure import Prompts
from insvp_fast.reference.vision_transformer import insert, patch_size, split, widths

__all__ = ["SUPPORTS", "apply_block", "embed", "final_norm", "patch_size", "widths"]

SUPPORTS: frozenset[str] = frozenset()


def embed(backbone: Cait, image: Tensor) -> Tensor:
    """Patch and position embedding, [B, N, D] (eq. 1)."""
    tokens: Tensor = backbone.pos_drop(backbone.patch_embed(image) + backbone.pos_embed)
    return tokens


def apply_block(backbone: Cait, block: int, h: Tensor, prompts: Prompts | None) -> tuple[Tensor, Tensor | None]:
    """A block of patch tokens and prompts (eq. 2 and 11); those with the class token get no prompts."""
    run = backbone.blocks[block]
    if prompts is None:
        return run(h), None
    return split(run(insert(h, prompts, 0)), prompts.tokens.shape[1], 0)


def final_norm(backbone: Cait, h: Tensor) -> Tensor:
    """The blocks with the class token, and the norm."""
    if backbone.blocks_token_only is not None:
        h = backbone.forward_cls(h)
    normed: Tensor = backbone.norm(h)
    return normed
