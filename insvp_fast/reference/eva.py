"""timm's ``Eva`` (EVA-02, DINOv3, Perception Encoder): rotary position embedding, from which prompts are left out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from timm.models.eva import Eva
from torch import Tensor

from insvp_fast.reference.structure import Prompts
from insvp_fast.reference.vision_transformer import insert, patch_size, split, widths

__all__ = ["Stream", "apply_block", "embed", "final_norm", "patch_size", "widths"]

SUPPORTS = frozenset({"reads_tokens", "carry_prompts"})


class Stream(NamedTuple):
    """Tokens [B, T, D], and the sines and cosines of the patches' rotations, [..., N, 2·d]; in mixed mode per block."""

    tokens: Tensor
    rotation: Tensor | None


def embed(backbone: Eva, image: Tensor) -> Stream:
    """Patch and position embedding, prefix tokens and rotations (eq. 1)."""
    tokens, rotation = backbone._pos_embed(backbone.patch_embed(image))
    return Stream(backbone.norm_pre(tokens), rotation)


def apply_block(backbone: Eva, block: int, h: Stream, prompts: Prompts | None) -> tuple[Stream, Tensor | None]:
    """A block of tokens and prompts, which stand between prefix tokens and patches, and are rotated by the angle 0."""
    run, rotation = backbone.blocks[block], h.rotation
    if rotation is not None and backbone.rope_mixed:
        rotation = rotation[block]
    if prompts is None:
        return h._replace(tokens=run(h.tokens, rope=rotation)), None  # (2)
    L = prompts.tokens.shape[1]
    if rotation is not None:
        sines, cosines = rotation.chunk(2, -1)
        still = sines.new_zeros(*sines.shape[:-2], L, sines.shape[-1])
        rotation = torch.cat([torch.cat([still, sines], -2), torch.cat([still + 1, cosines], -2)], -1)
    z = run(insert(h.tokens, prompts, backbone.num_prefix_tokens), rope=rotation)
    tokens, outputs = split(z, L, backbone.num_prefix_tokens)
    return h._replace(tokens=tokens), outputs  # (11)


def final_norm(backbone: Eva, h: Stream) -> Tensor:
    """The norm after the last block."""
    normed: Tensor = backbone.norm(h.tokens)
    return normed
