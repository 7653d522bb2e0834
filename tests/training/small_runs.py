"""Small data sets, and the settings of short runs on them."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import sklearn.datasets
from PIL import Image

from insvp_fast.training.recipe import Recipe

SMALL = {"epochs": 3, "batch_size": 16, "amp": "off", "head_init": "random"}


def make_folder(root: Path, splits: dict[str, int], classes: tuple[str, ...] = ("dark", "light")) -> Path:
    """An image folder of 40x48 noise images, whose brightness tells the class."""
    noise = np.random.default_rng(0)
    for split, count in splits.items():
        for level, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = noise.integers(0, 90, (40, 48, 3)) + level * 160
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


def use_few_digits(patch) -> None:
    """Let the data set digits have the first 300 images instead of all."""
    digits = sklearn.datasets.load_digits()
    few = SimpleNamespace(images=digits.images[:300], target=digits.target[:300], target_names=range(10))
    patch.setattr(sklearn.datasets, "load_digits", lambda: few)


def quick(pictures: Path, tmp_path: Path, **settings) -> Recipe:
    common = {"epochs": 1, "batch_size": 8, "probe": False, "amp": "off", "prompt_length": 2, "head_init": "random"}
    common |= {"pictures": False}  # which take longer than the training
    return Recipe(data=str(pictures), output=str(tmp_path), **(common | settings))


def read_records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
