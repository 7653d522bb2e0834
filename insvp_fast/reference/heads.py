"""Classification heads, taken from a backbone of timm."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["DistilledHead", "take_head"]


class DistilledHead(nn.Module):
    """The two heads of a distilled DeiT, whose logits are averaged; [B, T, D] -> [B, num_classes]."""

    def __init__(self, class_head: nn.Module, distillation_head: nn.Module) -> None:
        super().__init__()
        self.class_head, self.distillation_head = class_head, distillation_head

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = (self.class_head(tokens[:, 0]) + self.distillation_head(tokens[:, 1])) / 2
        return logits


def take_head(backbone: Any) -> nn.Module:
    """The backbone's head, which it loses.

    Raises:
        TypeError: if it has several heads, unless it is a distilled DeiT.
    """
    head = backbone.get_classifier()
    if isinstance(head, tuple) and len(head) == 2 and hasattr(backbone, "dist_token"):
        head = DistilledHead(*head)
    if not isinstance(head, nn.Module):
        raise TypeError(f"the {type(backbone).__name__} has {len(head)} heads: expected one")
    backbone.reset_classifier(0)
    return head
