"""What a backbone family provides for the fast path of ``PromptedViT``."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from insvp_fast.coverage import Table
from insvp_fast.reference import Prompts

__all__ = ["BackboneFamily", "BlockOptions"]


class BlockOptions(NamedTuple):
    """How the blocks are computed; see the arguments of ``InsVPViT``."""

    dtype: torch.dtype  # of the products
    fold_norm: bool  # whether a norm's affine map and the layer scale are folded into the products beside them
    attention: str  # the implementation, one of ``ops.ATTENTION``; blocks with ``num_queries`` have only one
    mlp_keeps: str  # what the MLP keeps for backward: the argument ``keep`` of ``ops.mlp``
    grid: tuple[int, int]  # the numbers of patches from top to bottom and from left to right
    shared: Tensor | None  # what the family's ``shared`` returns

    @property
    def folds_scale(self) -> bool:
        """Whether the layer scale is folded: fp16 cannot hold weights that are multiplied by small ones."""
        return self.fold_norm and self.dtype != torch.float16


class BackboneFamily(Protocol):
    """The functions of a module in this package: one file for each family, listed in ``FAMILIES``.

    Blocks are counted as in the backbone's ``Structure``. Tokens are [B, T, D] from block to block, in whatever order
    the family puts them; T and D may differ from block to block. ``SUPPORTS`` of a module is as that of a
    ``Structure``: it has "reads_tokens" if the tokens stand as in the structure's, and "carry_prompts" if a further
    token behind them is what a prompt is; and "lengths" if ``forward_block`` heeds ``Prompts.lengths``, which must be
    None without it.

    A module has ``attention_choices(backbone)`` if its attention does not have all of ``ops.ATTENTION``, and
    ``only_operations(backbone, block, options, num_tokens, num_queries)``, asked where attention itself is one, if
    there are blocks that call nothing but operations, so that a program can record them
    (``insvp_fast/runtime/programs.py``). Besides what they are given and packed weights, these read only tensors of
    which they tell ``native.lasting``.

    It has ``embeds_by_operations(backbone)``, asked in every pass, if the same may be true of ``embed``.

    ``requirements`` says for which backbones the fast path computes what timm's modules compute: ``check_image``,
    ``embed``, ``forward_block`` and ``final_norm`` are called only while it holds, the others for all of the family.
    """

    SUPPORTS: frozenset[str]

    def requirements(self, backbone: Any, patch_size: int) -> Table:
        """What the fast path requires of the backbone's modules."""

    def pixel_weight(self, backbone: Any) -> Tensor:
        """The weight that multiplies the pixels; images and products have its dtype unless autocast casts them."""

    def check_image(self, backbone: Any, image: Tensor) -> None:
        """Raise ValueError for an image that the backbone cannot take."""

    def read_tokens(self, backbone: Any) -> int | None:
        """How many of the first tokens the head reads, so that the last block needs no others; None: all of them."""

    def embed(self, backbone: Any, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Unfolded patches [B, N, K], N = the product of ``grid``, to the first block's tokens [B, T, D] (eq. 1)."""

    def shared(self, backbone: Any, grid: tuple[int, int]) -> Tensor | None:
        """What does not depend on the image and is made once for all blocks, which find it in ``BlockOptions``."""

    def forward_block(
        self,
        backbone: Any,
        block: int,
        residual: Tensor,
        branch: Tensor | None,
        prompts: Prompts | None,
        options: BlockOptions,
        num_queries: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A block with prompts (eq. 11); its input and output are ``residual + branch``, not yet added.

        ``num_queries``: compute only the first tokens of the output, [B, num_queries, D] instead of [B, T, D].
        """

    def final_norm(self, backbone: Any, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """The norm after the last block, of tokens [B, T, D], as the backbone's ``forward_features`` returns it."""
