"""The models that a run trains: InsVP or another method, and a linear probe for comparison."""

from __future__ import annotations

from typing import Any, NamedTuple

from insvp_fast.config import InsVPConfig
from insvp_fast.training.recipe import BUILTIN_BACKBONE, PROMPT_SETTINGS, Recipe

__all__ = ["LINEAR", "PROBE", "Candidate", "candidates_of", "insvp_config"]

BUILTIN_PROMPT_LENGTH = 4  # for its 16 patches; the paper's 9 are for 196
LINEAR = "linear"  # the method without prompts
PROBE = "linear probe"  # its name in the metrics


class Candidate(NamedTuple):
    """A model that a run trains.

    Attributes:
        name: in the metrics and in what is printed.
        method: a value of ``Recipe.method``.
        is_adapter: whether it is the run's result, which is written as its adapter.
    """

    name: str
    method: str
    is_adapter: bool = False


def candidates_of(recipe: Recipe) -> list[Candidate]:
    """The models to train in their order; the last one is the adapter."""
    probe = Candidate(PROBE, LINEAR)
    if recipe.method == LINEAR:
        return [probe._replace(is_adapter=True)]
    adapter = Candidate("InsVP" if recipe.method == "insvp" else recipe.method, recipe.method, is_adapter=True)
    return [probe, adapter] if recipe.probe else [adapter]


def insvp_config(recipe: Recipe) -> InsVPConfig:
    """The configuration of the paper or of the released code, with the changes that the recipe makes."""
    changes: dict[str, Any] = {name: value for name in PROMPT_SETTINGS if (value := getattr(recipe, name)) is not None}
    if recipe.backbone == BUILTIN_BACKBONE and not recipe.released:
        changes = {"prompt_length": BUILTIN_PROMPT_LENGTH} | changes
    return InsVPConfig.released(**changes) if recipe.released else InsVPConfig(**changes)
