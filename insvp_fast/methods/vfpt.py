"""VFPT, visual Fourier prompt tuning (Zeng et al., NeurIPS 2024): a part of the prompts passes a Fourier transform."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from insvp_fast.methods.checks import require_probabilities
from insvp_fast.methods.vpt import VPTDeep
from insvp_fast.reference import Geometry

__all__ = ["VFPT", "fold_transform"]


class VFPT(VPTDeep):
    """VPT-Deep in which Re(F_seq(F_hidden(p))) stands for the first prompts p of each block.

    Args:
        fraction: of the prompts, which are transformed; rounded down to whole prompts.

    Other arguments and errors: see ``VPTDeep``.
    """

    def __init__(self, geometry: Geometry, *, length: int = 50, fraction: float = 0.5, dropout: float = 0.1) -> None:
        require_probabilities(fraction=fraction)
        super().__init__(geometry, length=length, dropout=dropout)
        self.num_transformed = int(length * fraction)

    def transform(self, block: int, p: Tensor, batch: int) -> Tensor:
        """The first prompts transformed, over sequence and width, and the others as they are."""
        return super().transform(block, self.transformed(p), batch)

    def transformed(self, p: Tensor) -> Tensor:
        """Prompts [..., L, D] of which the first ones have passed the transform."""
        n = self.num_transformed
        if not n or not len(p):  # there is no transform of nothing
            return p
        wide = p[..., :n, :].to(torch.promote_types(p.dtype, torch.float32))  # there is no transform in 16 bits
        return torch.cat([torch.fft.fft2(wide).real.to(p.dtype), p[..., n:, :]], dim=-2)


@torch.no_grad()
def fold_transform(method: VFPT) -> None:
    """Replace the prompts by the transformed ones: the same in evaluation, for systems without the transform.

    What it leaves is for an export alone: no settings describe it.
    """
    method.prompts = nn.ParameterList(map(method.transformed, method.prompts))
    method.num_transformed = 0
