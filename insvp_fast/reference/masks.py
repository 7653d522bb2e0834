"""Masks of the attention, which timm's models take beside the image, in blocks with prompts."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor

from insvp_fast.reference.structure import Stream
from insvp_fast.reference.structures import structure_of

__all__ = ["require_masks", "with_mask"]


def require_masks(backbone: Any) -> None:
    """Check that the blocks of a backbone take a mask.

    Raises:
        ValueError: if they take none.
    """
    refusing = backbone
    if "attn_mask" in structure_of(backbone).SUPPORTS:
        refusing = next((b for b in backbone.blocks if "attn_mask" not in signature(b.forward).parameters), None)
    if refusing is not None:
        kind = type(refusing).__name__
        raise ValueError(f"a mask was given, and the attention of a {kind} takes none: expected attn_mask=None")


def with_mask(backbone: Any, h: Any, mask: Tensor) -> Stream:
    """h before the first block, together with a mask of the attention among its T tokens.

    Args:
        mask: [T, T], or [1 or B, 1 or heads, 1 or T, T]; bool, True where a query attends to a key, or summands of the
            scores.

    Raises:
        ValueError: for a mask of another shape or dtype, or if the blocks take none.
    """
    require_masks(backbone)
    stream = h if isinstance(h, Stream) else Stream(h)
    B, T, _ = stream.tokens.shape
    heads = next((module.num_heads for module in backbone.blocks.modules() if hasattr(module, "num_heads")), 1)
    sizes = [{1, B}, {1, heads}, {1, T}, {T}] if mask.ndim == 4 else [{T}, {T}]
    if len(sizes) != mask.ndim or any(size not in allowed for size, allowed in zip(mask.shape, sizes, strict=True)):
        raise ValueError(
            f"attn_mask has shape {tuple(mask.shape)}: expected {(T, T)} or {(B, 1, T, T)}; prompts are not among them"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"attn_mask has dtype {mask.dtype}: expected torch.bool or a floating-point one")
    mask = mask if mask.dtype == torch.bool else mask.to(stream.tokens.dtype)
    return stream._replace(attn_mask=mask.expand(*mask.shape[:-2], T, T))
