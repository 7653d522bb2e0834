"""The norms of blocks in all families: what the fast path requires of one, and how it runs."""

from __future__ import annotations

from typing import NamedTuple

from timm.layers import LayerNorm
from torch import Tensor, nn

from insvp_fast import ops
from insvp_fast.backbones.family import BlockOptions
from insvp_fast.coverage import Rule, rule, watch

__all__ = ["Affine", "layer_norm", "normalize_and_insert"]

watch("forward __call__", nn.LayerNorm, LayerNorm)


def layer_norm(width: int) -> tuple[Rule, Rule]:
    """PyTorch's or timm's, with or without an affine map."""
    plain = rule(nn.LayerNorm, "eps elementwise_affine", required="weight", optional="bias", normalized_shape=(width,))
    return plain, plain._replace(type=LayerNorm, attributes={**plain.attributes, "_fast_norm": False})


class Affine(NamedTuple):
    """The affine map of a norm, where it is folded into the product behind; else nothing."""

    gain: Tensor | None = None
    shift: Tensor | None = None


def normalize_and_insert(
    norm: nn.LayerNorm, residual: Tensor, branch: Tensor | None, prompts: Tensor | None, options: BlockOptions
) -> tuple[Tensor, Tensor, Affine]:
    """The new residual [B, T, D], the normalized tokens and prompts [B, T+L, D], and the affine map left to apply."""
    folded, own = Affine(), Affine(norm.weight, norm.bias)
    if options.fold_norm:
        folded, own = own, folded
    return *ops.norm_insert(residual, branch, prompts, *own, norm.eps, dtype=options.dtype), folded
