"""Loading the model of a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from insvp_fast.errors import CheckpointError, TrainingError
from insvp_fast.model import InsVPViT
from insvp_fast.training.backbone import load_backbone
from insvp_fast.training.recipe import Recipe
from insvp_fast.training.run_folder import read_config

__all__ = ["Run", "load_run"]


class Run(NamedTuple):
    """What a run folder holds: the model in evaluation mode, and what is needed to use it."""

    recipe: Recipe
    model: InsVPViT
    preprocessing: dict[str, Any]
    class_names: list[str]


def load_run(folder: str | Path) -> Run:
    """Load the trained model of a run folder, on the CPU.

    Raises:
        CheckpointError: if its backbone cannot be loaded.
        TrainingError: if it is not the folder of a finished run.
    """
    recipe, config = read_config(folder)
    backbone = load_backbone(recipe.backbone, recipe.checkpoint, recipe.img_size)
    try:
        model = InsVPViT.from_pretrained(Path(folder) / "adapter", backbone=backbone, local_files_only=True)
    except (CheckpointError, OSError) as error:
        raise TrainingError(f"{folder} has no adapter that can be loaded: {error}") from error
    return Run(recipe, model, config["preprocessing"], config["class_names"])
