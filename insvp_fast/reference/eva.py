"""timm's ``Eva`` (EVA-02, DINOv3, Perception Encoder): rotary position embedding, from which prompts are left out."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.eva import Eva
from torch import Tensor

from insvp_fast.reference.structure import Prompts, Stream
from insvp_fast.reference.vision_transformer import insert, insert_in_mask, patch_size, split, widths

__all__ = ["SUPPORTS", "apply_block", "embed", "final_norm", "patch_size", "run_block", "widths"]

SUPPORTS = frozenset({"reads_tokens", "carry_prompts", "attn_mask"})


def embed(backbone: Eva, image: Tensor) -> Stream:
    """Patch and position embedding, prefix tokens and rotations (eq. 1)."""
    tokens, rotation = backbone._pos_embed(backbone.patch_embed(image))
    return Stream(backbone.norm_pre(tokens), rotation)


def apply_block(backbone: Eva, block: int, h: Stream, prompts: Prompts | None) -> tuple[Stream, Tensor | None]:
    """A block of tokens and prompts, see ``run_block``."""
    return run_block(backbone, block, h, prompts, mixed=getattr(backbone, "rope_mixed", False))


def run_block(
    backbone: Any, block: int, h: Stream, prompts: Prompts | None, mixed: bool
) -> tuple[Stream, Tensor | None]:
    """A block of tokens and prompts, which stand between prefix tokens and patches, and are rotated by the angle 0.

    ``mixed``: whether each block has rotations of its own.
    """
    (z, rotation, mask, _), prefix = h, backbone.num_prefix_tokens
    if rotation is not None and mixed:
        rotation = rotation[block]
    if prompts is not None:
        z, L, mask = insert(z, prompts, prefix), prompts.tokens.shape[1], insert_in_mask(mask, prompts, prefix)
        if rotation is not None:
            sines, cosines = rotation.chunk(2, -1)
            still = sines.new_zeros(*sines.shape[:-2], L, sines.shape[-1])
            rotation = torch.cat([torch.cat([still, sines], -2), torch.cat([still + 1, cosines], -2)], -1)
    given = {"rope": rotation, "attn_mask": mask}
    z = backbone.blocks[block](z, **{name: value for name, value in given.items() if value is not None})
    if prompts is None:
        return h._replace(tokens=z), None  # (2)
    tokens, outputs = split(z, L, prefix)
    return h._replace(tokens=tokens), outputs  # (11)


def final_norm(backbone: Any, h: Stream) -> Tensor:
    """The norm after the last block."""
    normed: Tensor = backbone.norm(h.tokens)
    return normed
