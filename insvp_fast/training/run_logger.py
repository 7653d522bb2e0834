"""What a run writes into its folder and prints while it is running."""

from __future__ import annotations

import json
import platform
import secrets
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from torch import nn

from insvp_fast import __version__
from insvp_fast.atomic_files import write_file
from insvp_fast.checkpoints.backbone import is_name
from insvp_fast.checkpoints.state_dict import backbone_sha256
from insvp_fast.config import InsVPConfig
from insvp_fast.data import Data
from insvp_fast.data.images import names_sha256
from insvp_fast.data.lists import escaped
from insvp_fast.data.sets import SPLITS
from insvp_fast.errors import TrainingError
from insvp_fast.json_files import read_json
from insvp_fast.training.accelerator import from_main
from insvp_fast.training.balance import targets_of
from insvp_fast.training.candidates import candidates_of
from insvp_fast.training.paths import absolute_paths
from insvp_fast.training.recipe import Recipe, score_name
from insvp_fast.training.run_folder import CONFIG_FILE, METRICS_FILE, SLOW_LOADER, read_metrics
from insvp_fast.training.terminal import print_table
from insvp_fast.training.trackers import log_to_trackers, start_trackers

__all__ = ["RunLogger"]

# what config.json says of what a run begins with, and the setting that says where it is
INPUTS = {"class_names": "data", "images": "data", "images_sha256": "data", "backbone_sha256": "backbone"}

WORDS = {"mean_per_class": "per class ", "f1": "F1 ", "map": "mAP "}  # for scores that are not the accuracy


