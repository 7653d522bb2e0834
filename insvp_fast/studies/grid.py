"""Grids of settings, from a TOML file."""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from insvp_fast.errors import CommandError
from insvp_fast.recipes import read_recipe
from insvp_fast.studies.arguments import to_arguments
from insvp_fast.studies.entries import Entry
from insvp_fast.training.paths import absolute_paths
from insvp_fast.training.recipe import Recipe, check_names

__all__ = ["make_entry", "read_grid"]


def read_grid(file: Path, output: Path) -> Iterator[Entry]:
    """The runs of a grid file; the last setting of the grid varies fastest.

    Raises:
        CommandError: if the file is not a grid, or two of its runs would be the same.
        TrainingError: if it has a name that is no setting, or an invalid value.
    """
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot read {file} ({error})") from error
    fixed, grid = content.pop("recipe", {}), content.pop("grid", {})
    if content or not isinstance(fixed, dict) or not isinstance(grid, dict):
        found = f", found {', '.join(content)}" if content else ""
        raise CommandError(f"{file}: expected the tables [recipe] and [grid]{found}")
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise CommandError(f"{file}: [grid] {name} is {values!r}: expected a list of values")
    seen: list[Recipe] = []
    for combination in itertools.product(*grid.values()):
        varied = dict(zip(grid, combination, strict=True))
        entry = make_entry(varied, fixed | varied, output, str(file))
        if (recipe := absolute_paths(entry.recipe)) in seen:  # they would share a run
            raise CommandError(f"{file}: [grid] has the run {varied} twice: expected different values")
        seen.append(recipe)
        yield entry


def make_entry(values: dict[str, Any], settings: Mapping[str, Any], output: Path, where: str) -> Entry:
    """A run with these settings; with ``recipe`` among them, those of that recipe first.

    Raises:
        TrainingError: for a name that is no setting, or an invalid value; ``where`` begins the message.
    """
    settings = dict(settings)
    name = settings.pop("recipe", None)
    given = check_names(settings, where) | {"output": str(output)}
    resolved = (read_recipe(name, given.get("released", False)) if name else {}) | given
    if isinstance(root := resolved.get("root"), str) and "{data}" in root:
        given["root"] = resolved["root"] = root.replace("{data}", str(resolved.get("data", Recipe.data)))
    return Entry(values, Recipe(**resolved), (["--recipe", name] if name else []) + to_arguments(given))
