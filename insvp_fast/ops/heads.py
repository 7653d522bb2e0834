"""Heads of attention, as views: folded into the width of a tensor, or a dimension of their own; and their keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "add_bias",
    "check_bias",
    "check_heads",
    "check_num_keys",
    "keys_exist",
    "merge_heads",
    "pack",
    "split_heads",
    "split_packed",
    "without_padding",
]


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


def pack(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [B, heads, T or S, d] -> [B, S, 3·D]
    """The inverse of ``split_packed`` in fresh memory; 0 for the rows behind the T that ``q`` has."""
    (B, heads, S, d), T = k.shape, q.shape[2]
    parts = k.new_empty(B, S, 3, heads, d)
    parts[:, :T, 0], parts[:, T:, 0] = q.transpose(1, 2), 0
    parts[:, :, 1], parts[:, :, 2] = k.transpose(1, 2), v.transpose(1, 2)
    return parts.flatten(2)


def check_heads(num_heads: int) -> None:
    """Raise ValueError where there is no head."""
    if num_heads < 1:
        raise ValueError(f"num_heads={num_heads}: expected at least 1")


def check_num_keys(num_keys: Tensor | None, tokens: Tensor, num_queries: int) -> None:
    """Raise ValueError where ``num_keys`` are not those of ``tokens``, [B, S, width]; values are read on CPUs alone."""
    if num_keys is None:
        return
    B, S = tokens.shape[:2]
    if not isinstance(num_keys, Tensor):
        raise ValueError(f"num_keys is {num_keys!r}: expected a tensor, torch.int64 {(B,)} on {tokens.device}")
    if num_keys.shape != (B,) or num_keys.dtype != torch.int64 or num_keys.device != tokens.device:
        found = f"{num_keys.dtype} {tuple(num_keys.shape)} on {num_keys.device}"
        raise ValueError(f"num_keys is {found}: expected torch.int64 {(B,)} on {tokens.device}")
    if torch.compiler.is_compiling() or num_keys.device.type != "cpu" or not B:
        return
    least = max(num_queries, 1)
    if not least <= int(num_keys.min()) <= int(num_keys.max()) <= S:
        raise ValueError(f"num_keys is {num_keys.tolist()}: expected {least} to {S}, queries to tokens")


def keys_exist(num_keys: Tensor, S: int) -> Tensor:  # [B] -> [B, 1, 1, S]
    """Which of S rows are keys, for the scores of all heads and queries."""
    return torch.arange(S, device=num_keys.device) < num_keys[:, None, None, None]


def without_padding(scores: Tensor, num_keys: Tensor | None) -> Tensor:  # [B, heads, T, S]
    """Scores of what is no key are -inf, so that it has no part in the softmax."""
    return scores if num_keys is None else scores.masked_fill(~keys_exist(num_keys, scores.shape[-1]), float("-inf"))


def check_bias(bias: Tensor | None, num_heads: int, num_queries: int, S: int) -> None:
    """Raise ValueError where ``bias`` is not [heads, T, up to S], or is trained."""
    if bias is None:
        return
    if bias.ndim != 3 or bias.shape[:2] != (num_heads, num_queries) or bias.shape[2] > S:
        raise ValueError(f"bias has shape {tuple(bias.shape)}: expected {(num_heads, num_queries)} and up to {S} keys")
    if bias.requires_grad:
        raise ValueError("the bias of few queries has to be frozen: expected requires_grad=False")


def add_bias(scores: Tensor, bias: Tensor | None) -> Tensor:  # [B, heads, T, S]
    """Scores with a bias [heads, T, up to S] of the first keys; those behind, which are prompts, get none."""
    if bias is None:
        return scores
    return scores + F.pad(bias, (0, scores.shape[-1] - bias.shape[-1])).to(scores.dtype)
