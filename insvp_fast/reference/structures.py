"""The kinds of backbones that prompts can be put into."""

from __future__ import annotations

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from insvp_fast.reference import vision_transformer
from insvp_fast.reference.structure import Structure

__all__ = ["STRUCTURES", "structure_of"]

STRUCTURES: dict[type[nn.Module], Structure] = {VisionTransformer: vision_transformer}


def structure_of(backbone: nn.Module) -> Structure:
    """The structure of a backbone, by its type or a base of that.

    Raises:
        TypeError: if prompts cannot be put into such a backbone.
    """
    for cls, structure in STRUCTURES.items():
        if isinstance(backbone, cls):
            return structure
    raise TypeError(f"backbone is a {type(backbone).__name__}: expected a timm VisionTransformer")