class RunLogger:
    """Records a run in its folder and prints it; in distributed training only the main process writes and prints.

    Args:
        folder: of a run that is resumed, or of a range test; None makes a new one, ``<output>/<data>-<n>``.

    Attributes:
        epochs, results: the records of all epochs, and the final record of each model, so far.

    Raises:
        TrainingError: if the folder cannot be made.
    """

    def __init__(self, recipe: Recipe, accelerator: Accelerator, folder: Path | None) -> None:
        self.recipe, self.accelerator, self.active = recipe, accelerator, accelerator.is_main_process
        self.shown = ["accuracy"]
        self.epochs: list[dict[str, Any]] = []
        self.results: list[dict[str, Any]] = []
        self.warned = False
        if folder is None:
            folder = from_main(accelerator, lambda: _new_folder(Path(recipe.output), Path(recipe.data).resolve().name))
        self.folder: Path = folder

    def start(self, asked: Recipe, config: InsVPConfig | None, data: Data, backbone: nn.Module) -> None:
        """Write config.json, everything that determines the run, unless it exists; begin to log to the trackers.

        Args:
            asked: the recipe before the machine chose the precision and the batch size.

        Raises:
            TrainingError: if the run to resume began with other images, of which those that it held out might be
                trained on, or around another backbone.
        """
        metric = score_name(self.recipe.metric_for(data.multi_label))
        self.shown = [metric] if data.multi_label or metric == "accuracy" else ["accuracy", metric]

        def write_config() -> None:
            for leftover in self.folder.glob("*.tmp"):  # of a process that was killed
                leftover.unlink(missing_ok=True)
            content = self._describe(asked, config, data, backbone)
            file = self.folder / CONFIG_FILE
            if file.exists():
                _require_same_inputs(read_json(file, TrainingError), content)
            else:
                write_file(file, (json.dumps(content, indent=2) + "\n").encode())

        from_main(self.accelerator, write_config)
        names = [candidate.name for candidate in candidates_of(self.recipe)]
        start_trackers(self.accelerator, self.recipe, self.folder, self._run_id(), names)
        self._say_protocol(data, metric)

    def _describe(self, asked: Recipe, config: InsVPConfig | None, data: Data, backbone: nn.Module) -> dict[str, Any]:
        """The content of config.json."""
        splits = {split: getattr(data, split) for split in SPLITS}
        return {
            "id": secrets.token_hex(8),
            "recipe": absolute_paths(self.recipe, is_name).to_dict(),
            "asked": dict(asked.to_dict().items() - self.recipe.to_dict().items()),
            "insvp": config and config.to_dict(),
            "preprocessing": data.preprocessing,
            "augmentation": data.augmentation,
            "class_names": data.class_names,
            "multi_label": data.multi_label,
            "images": {split: len(part) for split, part in splits.items()},
            "images_sha256": {split: names_sha256(part) for split, part in splits.items()},
            "backbone_sha256": backbone_sha256(backbone, torch.float32, positions=False),
            "protocol": data.protocol,
            "selected_on": self.recipe.selection_split,
            "processes": self.accelerator.num_processes,
            "device": str(self.accelerator.device),
            "versions": {
                "insvp_fast": __version__,
                "torch": torch.__version__,
                "timm": timm.__version__,
                "python": platform.python_version(),
            },
            "command": shlex.join(sys.orig_argv),
            "working_folder": str(Path.cwd()),
        }

    def _say_protocol(self, data: Data, metric: str) -> None:
        counts = ", ".join(f"{len(getattr(data, split))} {split}" for split in SPLITS)
        classes = f"{len(data.class_names)} classes{_several_labels(data) if data.multi_label else ''}"
        self.say(f"{self.recipe.backbone} on {self.recipe.data}: {counts} images, {classes}")
        self.say(f"splits: {data.protocol}")
        split = self.recipe.selection_split
        best = "the best epoch" + (f" by {WORDS[metric].strip()}" if metric in WORDS else "")
        kept = "the last epoch" if split is None else f"{best} on {split}"
        statistics = f"mean {_join(data.preprocessing['mean'])}, std {_join(data.preprocessing['std'])}"
        augmentation = "augmentation {augmentation}, flips with probability {hflip:g}".format(**data.augmentation)
        self.say(f"preprocessing {self.recipe.preprocessing} ({statistics}), {augmentation}; keeps {kept}")

    def restore(self, model: str, epochs: list[dict[str, Any]], result: dict[str, Any] | None) -> None:
        """Take over the records of a model from before an interruption; metrics.jsonl then has no others of it.

        Those of models that come later stay there till it is their turn: another interruption must not leave a finished
        run unfinished.
        """
        self.epochs += epochs
        self.results += [result] if result else []
        if not self.active:
            return
        models = dict.fromkeys([*(record["model"] for record in self.epochs), model])
        records = [record for name in models for record in self.epochs + self.results if record["model"] == name]
        records += [record for record in read_metrics(self.folder) if record["model"] not in models]
        if records or (self.folder / METRICS_FILE).exists():
            write_file(self.folder / METRICS_FILE, "".join(json.dumps(record) + "\n" for record in records).encode())

    def log_epoch(self, record: dict[str, Any]) -> None:
        """Write and print the record of an epoch."""
        self.epochs.append(record)
        self._write(record)
        scores = self._scores(record)
        epoch = f"epoch {record['epoch']:3}/{self.recipe.epochs}"
        if "images_per_s" in record:
            self.say(f"{epoch}  loss {record['loss']:.4f}  {scores}  {record['images_per_s']:.0f} images/s")
            self._warn_of_waiting(record)
        elif record["epoch"] == 0:
            self.say(f"{epoch}  {'':11}  {scores}")  # there is no loss of training yet
        else:  # of a linear probe, which is fitted at once
            self.say(f"fitted  loss {record['loss']:.4f}  {scores}")
        log_to_trackers(self.accelerator, record["model"], record["epoch"], record)

    def scores(self) -> str:
        """The scores of the last epoch that was trained, of this model; nothing before its first."""
        record = self.epochs[-1] if self.epochs else {}
        return " ".join(self._scores(record).split()) if "images_per_s" in record else ""

    def _scores(self, record: dict[str, Any]) -> str:
        return "  ".join(
            f"{split} {WORDS.get(name, '')}{value:6.1%}"
            for split in ("val", "test")
            for name in self.shown
            if (value := record.get(f"{split}_{name}")) is not None
        )

    def _warn_of_waiting(self, record: dict[str, Any]) -> None:
        if record["data_wait"] > SLOW_LOADER and not self.warned:
            self.warned = True
            self.say(
                f"warning: {record['data_wait']:.0%} of the epoch was spent waiting for images: the loader is the"
                f" limit, not the {self.accelerator.device.type}; try more `workers` than {self.recipe.workers}, or"
                " `cache`"
            )

    def log_result(self, record: dict[str, Any]) -> None:
        """Write the final record of a model."""
        self.results.append(record)
        self._write(record)
        scores = {f"final_test_{name}": record[f"test_{name}"] for name in self.shown}
        log_to_trackers(self.accelerator, record["model"], self.recipe.epochs, scores)

    def finish(self) -> None:
        """Print the final records."""
        header, rows = [f"test {WORDS.get(name, name).strip()}" for name in self.shown], []
        for record in self.results:
            kept = "converged" if record["kept_epoch"] is None else f"epoch {record['kept_epoch']}"
            scores = [f"{record[f'test_{name}']:.1%}" for name in self.shown]
            rows.append([record["model"], *scores, f"{record['trained_parameters']:,}", kept])
        self.say("")
        if self.active:
            print_table(["", *header, "trained parameters", "kept"], rows, [12, *[15] * len(header), 20, 12])
        split = self.recipe.selection_split
        selection = f"epoch selected on {split}" if split else "trained on train and val, last epoch"
        self.say(f"protocol {self.recipe.protocol}, {selection}, tested on test")
        self.say(f"\nrun folder: {self.folder}")
        self.accelerator.wait_for_everyone()  # a process that exits while another still works can be aborted by PyTorch
        self.accelerator.end_training()

    def say(self, line: str) -> None:
        """Print a line, in the main process."""
        if self.active:
            print(line, flush=True)

    def _write(self, record: dict[str, Any]) -> None:
        if self.active:
            with (self.folder / METRICS_FILE).open("a") as file:
                file.write(json.dumps(record) + "\n")

    def _run_id(self) -> str:
        """What distinguishes this run from all others; a resumed run has its own again."""
        return str(read_json(self.folder / CONFIG_FILE, TrainingError).get("id", "")) if self.active else ""


def _several_labels(data: Data) -> str:
    """That images have several labels, with an example: the names of classes may have been divided unawares."""
    targets = targets_of(data.plain_train)
    several = (targets.sum(1) > 1).nonzero().flatten()
    names = [data.class_names[index] for index in targets[several[0]].nonzero().flatten()] if len(several) else []
    return ", several labels per image" + (f", such as {' and '.join(map(escaped, names[:3]))}" if names else "")


def _require_same_inputs(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise TrainingError where a run would go on with other images or weights than those it began with."""
    for key, setting in INPUTS.items():
        was, found = before.get(key, now[key]), now[key]  # earlier versions did not write every one
        if was == found:
            continue
        if key == "images_sha256":
            splits = ", ".join(split for split in found if was.get(split) != found[split])
            what = f"the images of {splits} had other names or classes when the run began"
        else:
            what = f"{key.replace('_', ' ')} was {was} when the run began and is {found} now"
        raise TrainingError(f"`{setting}` is not that of the run: {what}; expected the same, or a new run")


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
            raise TrainingError(f"`output` is {parent}: no folder can be made there ({error.strerror})") from error


def _join(numbers: Iterable[float]) -> str:
    return " ".join(f"{number:g}" for number in numbers)
