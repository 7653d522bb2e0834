"""Any other backbone of timm: it takes image prompts, and no prompt tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from insvp_fast.reference.structure import Prompts

__all__ = ["SUPPORTS", "apply_block", "embed", "final_norm", "patch_size", "widths"]

SUPPORTS: frozenset[str] = frozenset()
PATCH_SIZE = 16  # the paper's


def patch_size(backbone: nn.Module) -> int:
    """The side of the patch prompter's patches: that of the backbone where it has square ones, else the paper's."""
    sides: Any = getattr(getattr(backbone, "patch_embed", None), "patch_size", None)
    square = isinstance(sides, tuple) and len({*sides}) == 1 and sides[0] > 0
    return int(sides[0]) if square else PATCH_SIZE


def widths(backbone: nn.Module) -> list[int]:
    """None: there is no block that prompts can be put into."""
    return []


def embed(backbone: nn.Module, image: Tensor) -> Tensor:
    """The image."""
    return image


def apply_block(backbone: nn.Module, block: int, h: Any, prompts: Prompts | None) -> tuple[Any, Tensor | None]:
    """There is no block."""
    raise IndexError(f"block {block}: a {type(backbone).__name__} has no blocks that prompts can be put into")


def final_norm(backbone: Any, h: Tensor) -> Tensor:
    """The backbone's features of the prompted image."""
    features: Tensor = backbone.forward_features(h)
    return features
