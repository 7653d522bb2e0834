"""The model that a run trains, as its recipe says."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Iterable
from typing import Any

from torch import nn

from insvp_fast.config import InsVPConfig
from insvp_fast.errors import TrainingError
from insvp_fast.methods import CLASSES, TunedViT, create_model
from insvp_fast.model import InsVPViT
from insvp_fast.reference import structure_of
from insvp_fast.training.backbone import resolve_preprocessing
from insvp_fast.training.candidates import LINEAR, insvp_config
from insvp_fast.training.recipe import Recipe

__all__ = ["build_model"]

# of the settings of methods, by their annotations
KINDS: dict[str, list[type]] = {
    "int": [int],
    "float": [int, float],
    "bool": [bool],
    "str": [str],
    "Sequence[int]": [list],
}


def build_model(method: str, recipe: Recipe, backbone: nn.Module, num_classes: int) -> nn.Module:
    """A model with the prompts of a method, around a copy of the backbone.

    Args:
        method: a value of ``Recipe.method``.

    Raises:
        TrainingError: if the backbone and the settings do not fit, or the method has no such settings.
    """
    backbone = copy.deepcopy(backbone)
    own = method == recipe.method != "insvp"  # and not the linear probe beside it
    options = _read_options(method, recipe.method_options) if own else {}
    try:
        if method == "insvp":
            config = insvp_config(recipe)
            _check_backbone(recipe, config, backbone)
            compile_prompters = recipe.compile == "prompters"
            model: nn.Module = InsVPViT(
                backbone,
                num_classes,
                config,
                recompute=recipe.recompute,
                compile_prompters=compile_prompters,
            )
        else:
            model = create_model(method, backbone, num_classes, **options)
            _set_recompute(model, recipe.recompute)
    except TrainingError:
        raise
    except (AssertionError, TypeError, ValueError) as error:  # the first of timm's set_grad_checkpointing
        where = "prompts" if method == "insvp" else f"`method` is {method}"
        raise TrainingError(f"{where}: {error}") from error
    if recipe.compile == "model" and method != LINEAR:  # which runs once
        model.compile()
    return model


def _check_backbone(recipe: Recipe, config: InsVPConfig, backbone: nn.Module) -> None:
    """Check that a backbone without blocks gets image prompts only, and that patches fill images with a patch prompt.

    Raises:
        TrainingError: naming the settings that do not fit it.
    """
    structure = structure_of(backbone)
    kind, patch_size, widths = type(backbone).__name__, structure.patch_size(backbone), structure.widths(backbone)
    if config.has_feature_prompt and not widths:
        raise TrainingError(
            f"`backbone` is {recipe.backbone}: a {kind} has no blocks that prompts can be put into: expected"
            " `common_prompt` and `specific_prompt` to be off"
        )
    height, width = resolve_preprocessing(backbone, recipe.preprocessing)["input_size"][-2:]
    if config.patch_prompt and (height % patch_size or width % patch_size):
        remedy = f"`img_size` to be a multiple of {patch_size}" if widths else "`patch_prompt` to be off"
        raise TrainingError(
            f"`backbone` is {recipe.backbone}: its images have {height}x{width} pixels, which patches of"
            f" {patch_size}x{patch_size} do not fill: expected {remedy}"
        )


def _set_recompute(model: Any, recompute: str) -> None:
    if isinstance(model, TunedViT):
        if recompute == "mlp":
            raise ValueError("`recompute` is mlp: expected none or block, where a method changes the backbone")
        model.set_grad_checkpointing(recompute == "block")
    else:
        model.recompute = recompute


def _read_options(method: str, options: Iterable[str]) -> dict[str, Any]:
    """The values by their names, if the method has such settings; what is not JSON is taken as text."""
    parameters = inspect.signature(CLASSES[method]).parameters.values()
    settings = {setting.name: setting for setting in parameters if setting.kind is setting.KEYWORD_ONLY}
    values = {}
    for option in options:
        name, _, text = option.partition("=")
        if name not in settings:
            expected = ", ".join(map(_with_default, settings.values())) or "none"
            raise TrainingError(f"`method_options` has {name}: expected settings of the method {method}: {expected}")
        try:
            values[name] = json.loads(text)
        except ValueError:
            values[name] = text
        kind = str(settings[name].annotation).removesuffix(" | None")
        if type(values[name]) not in KINDS.get(kind, [type(values[name])]):
            raise TrainingError(f"`method_options` has {option}: expected a value of type {kind}")
    return values


def _with_default(setting: inspect.Parameter) -> str:
    return setting.name if setting.default is None else f"{setting.name} (default: {setting.default})"
