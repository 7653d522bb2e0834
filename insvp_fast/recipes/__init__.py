"""Recipes: the settings of training runs in TOML files, those in this folder and the user's own.

A file holds fields of ``Recipe``. Its key ``base`` names a recipe whose settings it changes. Its table ``[released]``
holds the settings that differ where a run follows the authors' released code instead of the paper (``released``).
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from insvp_fast.errors import TrainingError
from insvp_fast.training.recipe import check_names

__all__ = ["list_shipped", "read_recipe", "read_title"]

FOLDER = Path(__file__).parent


def list_shipped() -> list[str]:
    """The names of the recipes in the package."""
    return sorted(file.stem for file in FOLDER.glob("*.toml"))


def read_title(name: str) -> str:
    """The first line of a shipped recipe, a comment that says what it is for."""
    return (FOLDER / f"{name}.toml").read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")


def read_recipe(source: str, released: bool = False) -> dict[str, Any]:
    """The settings of a shipped recipe or of a file, for ``Recipe(**settings)``; ``recipe`` among them is ``source``.

    Args:
        released: with those of the table ``[released]``.

    Raises:
        TrainingError: if there is no such recipe, or a name in it is no setting.
    """
    settings, changes = _read_with_base(source, ())
    return {"recipe": source} | settings | (changes if released or settings.get("released") else {})


def _read_with_base(source: str, derived: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of a recipe and of its table [released], each over those of its base.

    Args:
        derived: the recipes that have this one as their base, directly or not.
    """
    if source in derived:
        raise TrainingError(f"recipe {source}: it is its own base")
    if not isinstance(source, str):  # TOML has other values
        raise TrainingError(f"recipe {source}: expected a name or a file")
    file = FOLDER / f"{source}.toml" if source in list_shipped() else Path(source)
    if not file.is_file():
        raise TrainingError(f"recipe {source}: expected a TOML file or one of {', '.join(list_shipped())}")
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # not TOML, or not UTF-8
        raise TrainingError(f"recipe {source}: {error}") from error
    base, table = content.pop("base", None), content.pop("released", {})
    if not isinstance(table, dict):  # the setting of the same name
        content["released"], table = table, {}
    settings, changes = check_names(content, f"recipe {source}"), check_names(table, f"recipe {source}, [released]")
    if base is None:
        return settings, changes
    base_settings, base_changes = _read_with_base(base, (*derived, source))
    return base_settings | settings, base_changes | changes
