"""timm's ``NaFlexVit``, given whole images: perhaps rotary position embedding, from which prompts are left out."""

from __future__ import annotations

from timm.models.naflexvit import NaFlexVit
from torch import Tensor

from insvp_fast.reference.eva import final_norm, run_block
from insvp_fast.reference.structure import Prompts, Stream, square_side
from insvp_fast.reference.vision_transformer import widths

__all__ = ["SUPPORTS", "apply_block", "embed", "final_norm", "patch_size", "widths"]

SUPPORTS = frozenset({"reads_tokens", "carry_prompts", "attn_mask"})


def patch_size(backbone: NaFlexVit) -> int:
    """P, the side of the backbone's patches."""
    return square_side(*backbone.embeds.patch_size)


def embed(backbone: NaFlexVit, image: Tensor) -> Stream:
    """Patch and position embedding, prefix tokens and rotations (eq. 1)."""
    embeds = backbone._forward_embeds(image, None, None, None)
    return Stream(embeds["patches"], embeds["rope_embeds"])


def apply_block(backbone: NaFlexVit, block: int, h: Stream, prompts: Prompts | None) -> tuple[Stream, Tensor | None]:
    """As in an ``Eva`` (eq. 2 and 11)."""
    return run_block(backbone, block, h, prompts, mixed=backbone.rope_is_mixed)
