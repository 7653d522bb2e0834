"""The models that a run trains: InsVP, and a linear probe for comparison."""

from __future__ import annotations

from typing import Any, NamedTuple

from insvp_fast.config import InsVPConfig
from insvp_fast.training.recipe import BUILTIN_BACKBONE, Recipe

__all__ = ["Candidate", "candidates_of", "insvp_config"]

BUILTIN_PROMPT_LENGTH = 4  # for its 16 patches; the paper's 9 are for 196
NO_PROMPTS = InsVPConfig.linear_probe()


class Candidate(NamedTuple):
    """A model that a run trains.

    Attributes:
        name: in the metrics and in what is printed.
        config: its prompts; a linear probe has none.
        lr: the peak learning rate, not yet scaled with the number of images per step.
        subfolder: of the run folder, for its training state and its best epoch.
        is_adapter: whether it is the run's result, of which the adapter and the plot of the prompts are written.
    """

    name: str
    config: InsVPConfig
    lr: float
    subfolder: str = ""
    is_adapter: bool = False


def candidates_of(recipe: Recipe) -> list[Candidate]:
    """The models to train in their order; the first one is the adapter."""
    adapter = Candidate("InsVP", insvp_config(recipe), recipe.lr, is_adapter=True)
    probe = Candidate("linear probe", NO_PROMPTS, recipe.probe_lr, "linear-probe")
    return [adapter, probe] if recipe.probe else [adapter]


def insvp_config(recipe: Recipe) -> InsVPConfig:
    """The configuration of the paper or of the released code, with the changes that the recipe makes."""
    length = recipe.prompt_length
    if length is None and recipe.backbone == BUILTIN_BACKBONE and not recipe.released:
        length = BUILTIN_PROMPT_LENGTH
    settings = {"prompt_length": length, "specific_kernels": recipe.specific_kernels, "simam": recipe.simam}
    changes: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
    return InsVPConfig.released(**changes) if recipe.released else InsVPConfig(**changes)
