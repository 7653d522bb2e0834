"""A finished run folder of the built-in backbone with an untrained adapter, and its test images."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from insvp_fast import InsVPConfig, InsVPViT
from insvp_fast.data import transform_for
from insvp_fast.training.backbone import load_backbone, resolve_preprocessing
from insvp_fast.training.recipe import Recipe
from tests.commands.finished_run import CLASSES, HOSTILE, finish, noise, with_random_head, write_run


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """An image folder whose test split has 5, 4, 3, 2, 1 and 1 images of noise."""
    noise, folder = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "animals"
    for label, name in enumerate(CLASSES):
        (folder / "test" / name).mkdir(parents=True)
        (folder / "train" / name).mkdir(parents=True)
        for i in range(5 - label or 1):
            pixels = noise.integers(0, 255, (40, 44, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "test" / name / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def run(images, tmp_path_factory) -> Path:
    """A finished run folder, without any training."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("runs") / "animals-1"
    recipe = Recipe(data=str(images), batch_size=4, probe=False, output=str(folder.parent))
    backbone = load_backbone()
    model = InsVPViT(backbone, len(CLASSES), InsVPConfig(prompt_length=4))
    torch.nn.init.normal_(model.head.weight)
    preprocessing = resolve_preprocessing(backbone)
    model.save_pretrained(folder / "adapter", class_names=CLASSES, preprocessing=preprocessing)
    config = {"recipe": recipe.to_dict(), "preprocessing": preprocessing, "class_names": CLASSES}
    (folder / "config.json").write_text(json.dumps(config))
    finish(folder, 0.5)
    return folder


@pytest.fixture(scope="session")
def probabilities(run, images) -> dict[str, torch.Tensor]:
    """The class probabilities of each test file, by the model itself."""
    model = InsVPViT.from_pretrained(run / "adapter", backbone=load_backbone())
    transform = transform_for(resolve_preprocessing(load_backbone()))
    files = sorted((images / "test").rglob("*.png"))
    with torch.inference_mode():
        return {str(file): model(transform(Image.open(file))[None]).softmax(1)[0] for file in files}


@pytest.fixture(scope="session")
def hostile(tmp_path_factory) -> Path:
    """A run whose classes and files have names of HTML, templates and formulas."""
    random, root = np.random.default_rng(0), tmp_path_factory.mktemp("hostile")
    for name in HOSTILE:
        for split in ("train", "test"):
            noise(root / "data" / split / name / "<b onload='alert(3)'>.png", random)
            noise(root / "data" / split / name / "1.png", random)
    torch.manual_seed(0)
    model = with_random_head(InsVPViT(load_backbone(), 4, InsVPConfig(prompt_length=2)))
    return write_run(root / "run", root / "data", model, sorted(HOSTILE), select_on="test")
