"""Recipes: the settings of training runs as TOML files, those beside this module and the user's own.

A file holds fields of ``Recipe``. ``base`` names a recipe that it starts from, and its table ``[released]`` what is
different where the authors' released code is followed instead of the paper (``released = true``).
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from insvp_fast.errors import TrainingError
from insvp_fast.training.settings import known

__all__ = ["read", "shipped", "title"]

FOLDER = Path(__file__).parent


def shipped() -> list[str]:
    """The names of the recipes in the package."""
    return sorted(file.stem for file in FOLDER.glob("*.toml"))


def title(name: str) -> str:
    """The first line of a shipped recipe, which says what it is for."""
    return (FOLDER / f"{name}.toml").read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")


def read(source: str, released: bool = False) -> dict[str, Any]:
    """The settings of a shipped recipe or of a file, for ``Recipe(**settings)``; ``recipe`` among them is ``source``.

    Raises:
        TrainingError: if there is none, or it holds something that is no setting.
    """
    plain, different = _read(source, ())
    return {"recipe": source} | plain | (different if released or plain.get("released") else {})


def _read(source: str, inner: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of a recipe and of its table, each over those of its base."""
    if source in inner:
        raise TrainingError(f"recipe {source}: it is its own base")
    file = FOLDER / f"{source}.toml" if source in shipped() else Path(source)
    if not file.is_file():
        raise TrainingError(f"recipe {source}: expected a TOML file or one of {', '.join(shipped())}")
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # not TOML, or not UTF-8
        raise TrainingError(f"recipe {source}: {error}") from error
    base, table = content.pop("base", None), content.pop("released", {})
    if isinstance(table, bool):  # the setting, which a file may hold as well
        content["released"], table = table, {}
    own = known(content, f"recipe {source}"), known(table, f"recipe {source}, [released]")
    if base is None:
        return own
    beneath = _read(base, (*inner, source))
    return beneath[0] | own[0], beneath[1] | own[1]
