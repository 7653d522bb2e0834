"""Classifying image files with a trained model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from insvp_fast.data import transform_for
from insvp_fast.data.folders import image_files
from insvp_fast.data.images import Images
from insvp_fast.errors import TrainingError
from insvp_fast.training.device import start
from insvp_fast.training.run import load_run

__all__ = ["Prediction", "find_images", "predict"]


class Prediction(NamedTuple):
    """One file: its likeliest classes with their probabilities, likeliest first, or why it cannot be read."""

    file: str
    ranking: list[tuple[str, float]]
    error: str | None


def find_images(paths: Sequence[str]) -> list[str]:
    """The files among ``paths``, and the images in their folders, as ``image_files`` finds them.

    Raises:
        TrainingError: if a path does not exist, or a folder holds no image.
    """
    files: list[str] = []
    for path in map(Path, paths):
        found = image_files(path) if path.is_dir() else [str(path)]
        if not path.exists():
            raise TrainingError(f"{path}: no such file or folder")
        if not found:
            raise TrainingError(f"{path}: no image in this folder")
        files += found
    return files


@torch.inference_mode()
def predict(
    run: str | Path, files: Sequence[str], top_k: int = 1, batch_size: int | None = None, workers: int | None = None
) -> Iterator[Prediction]:
    """Classify image files, in fp32 and in their order.

    Args:
        run: the run folder.
        top_k: classes in each ranking; all where there are fewer.
        batch_size, workers: None for those of the run.

    Raises:
        TrainingError: if it is not a finished run.
    """
    recipe, model, preprocessing, names = load_run(run)
    device = start().device
    model = model.to(device)
    unknown = [-1] * len(files)  # nobody says of which class they are
    pictures = _Pictures(Images(files, unknown, transform_for(preprocessing), recipe.exif_rotation))
    workers = recipe.workers if workers is None else workers
    for batch in DataLoader(pictures, batch_size or recipe.batch_size, num_workers=workers, collate_fn=list):
        images = [image for _, image, _ in batch if image is not None]
        rankings = iter(_rank(model(torch.stack(images).to(device)), names, top_k) if images else ())
        for file, image, error in batch:
            yield Prediction(file, [] if image is None else next(rankings), error)


def _rank(logits: Tensor, names: Sequence[str], top_k: int) -> list[list[tuple[str, float]]]:
    chances, classes = logits.float().softmax(1).topk(min(top_k, len(names)))
    rows = zip(classes.tolist(), chances.tolist(), strict=True)
    return [[(names[index], chance) for index, chance in zip(*row, strict=True)] for row in rows]


class _Pictures(Dataset):
    """(file, image [3, H, W] or None, error or None)."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[str, Tensor | None, str | None]:
        file = self.images.name(index)
        try:
            return file, self.images[index][0], None
        except TrainingError as error:
            return file, None, str(error)
