"""A training run from beginning to end."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from insvp_fast.atomic_files import replace_folder
from insvp_fast.checkpoints.backbone import is_name, weights_report
from insvp_fast.data import Data, load_data
from insvp_fast.errors import DataError, TrainingError
from insvp_fast.figures.prompts import explain, one_per_class, plot_prompts
from insvp_fast.figures.runs import plot_curves
from insvp_fast.model import InsVPViT
from insvp_fast.training.accelerator import create_accelerator, find_batch_size, resolve_amp
from insvp_fast.training.backbone import load_backbone, resolve_preprocessing
from insvp_fast.training.candidates import LINEAR, Candidate, candidates_of, insvp_config
from insvp_fast.training.clusters import check_clusters, fit_clusters
from insvp_fast.training.linear_probe import begins_as_probe, train_linear_probe
from insvp_fast.training.lr_finder import range_test
from insvp_fast.training.models import build_model
from insvp_fast.training.paths import absolute_paths
from insvp_fast.training.recipe import Recipe, score_name
from insvp_fast.training.run_folder import read_asked, read_config
from insvp_fast.training.run_lock import locked
from insvp_fast.training.run_logger import RunLogger
from insvp_fast.training.trainer import Trainer
from insvp_fast.training.warm_start import warm_start

__all__ = ["find_lr", "train", "train_candidate"]

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "insvp_fast"
PLOTTED_CLASSES = 10  # in prompts.png at most


def train(recipe: Recipe | None = None, resume: str | Path | None = None) -> Path:
    """Train InsVP or another method on a data set, and a linear probe for comparison; return the run folder.

    Args:
        recipe: the settings; None for the defaults, or for those of the run to resume.
        resume: the folder of an interrupted run to go on with.

    Raises:
        InsVPError: if the recipe names something that does not exist, it is not that of the run to resume, the loss
            diverges, or a file cannot be read or written. The last saved state is kept, to resume from.
    """
    asked = recipe or Recipe()
    recipe = _resolve(recipe, resume)
    accelerator = create_accelerator(recipe.amp, recipe.trackers)
    wanted = recipe.batch_size
    recipe, backbone, data = _prepare(recipe, accelerator, begins=resume is None)
    logger = RunLogger(recipe, accelerator, Path(resume) if resume else None)
    with _advice_to_resume(logger.folder), locked(logger.folder) if logger.active else nullcontext():
        logger.start(asked, insvp_config(recipe) if recipe.method == "insvp" else None, data, backbone)
        if report := weights_report(backbone):
            logger.say(f"backbone: {report}")
        if recipe.batch_size != wanted:
            logger.say(f"batch size {recipe.batch_size}: the largest up to {wanted} that fits into memory")
        for candidate in candidates_of(recipe):
            train_candidate(candidate, backbone, data, logger)
        if recipe.pictures and accelerator.is_main_process:
            metric = score_name(recipe.metric_for(data.multi_label))
            plot_curves(logger.epochs, logger.folder / "curve.png", metric)
        logger.finish()
    return logger.folder


def train_candidate(candidate: Candidate, backbone: nn.Module, data: Data, logger: RunLogger) -> nn.Module:
    """Train a model around a copy of the backbone."""
    recipe, accelerator = logger.recipe, logger.accelerator
    set_seed(recipe.seed)
    model = _build_model(candidate, backbone, data, logger)
    if candidate.method == LINEAR:
        train_linear_probe(candidate.name, model, data, logger)
        if candidate.is_adapter and accelerator.is_main_process:
            with replace_folder(logger.folder / "adapter") as new:
                model.save_pretrained(new)
    else:
        _fit(candidate, model, data, logger)
    accelerator.free_memory()
    return model


def find_lr(recipe: Recipe) -> float:
    """A learning rate for ``recipe.lr``, by a range test that begins with a random head.

    The test is written as lr.csv and lr.png into the folder ``<output>/<data>-lr``.

    Raises:
        InsVPError: as ``train``, if the method has no learning rate, or if the loss falls at no rate.
    """
    if recipe.method == LINEAR:
        raise TrainingError(f"`method` is {LINEAR}: it is fitted to convergence, without a learning rate")
    recipe = _resolve(recipe, None)
    accelerator = create_accelerator(recipe.amp)
    recipe, backbone, data = _prepare(recipe, accelerator)
    # a head that begins as a probe has nothing left to learn at small rates
    recipe = dataclasses.replace(recipe, head_init="random")
    folder = Path(recipe.output, f"{Path(recipe.data).resolve().name}-lr")
    candidate, logger = candidates_of(recipe)[-1], RunLogger(recipe, accelerator, folder)
    set_seed(recipe.seed, device_specific=accelerator.num_processes > 1)
    model = _build_model(candidate, backbone, data, logger)
    found = range_test(Trainer(candidate, model, data, logger))
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        found.write(folder)
    return found.suggestion()


def _build_model(candidate: Candidate, backbone: nn.Module, data: Data, logger: RunLogger) -> Any:
    recipe, accelerator = logger.recipe, logger.accelerator
    model: Any = build_model(candidate.method, recipe, backbone, len(data.class_names))
    model.class_names, model.preprocessing = list(data.class_names), data.preprocessing
    model.multi_label, model.exif_rotation, model.trained_on = data.multi_label, recipe.exif_rotation, data.origin
    fit_clusters(model, data, recipe, accelerator)
    return model


def _fit(candidate: Candidate, model: nn.Module, data: Data, logger: RunLogger) -> None:
    """Train by gradient descent; write the adapter and the plot of its prompts."""
    recipe, accelerator = logger.recipe, logger.accelerator
    if accelerator.num_processes > 1:
        set_seed(recipe.seed, device_specific=True)  # each process needs other dropout masks
    trainer = Trainer(candidate, model, data, logger)
    parameters = sum(p.numel() for p in trainer.trained.values())
    logger.restore(candidate.name, trainer.records, trainer.result)
    steps = _describe_steps(recipe, accelerator)
    logger.say(f"\n{candidate.name}: {parameters:,} trained parameters, learning rate {trainer.lr:g}, {steps}")
    if trainer.epoch or trainer.batch:
        logger.say(f"goes on after {trainer.epoch} epochs and {trainer.batch} batches")
    if trainer.result is not None:
        return
    trainer.fit()
    result = trainer.test()
    trainer.save_adapter("adapter")
    if recipe.pictures and accelerator.is_main_process and candidate.method == "insvp":
        trained = accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        _plot_prompts(trained, data, logger)
    logger.log_result(result)
    trainer.save()


def _resolve(recipe: Recipe | None, resume: str | Path | None) -> Recipe:
    """The recipe, or the one of the run to resume, with the precision of this machine."""
    if resume is not None:
        recorded = read_config(resume)[0]
        known = [absolute_paths(own, is_name) for own in (recorded, read_asked(resume))]
        if recipe is not None and absolute_paths(recipe, is_name) not in known:
            raise TrainingError(f"`resume` is {resume}: expected no other settings than the run's own")
        recipe = recorded
    recipe = recipe or Recipe()
    return dataclasses.replace(recipe, amp=resolve_amp(recipe.amp))


def _prepare(recipe: Recipe, accelerator: Accelerator, begins: bool = True) -> tuple[Recipe, nn.Module, Data]:
    """The recipe with a batch size that fits, the backbone and the data.

    What does not fit together is refused here, before there is a folder and before anything is trained.

    Args:
        begins: whether it is a new run, for which what it begins with must be there.
    """
    backbone = load_backbone(recipe.backbone, recipe.checkpoint, recipe.img_size)
    model: Any = build_model(recipe.method, recipe, backbone, 1)
    begins_as_probe(recipe, model)
    data = _load_data(recipe, backbone, accelerator)
    recipe.check_labels(data.multi_label)
    if begins and recipe.init_from:
        model.trained_on = data.origin
        warm_start(model, recipe.init_from)
    check_clusters(model, data)
    if recipe.auto_batch:
        model = build_model(recipe.method, recipe, backbone, len(data.class_names))
        fit_clusters(model, data, recipe, accelerator)
        recipe = find_batch_size(recipe, model, tuple(data.preprocessing["input_size"]), accelerator)
    return recipe, backbone, data


def _load_data(recipe: Recipe, backbone: nn.Module, accelerator: Accelerator) -> Data:
    with accelerator.local_main_process_first():  # one process of each machine fills the cache
        return load_data(
            recipe.data,
            resolve_preprocessing(backbone, recipe.preprocessing),
            recipe.split_seed,
            root=recipe.root,
            protocol=recipe.protocol,
            augmentation=recipe.augmentation,
            hflip=recipe.hflip,
            cache=str(CACHE) if recipe.cache else None,
            exif_rotation=recipe.exif_rotation,
        )


def _plot_prompts(model: InsVPViT, data: Data, logger: RunLogger) -> None:
    """Draw prompts.png: an image of each class of the test data."""
    labels = data.test.classes  # type: ignore[attr-defined]  # which all data sets of images have
    several = data.multi_label
    chosen = range(min(PLOTTED_CLASSES, len(labels))) if several else one_per_class(labels, PLOTTED_CLASSES)
    images = torch.stack([data.test[index][0] for index in chosen]).to(logger.accelerator.device)
    shown, reason = explain(model, images)
    if reason is not None:
        logger.say(f"prompts.png: {reason}")
    classes = None if several else [labels[index] for index in chosen]
    plot_prompts(shown, data.class_names, data.preprocessing, logger.folder / "prompts.png", classes=classes)


def _describe_steps(recipe: Recipe, accelerator: Accelerator) -> str:
    """The precision, and where they are not the usual ones, the images per step and the scaling of learning rates."""
    words = [f"precision {'fp32' if recipe.amp == 'off' else recipe.amp}"]
    if accelerator.num_processes > 1 or recipe.accumulate > 1:
        words.append(f"step of {recipe.batch_size} x {accelerator.num_processes} x {recipe.accumulate} images")
    if recipe.lr_scale != "none":
        words.append(f"learning rate scaled from the recipe's ({recipe.lr_scale} in images per step / 64)")
    return ", ".join(words)


@contextmanager
def _advice_to_resume(folder: Path) -> Iterator[None]:
    """Add to an interruption by a file system, an image that cannot be read or the user how to resume the run."""
    advice = f"the last good state is kept, go on with `resume` {folder}"
    try:
        yield
    except DataError as error:
        raise DataError(f"{error}; put another image in its place: {advice}") from error
    except OSError as error:
        reason = f"{error.strerror}: {error.filename or folder}" if error.strerror else str(error)
        raise TrainingError(f"{reason}; {advice}") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(advice) from None
