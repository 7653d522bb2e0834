"""The models that are compared, with the same random weights and the same random images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

from insvp_fast.config import InsVPConfig
from insvp_fast.model import InsVPViT
from insvp_fast.reference import InsVPReference
from insvp_fast.testing import DEVICE

__all__ = ["CONFIGS", "NUM_CLASSES", "PROVIDERS", "make_images", "make_model"]

PROVIDERS = ("bare", "reference", "insvp_fast", "bare compiled", "reference compiled", "insvp_fast compiled")
CONFIGS = {"paper": InsVPConfig(), "released": InsVPConfig.released()}
NUM_CLASSES = 200


def make_model(
    provider: str,
    name: str,
    config: InsVPConfig | None = None,
    options: Mapping[str, Any] | None = None,
    **backbone_kwargs: Any,
) -> nn.Module:
    """Build one of ``PROVIDERS`` around a timm ViT on ``DEVICE``; the weights are random, from fixed seeds.

    "bare" is the timm ViT alone, frozen and in evaluation mode.

    Args:
        options: further arguments of ``InsVPViT``, which change how it computes and not what.
        backbone_kwargs: for ``timm.create_model``.
    """
    kind, _, compiled = provider.partition(" ")
    torch.manual_seed(0)
    backbone = timm.create_model(name, num_classes=NUM_CLASSES, **backbone_kwargs)
    torch.manual_seed(1)
    model: nn.Module
    if kind == "bare":
        model = backbone.eval().requires_grad_(False)
    elif kind == "reference":
        model = InsVPReference(backbone, None, config)
    else:
        model = InsVPViT(backbone, None, config, **(options or {}))
    return _compile(model.to(DEVICE)) if compiled else model.to(DEVICE)


def _compile(model: nn.Module) -> nn.Module:
    """Compile as one graph for static shapes, with an empty compiler cache, whose limit many models would reach."""
    torch.compiler.reset()
    return torch.compile(model, dynamic=False, fullgraph=True)  # type: ignore[return-value]


def make_images(model: nn.Module, batch: int) -> tuple[Tensor, Tensor]:
    """Random images [batch, 3, H, W] of the size that the model takes, and targets [batch]; the same in every call."""
    # Of the seeds tried, the one whose maxima in the specific prompter's pooling windows are the clearest, in each of
    # ``CONFIGS`` with 8 images. Where two pixels differ by less than fp32 rounding, the gradient of either is right and
    # gradients cannot be compared.
    torch.manual_seed(11)
    backbone: Any = getattr(model, "backbone", model)
    size = backbone.patch_embed.img_size
    images, targets = torch.randn(batch, 3, *size, device="cpu"), torch.randint(0, NUM_CLASSES, (batch,), device="cpu")
    return images.to(DEVICE), targets.to(DEVICE)
