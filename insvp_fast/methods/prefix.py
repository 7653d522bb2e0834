"""Prefix tuning of Vision Transformers, as in DualPrompt (Wang et al., ECCV 2022): trained keys and values alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from insvp_fast.methods.checks import require_at_least, require_each_at_least
from insvp_fast.reference import Geometry, PromptMethod, Prompts

__all__ = ["DualPrompt"]


class DualPrompt(PromptMethod):
    """Trained keys and values in a few blocks: K' = [k_j, K], V' = [v_j, V], DualPrompt's Pre-T.

    DualPrompt's general prompts stand in the first blocks, its expert prompts behind them. Here there is one set of
    expert prompts, that of one task.

    Args:
        general_length, general_blocks: the number of keys and values in a block, and the blocks that have them.
        expert_length, expert_blocks: of the expert prompts; None for the paper's blocks 2, 3 and 4, as far as there
            are such.

    Raises:
        ValueError: for blocks that the backbone does not have, or that were chosen twice.
    """

    gives_keys_values = True

    def __init__(
        self,
        geometry: Geometry,
        *,
        general_length: int = 5,
        general_blocks: Sequence[int] = (0, 1),
        expert_length: int = 20,
        expert_blocks: Sequence[int] | None = None,
    ) -> None:
        super().__init__(geometry)
        require_at_least(0, general_length=general_length, expert_length=expert_length)
        require_each_at_least(0, general_blocks=general_blocks, expert_blocks=expert_blocks)
        if expert_blocks is None:
            expert_blocks = range(2, min(5, len(geometry.widths)))
        if twice := {*general_blocks} & {*expert_blocks}:
            raise ValueError(f"block {min(twice)} is in general_blocks and in expert_blocks: expected one of them")
        self.prompted_blocks = geometry.blocks([*general_blocks, *expert_blocks])
        lengths = [general_length if j in general_blocks else expert_length for j in self.prompted_blocks]
        self.keys_values = nn.ParameterList(
            torch.empty(length, 2 * geometry.widths[j]).uniform_(-1, 1)
            for j, length in zip(self.prompted_blocks, lengths, strict=True)
        )

    def block_prompts(self, block: int, context: Any, batch: int, tokens: Tensor | None = None) -> Prompts | None:
        """k_j and v_j for every image, and no tokens."""
        if block not in self.prompted_blocks:
            return None
        keys_values = self.keys_values[self.prompted_blocks.index(block)].expand(batch, -1, -1)
        return Prompts(keys_values[:, :0, : self.geometry.widths[block]], keys_values=keys_values)
