"""E2VPT, effective and efficient visual prompt tuning (Han et al., ICCV 2023): keys and values as well, and pruning."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from insvp_fast.methods.checks import require_at_least, require_probabilities
from insvp_fast.methods.vpt import VPTDeep
from insvp_fast.reference import Geometry, Prompts

__all__ = ["E2VPT"]


class E2VPT(VPTDeep):
    """VPT-Deep with masks on its prompts, and in each block with trained keys and values, which pass no projection.

        p'_j = ρ_j · ψ_j · p_j                  ρ in {0, 1}, one for each prompt; ψ, one for each segment of it
        K' = [K, k_j], V' = [V, v_j]            k_j = v_j if shared

    The masks are buffers of ones. ``importance`` scores them after training, ``prune`` sets the least important to
    zero; the paper then trains again from the initial prompts. Each block has masks of its own, and a segment is a run
    of neighboring elements. A masked prompt is zero before the block's norm, and still a token.

    Args:
        num_keys: the number of trained keys in a block.
        share: train one tensor as keys and values.
        segments: R, the number of segments of a prompt.

    Other arguments and errors: see ``VPTDeep``.

    Raises:
        ValueError: if ``segments`` does not divide the width.
    """

    gives_keys_values = True
    token_mask: Tensor  # [blocks, L]
    segment_mask: Tensor  # [blocks, L, R]

    def __init__(
        self,
        geometry: Geometry,
        *,
        length: int = 10,
        num_keys: int = 5,
        share: bool = True,
        segments: int = 16,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(geometry, length=length, dropout=dropout)
        require_at_least(0, num_keys=num_keys)
        require_at_least(1, segments=segments)
        if geometry.width % segments:
            raise ValueError(f"segments={segments}: expected a divisor of the width, {geometry.width}")
        # as in the authors' code: Kaiming's bound for the keys of one head
        bound = math.sqrt(6 * geometry.num_heads / (max(num_keys, 1) * geometry.width))
        self.keys_values = nn.ParameterList(
            torch.empty(1 if share else 2, num_keys, geometry.width).uniform_(-bound, bound)
            for _ in self.prompted_blocks
        )
        self.register_buffer("token_mask", torch.ones(len(self.prompted_blocks), length))
        self.register_buffer("segment_mask", torch.ones(len(self.prompted_blocks), length, segments))

    def block_prompts(self, block: int, context: Any, batch: int, tokens: Tensor | None = None) -> Prompts | None:
        """p'_j, k_j and v_j for every image."""
        prompts = super().block_prompts(block, context, batch)
        if prompts is None:
            return None
        k, v = self._of(self.keys_values, block).expand(2, -1, -1)
        keys_values = torch.cat([self.drop(k, batch), self.drop(v, batch)], dim=-1)
        return prompts._replace(keys_values=keys_values.expand(batch, -1, -1))

    def transform(self, block: int, p: Tensor, batch: int) -> Tensor:
        """p', the prompts under their masks."""
        i = self.prompted_blocks.index(block)
        segments = self.segment_mask[i].repeat_interleave(p.shape[-1] // self.segment_mask.shape[-1], dim=-1)
        return super().transform(block, p * self.token_mask[i, :, None] * segments, batch)

    def importance(self, loss: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """``|∂loss/∂ρ|`` [blocks, L] and ``|∂loss/∂ψ|`` [blocks, L, R]; ``loss`` runs the model on a batch.

        The paper's scores are their sums over all batches of the training set.
        """
        masks = self.token_mask, self.segment_mask
        for mask in masks:
            mask.requires_grad_(True)
        try:
            tokens, segments = torch.autograd.grad(loss(), masks)
        finally:
            for mask in masks:
                mask.requires_grad_(False)
        return tokens.abs(), segments.abs()

    @torch.no_grad()
    def prune(self, scores: tuple[Tensor, Tensor], tokens: float, segments: float) -> None:
        """Mask the fractions ``tokens`` of all prompts and ``segments`` of all segments that have the lowest scores.

        Raises:
            ValueError: for a fraction that is not in [0, 1].
        """
        require_probabilities(tokens=tokens, segments=segments)
        for mask, score, fraction in zip((self.token_mask, self.segment_mask), scores, (tokens, segments), strict=True):
            mask.fill_(1)
            mask.view(-1)[score.flatten().argsort()[: int(fraction * mask.numel())]] = 0
