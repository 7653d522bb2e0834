"""What attention in windows reads besides tokens: which tokens stand in each window, and the biases of the scores.

Both are kept on CPUs, so that blocks call nothing but operations, and programs can record them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from insvp_fast.runtime import torch_private
from insvp_fast.runtime.dtypes import widened
from insvp_fast.runtime.fingerprint import SMALL
from insvp_fast.runtime.prepack import packed

__all__ = ["position_bias", "tokens_of_windows"]

LARGEST = 4 << 20  # bytes of a bias that is kept: a BEiT-L's of 1024 tokens would take more than all its weights


def position_bias(attn: Any) -> Tensor:  # [heads, w, w]
    """The bias of the scores that timm's attention looks up in its table, in at least fp32."""
    sources = attn.relative_position_bias_table, attn.relative_position_index

    def make() -> Tensor:
        bias: Tensor = attn._get_rel_pos_bias()[0]
        return bias.to(widened(bias.dtype))

    table, index = sources
    size = index.numel() * table.shape[-1] * widened(table.dtype).itemsize
    seen = table.nbytes <= SMALL and all(x.is_cpu for x in sources)  # any write to them, in the next pass
    kept = seen and size <= LARGEST and not table.requires_grad
    if not kept or torch.compiler.is_compiling() or torch_private.dispatches(sources):  # those of a trace neither
        return make()
    with torch.inference_mode(False):  # backward may keep it
        return packed(sources, f"bias of positions in a window of {attn.window_size}", make)


def tokens_of_windows(grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], like: Tensor) -> Tensor:
    """The tokens of each window after a cyclic shift up and to the left, int32 [n, w]; windows and tokens by rows.

    ``like``: the tokens of the model. Where these are of a trace, or of a GPU, nothing is kept: the one is no tensor of
    the next call, and the other's streams and graphs would have to wait for it.
    """
    if torch.compiler.is_compiling() or not like.is_cpu or type(like) is not Tensor:
        return _tokens_of_windows(grid, window, shift, like.device)
    with torch.inference_mode(False):  # backward may keep them
        return _kept_tokens_of_windows(grid, window, shift, like.device)


def _tokens_of_windows(
    grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], device: torch.device
) -> Tensor:
    (H, W), (h, w) = grid, window
    tokens = torch.arange(H * W, dtype=torch.int32, device=device).view(H, W)
    shifted = tokens.roll((-shift[0], -shift[1]), (0, 1))
    return shifted.view(H // h, h, W // w, w).transpose(1, 2).reshape(-1, h * w)


_kept_tokens_of_windows = functools.lru_cache(_tokens_of_windows)
