"""What the reference has to know of a backbone to put prompts into it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

__all__ = ["Prompts", "Stream", "Structure", "in_channels", "pixel_layer", "require_plain", "square_side"]


class Prompts(NamedTuple):
    """What a block attends to besides the backbone's tokens.

    Attributes:
        tokens: [B, L, D], which pass the norm and the projections of the block like the backbone's own tokens; L may
            be 0.
        lengths: [B], int64: how many of them an image has, if fewer than L; the others are padding, to which nothing
            attends. For the fast path alone: a ``Structure`` takes whole prompts.
        keys_values: [B, M, 2·D], M further keys and, behind them, their values, with the heads folded into D as in the
            backbone: nothing is done to them. Only for a structure that ``SUPPORTS`` them, and without ``lengths``.
    """

    tokens: Tensor
    lengths: Tensor | None = None
    keys_values: Tensor | None = None


class Stream(NamedTuple):
    """h of a backbone whose blocks take more than the tokens.

    Attributes:
        tokens: [B, T, D].
        rotation: the sines and cosines of the patches' rotations, [..., N, 2·d]; in mixed mode per block.
        attn_mask: of the attention among the tokens, [..., T, T]; see ``with_mask``.
        shared_bias: of the scores in all blocks, [heads, T, T] or [1, heads, T, T].
    """

    tokens: Tensor
    rotation: Tensor | None = None
    attn_mask: Tensor | None = None
    shared_bias: Tensor | None = None


def square_side(height: int, width: int) -> int:
    """The side of a backbone's patches.

    Raises:
        ValueError: if they are not square.
    """
    if height != width:
        raise ValueError(f"the backbone has {height}x{width} patches: expected square ones")
    return int(height)


def require_plain(module: nn.Module | None, *expected: type[nn.Module]) -> None:
    """Check a module whose forward a ``Structure`` writes out, so that it is not called itself.

    Raises:
        TypeError: if it is of another class than these, or has a forward or hooks of its own.
    """
    kinds = " or ".join(cls.__name__ for cls in expected)
    if module is None or type(module) not in expected:
        raise TypeError(f"a block has a {type(module).__name__}: expected timm's {kinds}")
    if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
        raise TypeError(f"a {type(module).__name__} has a forward or hooks of its own, which would not run")


class Structure(Protocol):
    """The functions of a module in this package: one file for each kind of backbone, listed in ``STRUCTURES``.

    A backbone is a sequence of J blocks. What runs from block to block is called h: the tokens [B, T, D], or whatever
    the backbone's own blocks take and return.

    A module says in ``SUPPORTS`` which attributes of a ``PromptMethod`` may be true: "reads_tokens" if h, or else
    ``h.tokens``, is [B, T, D] with the prefix tokens first, "gives_keys_values", and "carry_prompts". Besides,
    "attn_mask": h may be a ``Stream`` with a mask.
    """

    SUPPORTS: frozenset[str]

    def patch_size(self, backbone: Any) -> int:
        """P, the side of the patches that the backbone cuts an image into.

        Raises:
            ValueError: if they are not square.
        """

    def widths(self, backbone: Any) -> Sequence[int]:
        """D of each block, in the order in which they run."""

    def embed(self, backbone: Any, image: Tensor) -> Any:
        """h before the first block (eq. 1)."""

    def apply_block(self, backbone: Any, block: int, h: Any, prompts: Prompts | None) -> tuple[Any, Tensor | None]:
        """Block number ``block`` of h with prompts (eq. 2 and 11).

        Returns:
            h behind the block, and the outputs of the prompts, [B, L, D]; None without prompts, or where they have no
            outputs.
        """

    def final_norm(self, backbone: Any, h: Any) -> Tensor:
        """The features of the image, as the backbone's ``forward_features`` returns them."""


def pixel_layer(backbone: nn.Module) -> nn.Conv2d | nn.Linear:
    """The layer that reads the image: the first convolution, or in a backbone without one the first linear layer.

    Raises:
        TypeError: if there is neither.
    """
    for kind in (nn.Conv2d, nn.Linear):
        for module in backbone.modules():
            if isinstance(module, kind):
                return module
    raise TypeError(f"a {type(backbone).__name__} has no convolution and no linear layer: expected one to read images")


def in_channels(backbone: nn.Module, patch_size: int) -> int:
    """C of the images that a backbone reads."""
    layer = pixel_layer(backbone)
    return layer.in_channels if isinstance(layer, nn.Conv2d) else layer.in_features // patch_size**2
