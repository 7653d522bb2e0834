"""The model that a run trains, as its recipe says."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from typing import Any

from torch import nn

from insvp_fast.errors import TrainingError
from insvp_fast.methods import create_model
from insvp_fast.model import InsVPViT
from insvp_fast.training.candidates import LINEAR, insvp_config
from insvp_fast.training.recipe import Recipe

__all__ = ["build_model"]


def build_model(method: str, recipe: Recipe, backbone: nn.Module, num_classes: int) -> nn.Module:
    """A model with the prompts of a method, around a copy of the backbone.

    Args:
        method: a value of ``Recipe.method``.

    Raises:
        TrainingError: if the backbone and the settings do not fit, or the method has no such settings.
    """
    backbone = copy.deepcopy(backbone)
    options: dict[str, Any] = {} if method == LINEAR else _parse(recipe.method_options)
    try:
        if method == "insvp":
            compile_prompters = recipe.compile == "prompters"
            model: nn.Module = InsVPViT(
                backbone,
                num_classes,
                insvp_config(recipe),
                recompute=recipe.recompute,
                compile_prompters=compile_prompters,
            )
        else:
            model = create_model(method, backbone, num_classes, **options)
    except (TypeError, ValueError) as error:
        where = "prompts" if method == "insvp" else f"`method` is {method}"
        raise TrainingError(f"{where}: {error}") from error
    if recipe.compile == "model" and method != LINEAR:  # which runs once
        model.compile()
    return model


def _parse(options: Iterable[str]) -> dict[str, Any]:
    """The values by their names; what is not JSON is taken as text."""
    parsed = {}
    for option in options:
        name, _, value = option.partition("=")
        try:
            parsed[name] = json.loads(value)
        except ValueError:
            parsed[name] = value
    return parsed
