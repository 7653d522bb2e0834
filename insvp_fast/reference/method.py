"""What a method of prompting is: the interface of all methods, and what they may know of the backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

from torch import Tensor, nn

from insvp_fast.reference.structure import Prompts

__all__ = ["Geometry", "PromptMethod"]


class Geometry(NamedTuple):
    """What a method may know of the backbone.

    Attributes:
        widths: D of each block; empty for a backbone that takes image prompts only.
        in_channels, patch_size: C and P.
        image_size: (H, W) of the images that the backbone was made for, or pretrained on; None if it does not say.
        num_prefix_tokens: the number of tokens before those of the patches.
        num_heads: of the first attention; 1 for a backbone that has none.
    """

    widths: tuple[int, ...]
    in_channels: int
    patch_size: int
    image_size: tuple[int, int] | None
    num_prefix_tokens: int
    num_heads: int = 1

    @classmethod
    def of(cls, backbone: nn.Module, widths: Sequence[int], in_channels: int, patch_size: int) -> Self:
        """The geometry of a backbone of timm, of which its structure told the rest."""
        cfg = getattr(backbone, "pretrained_cfg", None) or {}
        size = getattr(getattr(backbone, "patch_embed", None), "img_size", None) or cfg.get("input_size", ())[-2:]
        prefix = getattr(backbone, "num_prefix_tokens", 0)
        heads: Any = next((module.num_heads for module in backbone.modules() if hasattr(module, "num_heads")), 1)
        return cls(tuple(widths), in_channels, patch_size, (size[0], size[1]) if size else None, prefix, heads)

    @property
    def width(self) -> int:
        """D, the same in all blocks.

        Raises:
            ValueError: if it is not.
        """
        if len({*self.widths}) != 1:
            raise ValueError(f"the blocks have widths {sorted({*self.widths})}: this method expects one width")
        return self.widths[0]

    @property
    def fixed_image_size(self) -> tuple[int, int]:
        """The image size, for a method whose parameters depend on it.

        Raises:
            ValueError: if the backbone does not say one.
        """
        if self.image_size is None:
            raise ValueError("the backbone does not say its image size, which this method expects")
        return self.image_size

    def blocks(self, chosen: Sequence[int] | None) -> tuple[int, ...]:
        """The chosen blocks in their order; all if none were named.

        Raises:
            ValueError: for a block that the backbone does not have, or if it has none that take prompts.
        """
        depth = len(self.widths)
        if not depth:
            raise ValueError("the backbone has no blocks that prompts can be put into, it takes image prompts only")
        blocks = range(depth) if chosen is None else sorted({*chosen})
        if wrong := [j for j in blocks if not 0 <= j < depth]:
            raise ValueError(f"block {wrong[0]} was chosen, but the backbone has blocks 0 to {depth - 1}")
        return tuple(blocks)


class PromptMethod(nn.Module):
    """A method of prompting: how it prompts the image, and how it prompts a block. This base does neither.

    A method is a module for one backbone, made with its ``Geometry`` first and its own settings by name. Its parameters
    are trained. It is called alike by the reference and by the fast path.

    Attributes:
        reads_tokens: whether ``block_prompts`` needs the tokens of its block, which the fast path then has to add up.
        gives_keys_values: whether its prompts may have ``keys_values``.
        carry_prompts: whether the outputs of prompt tokens are the prompts of a block that has none of its own. The
            others end with their block, and cost their keys and values alone.
        prompted_blocks: the blocks that have prompts of their own, in order; with ``carry_prompts`` each must.
    """

    reads_tokens = False
    gives_keys_values = False
    carry_prompts = False

    def __init__(self, geometry: Geometry) -> None:
        super().__init__()
        self.geometry = geometry
        self.prompted_blocks: tuple[int, ...] = ()

    def prompt_image(self, image: Tensor) -> tuple[Tensor, Any]:
        """The image that the backbone reads, [B, C, H, W], and the context: what ``block_prompts`` needs of it."""
        return image, None

    def block_prompts(self, block: int, context: Any, batch: int, tokens: Tensor | None = None) -> Prompts | None:
        """The prompts of a block, for ``batch`` images; None for a block without prompts of its own.

        ``tokens``: what enters the block, [B, T, D] without prompts, if the method ``reads_tokens``.
        """
        return None
