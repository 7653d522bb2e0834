"""Heads of attention, as views: folded into the width of a tensor, or a dimension of their own."""

from __future__ import annotations

from torch import Tensor

__all__ = ["merge_heads", "split_heads", "split_packed"]


def split_heads(x: Tensor, num_heads: int) -> Tensor:  # [B, T, D] -> [B, heads, T, d]
    """Give the heads a dimension of their own."""
    split: Tensor = x.unflatten(-1, (num_heads, -1))
    return split.transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:  # [B, heads, T, d] -> [B, T, D]
    """Put the heads side by side again."""
    return x.transpose(1, 2).flatten(2)


def split_packed(x: Tensor, num_heads: int, parts: int = 3) -> tuple[Tensor, ...]:  # [B, S, n·D] -> n [B, heads, S, d]
    """Queries, keys and values, or keys and values, as views of their packed product."""
    split: Tensor = x.unflatten(-1, (parts, num_heads, -1))
    return split.permute(2, 0, 3, 1, 4).unbind(0)
