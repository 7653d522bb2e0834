"""One run from beginning to end, the folder it leaves, and what can be done with that folder afterwards."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.models.vision_transformer import VisionTransformer

from insvp_fast.config import InsVPConfig
from insvp_fast.data import Data, insvp_preprocessing, load_data
from insvp_fast.errors import CheckpointError, TrainingError
from insvp_fast.model import InsVPViT
from insvp_fast.training.backbone import load_backbone, preprocessing_of
from insvp_fast.training.device import fit_batch_size, precision, scaled_lr, start
from insvp_fast.training.figures import draw_curves, draw_prompts
from insvp_fast.training.folders import read_config
from insvp_fast.training.journal import Journal
from insvp_fast.training.loop import Training
from insvp_fast.training.recipe import BUILTIN, Recipe

__all__ = ["load_run", "train"]

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "insvp_fast"
NO_PROMPTS = InsVPConfig(global_prompt=False, patch_prompt=False, common_prompt=False, specific_prompt=False)
BUILTIN_PROMPT_LENGTH = 4  # for its 16 patches; the paper's 9 are for 196
PICTURED = 8  # test images in prompts.png


def train(recipe: Recipe | None = None, resume: str | Path | None = None) -> Path:
    """Adapt the backbone to the data, by InsVP and by a linear probe, and return the run folder.

    Args:
        recipe: the settings; of an old run they need not be given.
        resume: the folder of a run that was interrupted and now goes on.

    Raises:
        TrainingError: if the recipe names something that is not there or is not that of the run to resume, the loss
            diverges, or a file cannot be read or written. What was saved last is kept, to be resumed from.
    """
    if resume is not None:
        own = read_config(resume)[0]
        if recipe not in (None, own):
            raise TrainingError(f"--resume {resume}: expected no other settings than the run's own")
        recipe = own
    recipe = recipe or Recipe()
    recipe = dataclasses.replace(recipe, amp=precision(recipe.amp))
    accelerator = start(recipe.amp, recipe.trackers)
    backbone = load_backbone(recipe.backbone, recipe.checkpoint)
    preprocessing = preprocessing_for(backbone, recipe)
    with accelerator.local_main_process_first():  # of the processes of a machine, one fills the cache
        data = load_data(
            recipe.data,
            preprocessing,
            recipe.seed,
            root=recipe.root,
            protocol=recipe.protocol,
            cache=str(CACHE) if recipe.cache else None,
            exif_rotation=recipe.exif_rotation,
        )
    preprocessing = data.preprocessing or preprocessing  # VTAB has its own
    wanted = recipe.batch_size
    if recipe.auto_batch:
        model = build("InsVP", recipe, backbone, len(data.class_names))
        recipe = fit_batch_size(recipe, model, tuple(preprocessing["input_size"]), accelerator)
        del model
    journal = Journal(recipe, accelerator, Path(resume) if resume else None)
    with _in_one_line(journal):
        journal.begin(insvp_config(recipe), preprocessing, data)
        if recipe.batch_size != wanted:
            journal.say(f"batch size {recipe.batch_size}: the largest up to {wanted} that fits into memory")
        train_one("InsVP", recipe.lr, backbone, data, journal, preprocessing)
        if recipe.probe:
            train_one("linear probe", recipe.probe_lr, backbone, data, journal)
        if accelerator.is_main_process:
            draw_curves(journal.epochs, journal.folder / "curve.png")
        journal.end()
    return journal.folder


def train_one(
    name: str,
    lr: float,
    backbone: VisionTransformer,
    data: Data,
    journal: Journal,
    preprocessing: dict[str, Any] | None = None,
) -> InsVPViT:
    """Train a model around a copy of the backbone and journal it as ``name``: all models see the same images.

    With ``preprocessing``, the adapter and a picture of its prompts are written into the run folder.
    """
    recipe, accelerator = journal.recipe, journal.accelerator
    set_seed(recipe.seed)
    model = build(name, recipe, backbone, len(data.class_names))
    if accelerator.num_processes > 1:
        set_seed(recipe.seed, device_specific=True)  # dropout of the processes' images shall differ
    model.class_names, model.preprocessing = list(data.class_names), preprocessing
    lr = scaled_lr(recipe, lr, accelerator)
    folder = journal.folder if preprocessing else journal.folder / name.replace(" ", "-")
    training = Training(name, model, data, lr, journal, folder)
    parameters = sum(p.numel() for p in training.trained.values())
    journal.replay(training.records, training.result)
    journal.say(f"\n{name}: {parameters:,} trained parameters, learning rate {lr:g}{_how(recipe, accelerator)}")
    if training.epoch or training.batch:
        journal.say(f"goes on after {training.epoch} epochs and {training.batch} batches")
    if training.result is None:
        training.fit()
        result = training.finish()
        if preprocessing:
            training.write_adapter(folder / "adapter")
            if accelerator.is_main_process:
                trained = accelerator.unwrap_model(training.model, keep_fp32_wrapper=False)
                draw_prompts(trained, _pictured(data, accelerator), preprocessing, journal.folder / "prompts.png")
        journal.result(result)
        training.save()
    accelerator.free_memory()
    return accelerator.unwrap_model(training.model, keep_fp32_wrapper=False)


def build(name: str, recipe: Recipe, backbone: VisionTransformer, num_classes: int) -> InsVPViT:
    """InsVP, or the linear probe, around a copy of the backbone."""
    config = insvp_config(recipe) if name == "InsVP" else NO_PROMPTS
    model = InsVPViT(
        copy.deepcopy(backbone),
        num_classes,
        config,
        recompute=recipe.recompute,
        compile_prompters=recipe.compile == "prompters",
    )
    if recipe.compile == "model":
        model.compile()
    return model


def preprocessing_for(backbone: VisionTransformer, recipe: Recipe) -> dict[str, Any]:
    """How images are prepared, as arguments of ``timm.data.create_transform``."""
    own = preprocessing_of(backbone)
    return own if recipe.preprocessing == "timm" else insvp_preprocessing(own["input_size"][-1])


def insvp_config(recipe: Recipe) -> InsVPConfig:
    """The paper's configuration or the release's, with what the recipe changes in it."""
    length = recipe.prompt_length
    if length is None and recipe.backbone == BUILTIN and not recipe.released:
        length = BUILTIN_PROMPT_LENGTH
    given = {"prompt_length": length, "specific_kernels": recipe.specific_kernels, "simam": recipe.simam}
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return InsVPConfig.released(**chosen) if recipe.released else InsVPConfig(**chosen)


def _pictured(data: Data, accelerator: Accelerator) -> torch.Tensor:
    count = min(PICTURED, len(data.test))  # type: ignore[arg-type]  # torch does not say so, but they have one
    images = torch.stack([data.test[i][0] for i in range(count)]).to(accelerator.device)
    return data.on_device[1](images) if data.on_device else images


def _how(recipe: Recipe, accelerator: Accelerator) -> str:
    """What of the device, the processes and the rates is worth a word."""
    said = [f"precision {'fp32' if recipe.amp == 'off' else recipe.amp}"]
    if accelerator.num_processes > 1 or recipe.accumulate > 1:
        said.append(f"step of {recipe.batch_size} x {accelerator.num_processes} x {recipe.accumulate} images")
    if recipe.lr_scale != "none":
        said.append(f"rate scaled from the recipe's ({recipe.lr_scale} in images of a step / 64)")
    return "".join(f", {word}" for word in said)


@contextmanager
def _in_one_line(journal: Journal) -> Iterator[None]:
    """Say of what can go wrong around this program what it is, and how to go on."""
    way = f"insvp train --resume {journal.folder}"
    try:
        yield
    except OSError as error:
        what = f"{error.strerror}: {error.filename or journal.folder}" if error.strerror else str(error)
        raise TrainingError(f"{what}; the last good state is kept: {way}") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"the last good state is kept: {way}") from None


# ------------------------------------------------------------------------------------------------------ a finished run


class Run(NamedTuple):
    """What a run folder holds, ready for use."""

    recipe: Recipe
    model: InsVPViT
    preprocessing: dict[str, Any]
    class_names: list[str]


def load_run(folder: str | Path) -> Run:
    """Read a run folder: its model in evaluation mode, and all that belongs to it.

    Raises:
        TrainingError: if it is not a run folder.
    """
    recipe, config = read_config(folder)
    backbone = load_backbone(recipe.backbone, recipe.checkpoint)
    try:
        model = InsVPViT.from_pretrained(Path(folder) / "adapter", backbone=backbone, local_files_only=True)
    except (CheckpointError, OSError) as error:
        raise TrainingError(f"{folder} has no adapter that can be loaded: {error}") from error
    return Run(recipe, model, config["preprocessing"], config["class_names"])
