"""Logging to experiment trackers, which Accelerate starts: TensorBoard, Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from insvp_fast.training.recipe import Recipe

__all__ = ["log_to_trackers", "start_trackers"]


def start_trackers(accelerator: Accelerator, recipe: Recipe, folder: Path, run_id: str, models: list[str]) -> None:
    """Begin to log into a run folder, and to Weights & Biases as a run of its name.

    Args:
        run_id: a resumed run with the same one goes on in Weights & Biases.
        models: the names of the models whose epochs are logged.
    """
    if not recipe.trackers:
        return
    accelerator.project_configuration.logging_dir = str(folder)
    settings = {key: value for key, value in recipe.to_dict().items() if isinstance(value, str | float | int)}
    wandb = {"name": folder.name, "dir": str(folder), "id": run_id, "resume": "allow"}
    accelerator.init_trackers("insvp_fast", settings, {"wandb": wandb})
    if "wandb" in recipe.trackers and accelerator.is_main_process:
        run = accelerator.get_tracker("wandb", unwrap=True)
        for model in models:
            run.define_metric(f"{model}/*", step_metric=f"{model}/epoch")


def log_to_trackers(accelerator: Accelerator, model: str, epoch: int, values: Mapping[str, Any]) -> None:
    """Log the values of a model after an epoch, those that are floating-point numbers."""
    named = {f"{model}/{key}": value for key, value in values.items() if isinstance(value, float)}
    for tracker in accelerator.trackers:
        if tracker.name == "wandb":  # refuses steps that go back, as where the next model begins; here a value is the x
            tracker.log(named | {f"{model}/epoch": epoch})
        else:
            tracker.log(named, step=epoch)
