"""Reading the files of run folders and adapters without loading a model, so without torch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from insvp_fast import __version__
from insvp_fast.checkpoints.names import ADAPTER_FILE
from insvp_fast.errors import TrainingError
from insvp_fast.json_files import read_json
from insvp_fast.training.candidates import candidates_of
from insvp_fast.training.recipe import Recipe

__all__ = [
    "CONFIG_FILE",
    "METRICS_FILE",
    "SLOW_LOADER",
    "is_run",
    "read_asked",
    "read_config",
    "read_metrics",
    "read_results",
]

CONFIG_FILE, METRICS_FILE = "config.json", "metrics.jsonl"  # of a run
SLOW_LOADER = 0.3  # the share of the time spent waiting for images from which on it is reported


def is_run(source: str | Path) -> bool:
    """Whether a folder is taken for a run: if it is no adapter, beside which others may put a config.json."""
    return Path(source).is_dir() and not Path(source, ADAPTER_FILE).is_file()


def read_config(run: str | Path) -> tuple[Recipe, dict[str, Any]]:
    """The settings of a run, and the whole content of its config.json.

    Raises:
        TrainingError: if it is not a run folder, or was written by a version with other settings.
    """
    try:
        config = read_json(Path(run) / CONFIG_FILE, TrainingError)
        settings, asked = config.get("recipe"), config.get("asked", {})
        if not (isinstance(settings, dict) and isinstance(asked, dict)):
            raise TrainingError(f"{CONFIG_FILE} has no recipe")
        unknown = (settings | asked).keys() - {field.name for field in dataclasses.fields(Recipe)}
        if not unknown:
            return Recipe(**settings), config
    except (TrainingError, TypeError) as error:
        raise TrainingError(f"{run} is not a run folder of `insvp train`: {error}") from error
    problem = f"{run} has the setting {min(unknown)}, which insvp_fast {__version__} does not know"
    raise TrainingError(f"{problem}: another version wrote {CONFIG_FILE}")


def read_asked(run: str | Path) -> Recipe:
    """The settings that a run was asked for: what ``auto`` is on a machine, and the batch that fits, are its own.

    Raises:
        TrainingError: as ``read_config``.
    """
    recipe, config = read_config(run)
    return dataclasses.replace(recipe, **config.get("asked", {}))


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All records of a run so far, up to an incomplete or damaged line."""
    records = []
    file = run / METRICS_FILE
    for line in file.read_bytes().splitlines() if file.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:  # not JSON, or not even UTF-8
            break
        if not (isinstance(record, dict) and "model" in record):
            break
        records.append(record)
    return records


def read_results(run: Path) -> dict[str, dict[str, Any]]:
    """The final record of each model by its name; empty while the run is not finished.

    Each has ``test_accuracy``, or ``test_map`` of several labels.
    """
    results = {record["model"]: record for record in read_metrics(run) if "trained_parameters" in record}
    expected = {candidate.name for candidate in candidates_of(read_config(run)[0])}
    return results if results.keys() >= expected else {}
