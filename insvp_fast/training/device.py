"""Device, precision, processes and trackers of a run, and what of its recipe depends on them."""

from __future__ import annotations

import dataclasses
import math
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import find_executable_batch_size, gather_object
from torch import nn

from insvp_fast.errors import TrainingError
from insvp_fast.runtime import hardware
from insvp_fast.training.recipe import Recipe

__all__ = ["fit_batch_size", "precision", "scaled_lr", "start", "start_trackers"]

REFERENCE_BATCH = 64  # images of a step for which the learning rates of the recipes are meant


def start(amp: str = "off", trackers: tuple[str, ...] = ()) -> Accelerator:
    """An accelerator, also where another run of this process had one of another precision.

    Raises:
        TrainingError: if the precision is not to be had here, or a tracker is not installed.
    """
    if amp == "fp16" and not torch.accelerator.is_available():
        raise TrainingError("--amp is fp16: that needs a GPU; on a CPU use bf16 or off")
    for name in trackers:
        if find_spec(name) is None:
            raise TrainingError(f"--trackers has {name}: it is not installed; pip install {name}")
    AcceleratorState._reset_state()
    return Accelerator(
        mixed_precision="no" if amp == "off" else amp,
        log_with=list(trackers) or None,
        project_dir="." if trackers else None,  # until there is a run folder
    )


def precision(amp: str) -> str:
    """What ``auto`` stands for here: bf16 where the hardware multiplies in it, else off."""
    if amp != "auto":
        return amp
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "off"
    return "bf16" if not torch.accelerator.is_available() and hardware.has_products(torch.bfloat16) else "off"


def start_trackers(recipe: Recipe, accelerator: Accelerator, folder: Path) -> None:
    """Begin to log into the run folder, and to Weights & Biases as a run of the folder's name."""
    if recipe.trackers:
        accelerator.project_configuration.logging_dir = str(folder)
        settings = {key: value for key, value in recipe.to_dict().items() if isinstance(value, str | float | int)}
        wandb = {"name": folder.name, "dir": str(folder)}
        accelerator.init_trackers("insvp_fast", settings, {"wandb": wandb})


def scaled_lr(recipe: Recipe, lr: float, accelerator: Accelerator) -> float:
    """The learning rate for the number of images in a step of all processes together."""
    images = recipe.batch_size * accelerator.num_processes * recipe.accumulate
    factor = {"none": 1.0, "linear": images / REFERENCE_BATCH, "sqrt": math.sqrt(images / REFERENCE_BATCH)}
    return lr * factor[recipe.lr_scale]


def fit_batch_size(recipe: Recipe, model: nn.Module, size: tuple[int, ...], accelerator: Accelerator) -> Recipe:
    """The recipe with the largest batch, of ``batch_size`` images [C, H, W] or fewer, whose backward fits into memory.

    ``model`` is moved to the device. All processes agree on the smallest of what they found.

    Raises:
        TrainingError: if not even one image fits.
    """
    model = model.to(accelerator.device).train()

    @find_executable_batch_size(starting_batch_size=recipe.batch_size)
    def attempt(batch_size: int) -> int:
        images = torch.zeros(batch_size, *size, device=accelerator.device)
        classes = torch.zeros(batch_size, dtype=torch.long, device=accelerator.device)
        with accelerator.autocast():
            loss = F.cross_entropy(model(images).float(), classes)
        loss.backward()
        model.zero_grad()
        return batch_size

    try:
        found = attempt()
    except RuntimeError as error:
        if "reached zero" not in str(error):
            raise
        raise TrainingError("--auto-batch: not even one image fits into memory; try --recompute block") from error
    return dataclasses.replace(recipe, batch_size=min(gather_object([found])), auto_batch=False)
