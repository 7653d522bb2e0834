"""Training parts of the backbone itself: all of it, its last block, or its biases."""

from __future__ import annotations

from typing import Any

from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import nn

from insvp_fast.methods.tuning import Tuning

__all__ = ["BitFit", "FullTuning", "PartialTuning"]


class FullTuning(Tuning):
    """The whole backbone and the head are trained."""

    trains_all = True

    def trained_modules(self, backbone: Any) -> list[nn.Module]:
        """The backbone."""
        return [backbone]


class PartialTuning(Tuning):
    """The last block, the norms behind it and the head are trained: Partial-1 (Yosinski et al., NeurIPS 2014), as in
    VPT's tables.

    Raises:
        ValueError: for a backbone that is not a ViT or a Swin of timm.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__(backbone)
        self.trained_modules(backbone)  # refuses a backbone now rather than later

    def trained_modules(self, backbone: Any) -> list[nn.Module]:
        """The last block and the norms."""
        if isinstance(backbone, SwinTransformer):
            block = backbone.layers[-1].blocks[-1]
        elif isinstance(backbone, VisionTransformer | VisionTransformerRelPos | Eva | Beit):
            block = backbone.blocks[-1]
        else:
            raise ValueError(f"partial_1 in a {type(backbone).__name__}: expected a ViT or a Swin of timm")
        norms = (getattr(backbone, name, None) for name in ("norm", "fc_norm"))
        return [block, *(norm for norm in norms if norm is not None)]


class BitFit(Tuning):
    """All biases of the backbone and the head are trained (Ben Zaken et al., ACL 2022; "Bias" in VPT's tables).

    As in VPT's code, these are all parameters with "bias" in their names: also q_bias and v_bias of an Eva, and the
    tables of relative positions in a Swin.

    Raises:
        ValueError: for a backbone without biases.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__(backbone)
        biases = [p for name, p in backbone.named_parameters() if "bias" in name]
        if not biases:
            raise ValueError(f"bias in a {type(backbone).__name__} that has none: expected a backbone with biases")
        for bias in biases:
            bias.requires_grad_(True)
