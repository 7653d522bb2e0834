"""What a backbone family provides for the fast path of ``InsVPViT``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from insvp_fast.coverage import Table

__all__ = ["BackboneFamily", "BlockOptions"]


class BlockOptions(NamedTuple):
    """How the blocks are computed; see the arguments of ``InsVPViT``."""

    dtype: torch.dtype  # of the products
    fold_norm: bool  # whether a norm's affine map is folded into the product behind it
    attention: str  # the implementation, one of ``ops.ATTENTION``; blocks with ``num_queries`` have only one
    mlp_keeps: str  # what the MLP keeps for backward: the argument ``keep`` of ``ops.mlp``


class BackboneFamily(Protocol):
    """The functions of a module in this package: one file for each family, listed in ``FAMILIES``.

    It fits backbones whose blocks all have the same width D and number of tokens T. A hierarchical one, such as Swin,
    needs more: ``InsVPViT`` carries one stream [B, T, D] through all blocks, with prompts of one width.

    ``requirements`` says for which backbones the fast path computes what timm's modules compute: ``check_image``,
    ``embed``, ``forward_block`` and ``final_norm`` are called only while it holds, the others for all of the family.
    """

    def requirements(self, backbone: Any, patch_size: int) -> Table:
        """What the fast path requires of the backbone's modules."""

    def blocks(self, backbone: Any) -> Sequence[nn.Module]:
        """The blocks in the order in which they run; prompts are counted by them."""

    def pixel_weight(self, backbone: Any) -> Tensor:
        """The weight that multiplies the pixels; images and products have its dtype unless autocast casts them."""

    def check_image(self, backbone: Any, image: Tensor) -> None:
        """Raise ValueError for an image that the backbone cannot take."""

    def reads_one_token(self, backbone: Any) -> bool:
        """Whether the head reads only the first token, so that the last block needs to compute no others."""

    def embed(self, backbone: Any, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Unfolded patches [B, N, K], N = the product of ``grid``, to the first block's tokens [B, T, D] (eq. 1)."""

    def forward_block(
        self,
        block: Any,
        residual: Tensor,
        branch: Tensor | None,
        prompts: Tensor | None,
        options: BlockOptions,
        num_queries: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One block with prompts [B, L, D] (eq. 11); its input and output are ``residual + branch``, not yet added.

        ``num_queries``: compute only the first tokens of the output, [B, num_queries, D] instead of [B, T, D].
        """

    def final_norm(self, backbone: Any, tokens: Tensor) -> Tensor:
        """The norm after the last block."""
