"""The folder of one run while it is being written, and the lines printed on the way."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from insvp_fast import __version__
from insvp_fast.config import InsVPConfig
from insvp_fast.training.data import Data
from insvp_fast.training.recipe import CommandError, Recipe

__all__ = ["Journal"]


class Journal:
    """Keeps what happens in a new folder and prints it; of several processes only the main one writes and prints.

    Attributes:
        folder: ``<output>/<data>-<n>``, made here.
        epochs: the records of all epochs so far.
    """

    def __init__(self, recipe: Recipe, accelerator: Accelerator) -> None:
        self.recipe, self.accelerator, self.active = recipe, accelerator, accelerator.is_main_process
        self.tested_on = "test"
        self.epochs: list[dict[str, Any]] = []
        self.results: list[dict[str, Any]] = []
        self.folder = Path(recipe.output)
        if self.active:
            self.folder = _new_folder(self.folder, Path(recipe.data).resolve().name)

    def begin(self, config: InsVPConfig, preprocessing: dict[str, Any], data: Data) -> None:
        """Write config.json: all that the run was decided by."""
        self.tested_on = data.tested_on
        images = {part: len(getattr(data, part)) for part in ("train", "val", "test")}
        versions = {"insvp_fast": __version__, "torch": torch.__version__, "python": platform.python_version()}
        content = {
            "recipe": self.recipe.to_dict(),
            "insvp": config.to_dict(),
            "preprocessing": preprocessing,
            "class_names": data.class_names,
            "images": images,
            "tested_on": data.tested_on,
            "device": str(self.accelerator.device),
            "versions": versions,
        }
        if self.active:
            (self.folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")
        counts = ", ".join(f"{count} {part}" for part, count in images.items())
        self.say(f"{self.recipe.backbone} on {self.recipe.data}: {counts} images, {len(data.class_names)} classes")

    def epoch(self, record: dict[str, Any]) -> None:
        """Keep and print the record of one epoch."""
        self.epochs.append(record)
        self._write(record)
        self.say(
            f"epoch {record['epoch']:3}/{self.recipe.epochs}  loss {record['loss']:.4f}  "
            f"val {record['val_accuracy']:6.1%}  {record['images_per_s']:.0f} images/s"
        )

    def result(self, record: dict[str, Any]) -> None:
        """Keep how a model did in the end."""
        self.results.append(record)
        self._write(record)

    def end(self) -> None:
        """Print all results."""
        column = f"{self.tested_on} accuracy"  # a folder may have no images for a test of its own
        self.say(f"\n{'':12}{column:>15}{'trained parameters':>20}")
        for record in self.results:
            self.say(f"{record['model']:12}{record['test_accuracy']:15.1%}{record['trained_parameters']:20,}")
        self.say(f"\nrun folder: {self.folder}")

    def say(self, line: str) -> None:
        if self.active:
            print(line, flush=True)

    def _write(self, record: dict[str, Any]) -> None:
        if self.active:
            with (self.folder / "metrics.jsonl").open("a") as file:
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
            raise CommandError(f"--output is {parent}: no folder can be made there ({error.strerror})") from error
