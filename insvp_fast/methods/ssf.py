"""SSF, scaling and shifting features (Lian et al., NeurIPS 2022)."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import LayerScale, VisionTransformer
from torch import Tensor, nn

from insvp_fast.methods.tuning import Branch, Tuning, plain_blocks

__all__ = ["SSF"]


class ScaleShift(Branch):
    """γ ⊙ y + β over the channels of an operation's output y."""

    def __init__(self, width: int, channels_first: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(width).normal_(1, 0.02))
        self.shift = nn.Parameter(torch.empty(width).normal_(0, 0.02))
        self.shape = (width, 1, 1) if channels_first else (width,)

    def forward(self, operation: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output * self.scale.view(self.shape) + self.shift.view(self.shape)

    @torch.no_grad()
    def fold_into(self, operation: Any) -> None:
        """γ ⊙ W and γ ⊙ b + β."""
        weight, bias = operation.weight, operation.bias
        weight = torch.ones_like(self.scale) if weight is None else weight
        operation.weight = nn.Parameter(weight * self.scale.view(-1, *[1] * (weight.ndim - 1)))
        operation.bias = nn.Parameter(self.shift if bias is None else bias * self.scale + self.shift)


class SSF(Tuning):
    """A scale and a shift behind each operation of the backbone: y = γ ⊙ x + β.

    The operations are all linear layers, norms and the embedding of patches. Folded into their weights, the
    method costs nothing when it is used: see ``Tuning.merged``.

    Raises:
        ValueError: for a backbone that is not a ViT of timm, or has parameters in other modules than these.
    """

    def __init__(self, backbone: Any) -> None:
        super().__init__(backbone)
        plain_blocks(backbone, "ssf")
        if type(backbone.patch_embed) is not PatchEmbed:
            raise ValueError(f"ssf in a backbone with a {type(backbone.patch_embed).__name__}: expected PatchEmbed")
        self.branches = nn.ModuleList()
        for module in backbone.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.LayerNorm):
                self.branches.append(_beside(module))
                module.register_forward_hook(self.branches[-1])
            elif module._parameters and not isinstance(module, VisionTransformer | LayerScale):
                kind = type(module).__name__
                raise ValueError(f"ssf in a backbone with a {kind}: expected linear layers, LayerNorm and PatchEmbed")


def _beside(operation: nn.Linear | nn.Conv2d | nn.LayerNorm) -> ScaleShift:
    if isinstance(operation, nn.Conv2d):
        return ScaleShift(operation.out_channels, channels_first=True)
    width = operation.out_features if isinstance(operation, nn.Linear) else operation.normalized_shape[0]
    return ScaleShift(width, channels_first=False)
