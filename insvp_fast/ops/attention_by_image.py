"""Attention by PyTorch's products, image after image, so that the scores of one stay in the cache."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from insvp_fast.ops.heads import split_heads, split_packed
from insvp_fast.runtime import torch_private
from insvp_fast.runtime.rows import rows_apart

__all__ = ["attention_by_image", "attention_by_image_bwd"]


@rows_apart
def attention_by_image(qkv: Tensor, H: int, T: int, scale: float, num_keys: Tensor | None) -> Tensor:
    """As ``attention_reference``."""
    out = qkv.new_empty(qkv.shape[0], T, qkv.shape[-1] // 3)
    scores = qkv.new_empty(H * T * qkv.shape[1])
    images = zip(*split_packed(qkv, H), split_heads(out, H), _keys(qkv, num_keys), strict=True)
    for q, k, v, o, keys in images:
        p = _first(scores, H, T, keys)
        _probabilities(q[:, :T], k[:, :keys], scale, p)
        torch.bmm(p, v[:, :keys], out=o)
    return out


@rows_apart
def attention_by_image_bwd(grad: Tensor, qkv: Tensor, H: int, T: int, scale: float, num_keys: Tensor | None) -> Tensor:
    """As ``attention_bwd_reference``."""
    d_qkv = torch.empty_like(qkv)
    scores = qkv.new_empty(2, H * T * qkv.shape[1])
    keys_of_each = _keys(qkv, num_keys)
    images = zip(*split_packed(qkv, H), *split_packed(d_qkv, H), split_heads(grad, H), keys_of_each, strict=True)
    for q, k, v, d_q, d_k, d_v, d_o, keys in images:
        q, k, v = q[:, :T], k[:, :keys], v[:, :keys]
        p, d_p = (_first(part, H, T, keys) for part in scores)
        _probabilities(q, k, scale, p)
        torch.bmm(p.mT, d_o, out=d_v[:, :keys])
        torch.bmm(d_o, v.mT, out=d_p)
        d_scores = torch_private.softmax_bwd(d_p, p)
        torch.baddbmm(q, d_scores, k, beta=0, alpha=scale, out=d_q[:, :T])
        d_q[:, T:] = 0
        torch.baddbmm(k, d_scores.mT, q, beta=0, alpha=scale, out=d_k[:, :keys])
        d_k[:, keys:] = 0
        d_v[:, keys:] = 0
    return d_qkv


def _keys(qkv: Tensor, num_keys: Tensor | None) -> list[int]:
    """The number of keys of each image."""
    B, S, _ = qkv.shape
    return [S] * B if num_keys is None else num_keys.tolist()


def _first(memory: Tensor, *shape: int) -> Tensor:
    """A contiguous tensor at the beginning of some memory."""
    return memory[: math.prod(shape)].view(shape)


def _probabilities(q: Tensor, k: Tensor, scale: float, out: Tensor) -> None:
    torch.baddbmm(out, q, k.mT, beta=0, alpha=scale, out=out)
    torch.softmax(out, -1, out=out)
