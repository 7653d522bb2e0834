"""LoRA, low-rank adaptation (Hu et al., ICLR 2022)."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Attention
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from insvp_fast.methods.checks import require_at_least, require_finite
from insvp_fast.methods.tuning import Branch, Tuning

__all__ = ["LoRA"]


class LowRank(Branch):
    """The change of a layer that makes queries, keys and values at once: to the queries and the values."""

    def __init__(self, qkv: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.q_down, self.v_down = (nn.Linear(qkv.in_features, rank, bias=False) for _ in range(2))
        self.q_up, self.v_up = (nn.Linear(rank, qkv.out_features // 3, bias=False) for _ in range(2))
        for up in (self.q_up, self.v_up):
            nn.init.zeros_(up.weight)
        self.scale = scale

    def forward(self, operation: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        (x,), (q, k, v) = inputs, output.chunk(3, dim=-1)
        q, v = q + self.scale * self.q_up(self.q_down(x)), v + self.scale * self.v_up(self.v_down(x))
        return torch.cat([q, k, v], dim=-1)

    @torch.no_grad()
    def fold_into(self, operation: Any) -> None:
        """W_q + s·B_q A_q, and the same for the values."""
        W_q, _, W_v = operation.weight.chunk(3)
        W_q += self.scale * self.q_up.weight @ self.q_down.weight
        W_v += self.scale * self.v_up.weight @ self.v_down.weight


class LoRA(Tuning):
    """Low-rank changes of the projections to queries and values: W x + (α/r) B A x.

    timm makes queries, keys and values by one layer. The paper changes two of these three, each with an A and a B of
    its own, so that one A for the whole layer, as PEFT would have it, is another method. A begins as a linear layer
    does, B as zero.

    Args:
        rank: r.
        alpha: α.

    Raises:
        ValueError: for a rank below 1, or attention that does not call a layer named qkv.
    """

    def __init__(self, backbone: nn.Module, *, rank: int = 8, alpha: float = 8.0) -> None:
        super().__init__(backbone)
        require_at_least(1, rank=rank)
        require_finite(alpha=alpha)
        attentions: list[Any] = [m for m in backbone.modules() if isinstance(getattr(m, "qkv", None), nn.Linear)]
        unknown = [attention for attention in attentions if type(attention) not in (Attention, WindowAttention)]
        if unknown or not attentions:  # some read the weights of their layer without calling it
            kind = type(unknown[0] if unknown else backbone).__name__
            raise ValueError(f"lora in a {kind}: expected timm's Attention or Swin's WindowAttention")
        self.branches = nn.ModuleList()
        for attention in attentions:
            self.branches.append(LowRank(attention.qkv, rank, alpha / rank))
            attention.qkv.register_forward_hook(self.branches[-1])
