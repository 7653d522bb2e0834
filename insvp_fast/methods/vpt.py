"""VPT, visual prompt tuning (Jia et al., ECCV 2022): trained tokens in each block, or in the first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from insvp_fast.methods.checks import require_at_least, require_each_at_least, require_probabilities
from insvp_fast.reference import Geometry, PromptMethod, Prompts

__all__ = ["VPTDeep", "VPTShallow"]


class VPTDeep(PromptMethod):
    """Trained prompts for each block; their outputs are discarded. [z, _] = block_j([z, p_j]).

    Args:
        length: L, the number of prompts in a block.
        dropout: on each element of the prompts, in training.
        projection: the width of the trained tokens, which one linear map then brings to D; None trains tokens of D.
        blocks: the blocks that have prompts; None for all.

    Raises:
        ValueError: for a setting that is no such number, blocks that the backbone does not have, or a projection to
            several widths.
    """

    def __init__(
        self,
        geometry: Geometry,
        *,
        length: int = 50,
        dropout: float = 0.1,
        projection: int | None = None,
        blocks: Sequence[int] | None = None,
    ) -> None:
        super().__init__(geometry)
        require_at_least(0, length=length)
        require_each_at_least(0, blocks=blocks)
        require_at_least(1, projection=projection)
        require_probabilities(dropout=dropout)
        self.prompted_blocks = geometry.blocks(blocks)
        bound = xavier_bound(geometry, projection or geometry.widths[0])
        self.prompts = nn.ParameterList(
            torch.empty(length, projection or geometry.widths[j]).uniform_(-bound, bound) for j in self.prompted_blocks
        )
        self.projection: nn.Module = nn.Identity()
        if projection:
            self.projection = nn.Linear(projection, geometry.width)
            nn.init.kaiming_normal_(self.projection.weight, mode="fan_out")
        self.dropout = nn.Dropout(dropout)

    def block_prompts(self, block: int, context: Any, batch: int, tokens: Tensor | None = None) -> Prompts | None:
        """p_j for every image."""
        if block not in self.prompted_blocks:
            return None
        return Prompts(self.transform(block, self.drop(self.projection(self._of(self.prompts, block)), batch), batch))

    def drop(self, p: Tensor, batch: int) -> Tensor:
        """p, [L, D], after dropout with a mask for each image, [B, L, D]; [1, L, D] where nothing is dropped."""
        active = self.training and self.dropout.p > 0
        return self.dropout(p.expand(batch, -1, -1)) if active else p[None]

    def transform(self, block: int, p: Tensor, batch: int) -> Tensor:
        """What becomes of a block's prompts, [B, L, D] or, the same for every image, [1, L, D]: [B, L, D]."""
        return p.expand(batch, -1, -1)

    def _of(self, parameters: nn.ParameterList, block: int) -> Tensor:
        return parameters[self.prompted_blocks.index(block)]


class VPTShallow(VPTDeep):
    """Trained prompts for the first block, whose outputs go on as tokens through all others.

    Args and errors: see ``VPTDeep``.
    """

    carry_prompts = True

    def __init__(
        self, geometry: Geometry, *, length: int = 50, dropout: float = 0.1, projection: int | None = None
    ) -> None:
        super().__init__(geometry, length=length, dropout=dropout, projection=projection, blocks=(0,))


def xavier_bound(geometry: Geometry, width: int) -> float:
    """VPT's bound of uniform prompts, the same in all blocks: Xavier's for a map from a patch to the first block's."""
    return math.sqrt(6 / (geometry.in_channels * geometry.patch_size**2 + width))
