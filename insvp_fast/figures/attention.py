"""Attention: what the class token of a model reads in its last block."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.xcit import XCA
from torch import Tensor, nn

from insvp_fast.errors import InsVPError
from insvp_fast.figures.modes import evaluating
from insvp_fast.reference.prompted import PromptedReference

__all__ = ["class_attention"]


@torch.inference_mode()
def class_attention(model: nn.Module, images: Tensor) -> Tensor:
    """The weights with which the class token attends to each patch in the last block, in the mean over the heads.

    Their sum over the patches is below 1: the token attends to itself and to prompts as well. The model runs on its
    general path, in evaluation mode.

    Args:
        images: [B, C, H, W], the model's input.

    Returns:
        fp32 [B, H, W], interpolated bilinearly between the patches.

    Raises:
        InsVPError: if the backbone has no class token, or its last block does not show its attention.
    """
    if not isinstance(model, PromptedReference):
        raise InsVPError(f"no attention of a {type(model).__name__}: its method changes the backbone")
    attention: Any = getattr((getattr(model.backbone, "blocks", None) or [None])[-1], "attn", None)
    kind = type(model.backbone).__name__
    has_weights = hasattr(attention, "fused_attn") and not isinstance(attention, XCA)  # that is among channels
    if getattr(model.backbone, "cls_token", None) is None or not has_weights:
        raise InsVPError(f"no attention of a {kind}: expected a class token, and blocks with timm's attention")
    kept: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        kept.append(output)

    fused = attention.fused_attn
    handle = attention.attn_drop.register_forward_hook(keep)
    try:
        attention.fused_attn = False  # the way that timm itself offers to see the weights
        with warnings.catch_warnings(), evaluating(model):
            warnings.filterwarnings("ignore", ".* takes the general path")  # because of the hook
            model.forward_features(images)
    finally:
        handle.remove()
        attention.fused_attn = fused
    if not kept:
        raise InsVPError(f"no attention of a {kind}: the method attends in its own way")
    height, width = (side // model.patch_size for side in images.shape[-2:])
    # a method that looks at the bare features first, as DAM-VP does, comes to the prompted ones last
    weights = kept[-1][:, :, 0, -height * width :].float().mean(1)  # patches come last
    return F.interpolate(weights.unflatten(1, (1, height, width)), images.shape[-2:], mode="bilinear")[:, 0]
