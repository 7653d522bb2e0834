"""Bottlenecks in the blocks: Adapter, behind the MLP, and AdaptFormer, beside it."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from insvp_fast.methods.checks import require_at_least, require_finite
from insvp_fast.methods.tuning import Branch, Tuning, plain_blocks

__all__ = ["AdaptFormer", "Adapter"]


class Bottleneck(Branch):
    """Two layers of width ``hidden`` between them; the second begins as zero, so that the backbone begins as it was."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, hidden), nn.Linear(hidden, width)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)


class Serial(Bottleneck):
    """h + W_up GELU(W_down h + b_down) + b_up of an operation's output h."""

    def forward(self, operation: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + self.up(F.gelu(self.down(output)))


class Parallel(Bottleneck):
    """h + s·(W_up ReLU(W_down x + b_down) + b_up) of an operation's input x and output h."""

    def __init__(self, width: int, hidden: int, scale: float) -> None:
        super().__init__(width, hidden)
        self.scale = scale

    def forward(self, operation: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + self.scale * self.up(F.relu(self.down(inputs[0])))


class Adapter(Tuning):
    """A bottleneck behind the MLP of each block, before the residual sum (Pfeiffer et al., EMNLP 2020).

        h = MLP(LN(x)),  block(x) = x + h + W_up GELU(W_down h + b_down) + b_up

    It is the one of VPT's tables; Houlsby's (ICML 2019) has another one behind the attention.

    Args:
        reduction: D over the width of the bottleneck; VPT chooses among 8, 64 and 256.

    Raises:
        ValueError: for a backbone that is not a ViT of timm, or a bottleneck without width.
    """

    def __init__(self, backbone: Any, *, reduction: int = 8) -> None:
        super().__init__(backbone)
        require_at_least(1, reduction=reduction)
        self.branches = nn.ModuleList()
        for block in plain_blocks(backbone, "adapter"):
            if reduction > backbone.embed_dim:
                raise ValueError(f"reduction={reduction}: expected at most the width, {backbone.embed_dim}")
            self.branches.append(Serial(backbone.embed_dim, backbone.embed_dim // reduction))
            block.mlp.register_forward_hook(self.branches[-1])


class AdaptFormer(Tuning):
    """A bottleneck beside the MLP of each block (Chen et al., NeurIPS 2022); both read the same tokens.

        block(x) = x + MLP(LN(x)) + s·(W_up ReLU(W_down LN(x) + b_down) + b_up)

    Args:
        hidden: the width of the bottleneck.
        scale: s.

    Raises:
        ValueError: for a backbone that is not a ViT of timm, or a bottleneck without width.
    """

    def __init__(self, backbone: Any, *, hidden: int = 64, scale: float = 0.1) -> None:
        super().__init__(backbone)
        require_at_least(1, hidden=hidden)
        require_finite(scale=scale)
        self.branches = nn.ModuleList()
        for block in plain_blocks(backbone, "adaptformer"):
            self.branches.append(Parallel(backbone.embed_dim, hidden, scale))
            block.mlp.register_forward_hook(self.branches[-1])
