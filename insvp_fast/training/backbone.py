"""The frozen backbone of a run, and how its images are prepared."""

from __future__ import annotations

from typing import Any

from timm.data import resolve_data_config
from torch import nn

from insvp_fast.checkpoints.backbone import create_backbone
from insvp_fast.data import insvp_preprocessing
from insvp_fast.errors import CheckpointError
from insvp_fast.reference import structure_of
from insvp_fast.reference.structure import in_channels
from insvp_fast.training.recipe import BUILTIN_BACKBONE

__all__ = ["load_backbone", "require_rgb", "resolve_preprocessing"]


def load_backbone(
    source: str = BUILTIN_BACKBONE, checkpoint: str | None = None, img_size: int | None = None
) -> nn.Module:
    """The backbone that ``create_backbone`` builds, without a head.

    Args:
        img_size: the side of its images; None for that of the pretraining.

    Raises:
        CheckpointError: if there is no such model, its weights cannot be found, it does not read RGB, or it is built
            without ``img_size``, or its patches do not divide it.
    """
    size: dict[str, Any] = {} if img_size is None else {"img_size": img_size}
    try:
        backbone = create_backbone(source, checkpoint=checkpoint, num_classes=0, **size)
        structure = structure_of(backbone)
        patch_size = structure.patch_size(backbone) if structure.widths(backbone) else 1
    except (CheckpointError, TypeError, ValueError) as error:
        if str(error).endswith("unexpected keyword argument 'img_size'"):  # as of a ResNet, and no method to ask before
            raise CheckpointError(f"`img_size` is {img_size}: expected none, as {source} has no image size") from error
        raise CheckpointError(f"`backbone` is {source}: {error}") from error
    require_rgb(backbone, f"`backbone` is {source}")
    if img_size is not None and img_size % patch_size:
        raise CheckpointError(f"`img_size` is {img_size}: expected a multiple of {patch_size}, the side of a patch")
    return backbone


def require_rgb(backbone: nn.Module, what: str) -> None:
    """Check that a backbone reads images as every command reads them.

    Args:
        what: what the message begins with.

    Raises:
        CheckpointError: if they have other than 3 channels.
    """
    channels = in_channels(backbone, structure_of(backbone).patch_size(backbone))
    if channels != 3:
        raise CheckpointError(
            f"{what}: it takes images [{channels}, H, W]: expected 3 channels: images are read as RGB"
        )


def resolve_preprocessing(backbone: nn.Module, preset: str = "timm") -> dict[str, Any]:
    """How images are prepared for a backbone, as arguments of ``timm.data.create_transform``.

    Args:
        preset: ``Recipe.preprocessing``, "timm" or "insvp".
    """
    resolved = resolve_data_config(model=backbone)
    if preset == "insvp":
        return insvp_preprocessing(resolved["input_size"][-2:])
    names = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    return {name: list(value) if isinstance(value := resolved[name], tuple) else value for name in names}
