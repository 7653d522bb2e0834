"""One run from beginning to end, the folder it leaves, and what can be done with that folder afterwards."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from PIL import Image, UnidentifiedImageError
from timm.models.vision_transformer import VisionTransformer

from insvp_fast.checkpoint import CheckpointError
from insvp_fast.config import InsVPConfig
from insvp_fast.model import InsVPViT
from insvp_fast.training.backbone import load_backbone, preprocessing_of
from insvp_fast.training.data import Data, load_data, load_test_data, transform_for
from insvp_fast.training.figures import draw_curves, draw_prompts
from insvp_fast.training.journal import Journal
from insvp_fast.training.loop import evaluate, fit, loader_for
from insvp_fast.training.recipe import BUILTIN, CommandError, Recipe

__all__ = ["evaluate_run", "load_run", "predict_files", "train"]

NO_PROMPTS = InsVPConfig(global_prompt=False, patch_prompt=False, common_prompt=False, specific_prompt=False)
BUILTIN_PROMPT_LENGTH = 4  # for its 16 patches; the paper's 9 are for 196
PICTURED = 8  # test images in prompts.png


def train(recipe: Recipe) -> Path:
    """Adapt the backbone to the data, by InsVP and by a linear probe, and return the run folder.

    Raises:
        CommandError: if the recipe names something that is not there, or the loss diverges.
    """
    accelerator = start(recipe)
    backbone = load_backbone(recipe.backbone, recipe.checkpoint)
    preprocessing = preprocessing_of(backbone)
    data = load_data(recipe.data, preprocessing, recipe.seed)
    config = insvp_config(recipe)
    journal = Journal(recipe, accelerator)
    journal.begin(config, preprocessing, data)

    insvp = train_one("InsVP", config, recipe.lr, backbone, data, journal)
    if accelerator.is_main_process:
        insvp.save_pretrained(journal.folder / "adapter", preprocessing=preprocessing, class_names=data.class_names)
        images = torch.stack([data.test[i][0] for i in range(min(PICTURED, len(data.test)))])  # type: ignore[arg-type]  # torch does not say so, but they have one
        draw_prompts(insvp, images.to(accelerator.device), preprocessing, journal.folder / "prompts.png")
    if recipe.probe:
        train_one("linear probe", NO_PROMPTS, recipe.probe_lr, backbone, data, journal)
    if accelerator.is_main_process:
        draw_curves(journal.epochs, journal.folder / "curve.png")
    journal.end()
    return journal.folder


def train_one(
    name: str, config: InsVPConfig, lr: float, backbone: VisionTransformer, data: Data, journal: Journal
) -> InsVPViT:
    """Train a model around a copy of the backbone and journal it as ``name``: all models see the same images."""
    recipe, accelerator = journal.recipe, journal.accelerator
    set_seed(recipe.seed)
    model = InsVPViT(copy.deepcopy(backbone), len(data.class_names), config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    journal.say(f"\n{name}: {trained:,} trained parameters, learning rate {lr:g}")
    prepared, accuracy = fit(
        model, data, recipe, lr, accelerator, log=lambda record: journal.epoch({"model": name} | record)
    )
    journal.result({"model": name, "test_accuracy": accuracy, "trained_parameters": trained})
    trained_model = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    accelerator.free_memory()
    return trained_model


def start(recipe: Recipe) -> Accelerator:
    """Device, precision and processes."""
    if recipe.amp == "fp16" and not torch.accelerator.is_available():
        raise CommandError("--amp is fp16: that needs a GPU; on a CPU use bf16 or off")
    return Accelerator(mixed_precision="no" if recipe.amp == "off" else recipe.amp)


def insvp_config(recipe: Recipe) -> InsVPConfig:
    """The paper's configuration or the release's, with the recipe's prompt length."""
    length = recipe.prompt_length
    if length is None and recipe.backbone == BUILTIN and not recipe.released:
        length = BUILTIN_PROMPT_LENGTH
    chosen: dict[str, Any] = {} if length is None else {"prompt_length": length}
    return InsVPConfig.released(**chosen) if recipe.released else InsVPConfig(**chosen)


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
        CommandError: if it is not a run folder.
    """
    file = Path(folder) / "config.json"
    try:
        config = json.loads(file.read_text())
        recipe = Recipe(**config["recipe"])
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise CommandError(f"{folder} is not a run folder of `insvp train`: cannot read {file} ({error})") from error
    backbone = load_backbone(recipe.backbone, recipe.checkpoint)
    try:
        model = InsVPViT.from_pretrained(Path(folder) / "adapter", backbone=backbone, local_files_only=True)
    except (CheckpointError, OSError) as error:
        raise CommandError(f"{folder} has no adapter that can be loaded: {error}") from error
    return Run(recipe, model, config["preprocessing"], config["class_names"])


def evaluate_run(folder: str | Path, data: str | None = None) -> float:
    """The accuracy, in [0, 1] and in fp32, of a run's model on its own test data or on those of another folder."""
    run, accelerator = load_run(folder), Accelerator(mixed_precision="no")
    tested = load_test_data(data or run.recipe.data, run.preprocessing, run.recipe.seed, run.class_names)
    return evaluate(accelerator.prepare(run.model), loader_for(tested, run.recipe, accelerator), accelerator)


@torch.inference_mode()
def predict_files(folder: str | Path, files: Sequence[str]) -> list[tuple[str, str, float]]:
    """(file, class, probability) for each image file.

    Raises:
        CommandError: naming the first file that is not an image.
    """
    run, device = load_run(folder), Accelerator(mixed_precision="no").device
    transform, model = transform_for(run.preprocessing), run.model.to(device)
    rows, size = [], run.recipe.batch_size
    for chunk in (files[i : i + size] for i in range(0, len(files), size)):
        images = torch.stack([transform(_open(file)) for file in chunk]).to(device)
        chances, classes = model(images).float().softmax(1).max(1)
        rows += [
            (file, run.class_names[index], chance)
            for file, index, chance in zip(chunk, classes.tolist(), chances.tolist(), strict=True)
        ]
    return rows


def _open(file: str) -> Image.Image:
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise CommandError(f"{file}: not an image that can be read ({error})") from error
