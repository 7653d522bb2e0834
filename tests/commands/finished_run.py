"""Run folders that are written without any training: their classes, images, models and metrics."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from insvp_fast import InsVPConfig, InsVPViT
from insvp_fast.training.backbone import load_backbone, resolve_preprocessing
from insvp_fast.training.recipe import Recipe

CLASSES = ["ant", "bee", "cat", "dog", "eel", "fox, red"]
HOSTILE = ["<script>alert(1)", "\"><img src=x onerror='alert(2)'>", r"{{ 7 * 7 }} $\bad$ & 'so' on", "plain"]


def finish(folder: Path, accuracy: float, **more: object) -> None:
    """Write metrics.jsonl as of a finished run; ``more`` are further values of its epoch."""
    records = [{"model": "InsVP", "epoch": 1, "loss": 1.0, "test_accuracy": 0.0} | more]  # an epoch is no result
    records += [{"model": "InsVP", "test_accuracy": accuracy, "trained_parameters": 7, "kept_epoch": 1}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def write_run(folder: Path, data: Path, model: torch.nn.Module, names: list[str], **settings) -> Path:
    """A finished run around a model that was not trained."""
    recipe, preprocessing = Recipe(data=str(data), batch_size=4, **settings), resolve_preprocessing(load_backbone())
    model.save_pretrained(folder / "adapter", class_names=names, preprocessing=preprocessing)
    versions = {"versions": {"insvp_fast": "0.1.0", "torch": "2.11<0>"}, "command": "insvp train --data '<b>'"}
    config = {"recipe": recipe.to_dict(), "preprocessing": preprocessing, "class_names": names} | versions
    (folder / "config.json").write_text(json.dumps(config))
    finish(folder, 0.5)
    return folder


def write_run_of_several_labels(folder: Path) -> Path:
    """A finished run around an untrained model for several labels per image, and its six images, in a folder."""
    random = np.random.default_rng(0)
    for i in range(6):
        noise(folder / f"{i}.png", random)
    labels = ["sea;sky", "sky", "", "sea", "sea;sky", "sand"]
    rows = [f"{i}.png,{label},{split}\n" for split in ("train", "test") for i, label in enumerate(labels)]
    (folder / "list.csv").write_text("path,tags,split\n" + "".join(rows))
    torch.manual_seed(0)
    model = with_random_head(InsVPViT(load_backbone(), 3, InsVPConfig(prompt_length=2)))
    model.multi_label = True
    return write_run(folder / "run", folder / "list.csv", model, ["sand", "sea", "sky"])


def with_random_head(model: torch.nn.Module) -> torch.nn.Module:
    torch.nn.init.normal_(model.head.weight)
    return model


def noise(file: Path, random: np.random.Generator) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(random.integers(0, 255, (33, 40, 3)).astype(np.uint8)).save(file)
