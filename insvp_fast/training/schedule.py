"""Learning rates: warm-up, cosine decay, and scaling with the number of images per step."""

from __future__ import annotations

import math

from insvp_fast.training.recipe import Recipe

__all__ = ["lr_factor", "scale_lr"]

REFERENCE_IMAGES = 64  # per step: the learning rates of the recipes are meant for it


def lr_factor(step: int, steps: int, warmup: float) -> float:
    """The learning rate of a step as a fraction of its peak: linear warm-up, then a cosine down to 0.

    Args:
        step: from 0 to ``steps`` - 1.
        warmup: fraction of all steps in which it rises.
    """
    # not timm's CosineLRScheduler: its warm-up reaches the peak a step later, and the products are rounded otherwise
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 + 0.5 * math.cos(math.pi * (step - rising) / (steps - rising))


def scale_lr(lr: float, recipe: Recipe, num_processes: int) -> float:
    """The peak learning rate for the number of images per step in all processes together, by ``recipe.lr_scale``."""
    images = recipe.batch_size * num_processes * recipe.accumulate
    factor = {"none": 1.0, "linear": images / REFERENCE_IMAGES, "sqrt": math.sqrt(images / REFERENCE_IMAGES)}
    return lr * factor[recipe.lr_scale]
