"""MLP-k, a head of several layers on frozen features (Chen et al., 2020), as in VPT's tables."""

from __future__ import annotations

import itertools

from torch import nn

from insvp_fast.methods.checks import require_at_least
from insvp_fast.methods.tuning import Tuning

__all__ = ["MLPHead"]


class MLPHead(Tuning):
    """y = W_k ReLU(... ReLU(W_1 f + b_1) ...) + b_k of the pooled features f; nothing of the backbone is trained.

    Args:
        layers: k.
        hidden: the width between the layers; None for that of the features.

    Raises:
        ValueError: for fewer than two layers, or a backbone whose head is not linear.
    """

    def __init__(self, backbone: nn.Module, *, layers: int = 3, hidden: int | None = None) -> None:
        super().__init__(backbone)
        require_at_least(2, layers=layers)  # one layer is the method linear
        require_at_least(1, hidden=hidden)
        self.layers, self.hidden = layers, hidden

    def make_head(self, head: nn.Module) -> nn.Module:
        """The layers, of the widths of a linear head."""
        if not isinstance(head, nn.Linear):
            raise ValueError(f"mlp_3 instead of a {type(head).__name__}: expected a linear head, with num_classes")
        width = self.hidden or head.in_features
        widths = [head.in_features, *[width] * (self.layers - 1), head.out_features]
        first, *others = (nn.Linear(*pair) for pair in itertools.pairwise(widths))
        return nn.Sequential(first, *itertools.chain.from_iterable((nn.ReLU(), layer) for layer in others))
