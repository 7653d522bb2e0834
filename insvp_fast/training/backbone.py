"""The frozen backbone of a run: the shipped one, or any Vision Transformer of timm."""

from __future__ import annotations

from typing import Any

from timm.data import resolve_data_config
from timm.models.vision_transformer import VisionTransformer

from insvp_fast.checkpoints.backbone import create_backbone
from insvp_fast.errors import CheckpointError, TrainingError
from insvp_fast.training.recipe import BUILTIN

__all__ = ["load_backbone", "preprocessing_of"]


def load_backbone(source: str = BUILTIN, checkpoint: str | None = None) -> VisionTransformer:
    """The backbone that ``create_backbone`` builds, without a head.

    Raises:
        TrainingError: if there is no such model, or its weights cannot be had.
    """
    try:
        return create_backbone(source, checkpoint=checkpoint, num_classes=0)
    except CheckpointError as error:
        raise TrainingError(f"--backbone is {source}: {error}") from error


def preprocessing_of(backbone: VisionTransformer) -> dict[str, Any]:
    """How images are prepared for a backbone, as arguments of ``timm.data.create_transform``."""
    resolved = resolve_data_config(model=backbone)
    wanted = ("input_size", "interpolation", "mean", "std", "crop_pct")
    return {key: list(value) if isinstance(value := resolved[key], tuple) else value for key in wanted}
