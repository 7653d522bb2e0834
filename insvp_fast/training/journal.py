"""The folder of one run while it is being written, and the lines printed on the way."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from insvp_fast import __version__
from insvp_fast.config import InsVPConfig
from insvp_fast.data import Data
from insvp_fast.errors import TrainingError
from insvp_fast.storage import write_file
from insvp_fast.training.device import start_trackers
from insvp_fast.training.recipe import Recipe

__all__ = ["Journal"]

METRICS = "metrics.jsonl"
SLOW_LOADER = 0.3  # of an epoch, from which on the loader is said to be the limit


class Journal:
    """Keeps what happens in a run folder and prints it; of several processes only the main one writes and prints.

    Args:
        folder: of a run that goes on; None for a new one, ``<output>/<data>-<n>``, which is made here.

    Attributes:
        epochs, results: the records of all epochs and of all models so far.
    """

    def __init__(self, recipe: Recipe, accelerator: Accelerator, folder: Path | None = None) -> None:
        self.recipe, self.accelerator, self.active = recipe, accelerator, accelerator.is_main_process
        self.tested_on = "test"
        self.epochs: list[dict[str, Any]] = []
        self.results: list[dict[str, Any]] = []
        self.warned = False
        self.folder = folder or Path(recipe.output)
        if self.active and folder is None:
            self.folder = _new_folder(self.folder, Path(recipe.data).resolve().name)

    def begin(self, config: InsVPConfig, preprocessing: dict[str, Any], data: Data) -> None:
        """Write config.json, all that the run was decided by, if it is not there yet."""
        self.tested_on = data.tested_on
        images = {part: len(getattr(data, part)) for part in ("train", "val", "test")}
        content = {
            "recipe": self.recipe.to_dict(),
            "insvp": config.to_dict(),
            "preprocessing": preprocessing,
            "class_names": data.class_names,
            "images": images,
            "tested_on": data.tested_on,
            "protocol": data.protocol,
            "selected_on": self.recipe.selects_on,
            "processes": self.accelerator.num_processes,
            "device": str(self.accelerator.device),
            "versions": {"insvp_fast": __version__, "torch": torch.__version__, "python": platform.python_version()},
        }
        file = self.folder / "config.json"
        if self.active and not file.exists():
            write_file(file, (json.dumps(content, indent=2) + "\n").encode())
        start_trackers(self.recipe, self.accelerator, self.folder)
        counts = ", ".join(f"{count} {part}" for part, count in images.items())
        self.say(f"{self.recipe.backbone} on {self.recipe.data}: {counts} images, {len(data.class_names)} classes")
        chosen = "the last epoch" if self.recipe.selects_on is None else f"the best epoch on {self.recipe.selects_on}"
        normal = f"mean {_list(preprocessing['mean'])}, std {_list(preprocessing['std'])}"
        self.say(f"preprocessing {self.recipe.preprocessing} ({normal}), protocol {data.protocol}: keeps {chosen}")

    def replay(self, epochs: list[dict[str, Any]], result: dict[str, Any] | None) -> None:
        """Take over what a model did before the run was interrupted; metrics.jsonl ends with it."""
        self.epochs += epochs
        self.results += [result] if result else []
        models = dict.fromkeys(record["model"] for record in self.epochs)
        records = [record for model in models for record in self.epochs + self.results if record["model"] == model]
        if self.active and (records or (self.folder / METRICS).exists()):
            write_file(self.folder / METRICS, "".join(json.dumps(record) + "\n" for record in records).encode())

    def epoch(self, record: dict[str, Any]) -> None:
        """Keep and print the record of one epoch."""
        self.epochs.append(record)
        self._write(record)
        accuracies = "  ".join(
            f"{key.removesuffix('_accuracy')} {value:6.1%}"
            for key, value in record.items()
            if key.endswith("_accuracy") and value is not None
        )
        place = f"epoch {record['epoch']:3}/{self.recipe.epochs}"
        self.say(f"{place}  loss {record['loss']:.4f}  {accuracies}  {record['images_per_s']:.0f} images/s")
        values = {f"{record['model']}/{key}": value for key, value in record.items() if isinstance(value, float)}
        self.accelerator.log(values, step=record["epoch"])
        if record["data_wait"] > SLOW_LOADER and not (self.warned or self.results):  # the probe leaves a device idle
            self.warned = True
            self.say(
                f"warning: {record['data_wait']:.0%} of the epoch went by waiting for images: the loader is the limit,"
                f" not the {self.accelerator.device.type}; try more --workers than {self.recipe.workers}, or --cache"
            )

    def result(self, record: dict[str, Any]) -> None:
        """Keep how a model did in the end."""
        self.results.append(record)
        self._write(record)

    def end(self) -> None:
        """Print all results."""
        column = f"{self.tested_on} accuracy"  # a folder may have no images for a test of its own
        self.say(f"\n{'':12}{column:>15}{'trained parameters':>20}{'kept':>12}")
        for record in self.results:
            kept = f"epoch {record['kept_epoch']}"
            accuracy, parameters = f"{record['test_accuracy']:.1%}", f"{record['trained_parameters']:,}"
            self.say(f"{record['model']:12}{accuracy:>15}{parameters:>20}{kept:>12}")
        chosen = f"epoch selected on {on}" if (on := self.recipe.selects_on) else "trained on train and val, last epoch"
        self.say(f"protocol {self.recipe.protocol}, {chosen}, tested on {self.tested_on}")
        self.say(f"\nrun folder: {self.folder}")
        self.accelerator.end_training()

    def say(self, line: str) -> None:
        if self.active:
            print(line, flush=True)

    def _write(self, record: dict[str, Any]) -> None:
        if self.active:
            with (self.folder / METRICS).open("a") as file:
                file.write(json.dumps(record) + "\n")


def _new_folder(parent: Path, name: str) -> Path:
    """Make and return the first of ``name-1``, ``name-2``, ... that does not exist."""
    number = 1
    while True:
        folder = parent / f"{name}-{number}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
        except OSError as error:
            raise TrainingError(f"--output is {parent}: no folder can be made there ({error.strerror})") from error


def _list(numbers: Iterable[float]) -> str:
    return " ".join(f"{number:g}" for number in numbers)
