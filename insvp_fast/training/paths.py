"""Settings that hold for every working folder."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from insvp_fast.data.sets import DIGITS, PREFIXES, SETS
from insvp_fast.training.recipe import Recipe

__all__ = ["absolute_paths"]


def absolute_paths(recipe: Recipe, is_name: Callable[[str], bool] = lambda source: False) -> Recipe:
    """The recipe with an absolute path wherever the value of a setting is a path; names stay what they are.

    What is a name and what a path is decided as where the value is read. Links are kept.

    Args:
        is_name: whether a backbone of this name comes before a folder of the same name. To compare recipes it is not
            needed, which keeps torch and timm away.
    """
    values: dict[str, Any] = {}
    for field in dataclasses.fields(recipe):
        value, kind = getattr(recipe, field.name), field.metadata["metavar"]
        if value is not None and kind in ("FILE", "FOLDER"):
            values[field.name] = _absolute(value)
        elif value is not None and kind == "NAME|PATH":
            values[field.name] = _absolute_if_there(value)
    return dataclasses.replace(
        recipe, **values | {"data": _data(recipe), "backbone": _backbone(recipe.backbone, is_name)}
    )


def _data(recipe: Recipe) -> str:
    if recipe.data in (DIGITS, *SETS):
        return recipe.data
    prefix = next(filter(recipe.data.startswith, PREFIXES), "")
    place = recipe.data.removeprefix(prefix)
    if prefix in ("hfds/", "hfids/"):
        return prefix + _absolute_if_there(place)
    if prefix == "tfds/" or (prefix == "wds/" and recipe.root is not None):  # the files are in `root`
        return recipe.data
    return prefix + _absolute(place)


def _backbone(source: str, is_name: Callable[[str], bool]) -> str:
    if source.startswith(("hf-hub:", "hf_hub:")):
        return source
    if source.startswith("local-dir:"):
        return f"local-dir:{_absolute(source.removeprefix('local-dir:'))}"
    if Path(source).exists():
        return source if is_name(source) else _absolute(source)
    name, at, file = source.partition("@")
    return f"{name}@{_absolute(file)}" if at else source


def _absolute_if_there(value: str) -> str:
    """The absolute path of a file or folder; another value is a name."""
    return _absolute(value) if Path(value).exists() else value


def _absolute(value: str) -> str:
    """Without "..", so that folders that were passed through may be renamed; behind a link that is another place."""
    short = os.path.abspath(value)
    return short if os.path.realpath(value) == os.path.realpath(short) else str(Path(value).absolute())
