"""Classifying images with the model of a finished run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from insvp_fast.checkpoints.names import ADAPTER_FILE
from insvp_fast.data import transform_for
from insvp_fast.data.folders import image_files
from insvp_fast.data.images import Images
from insvp_fast.errors import DataError, TrainingError
from insvp_fast.model import InsVPViT
from insvp_fast.training.accelerator import create_accelerator
from insvp_fast.training.load import load_run

__all__ = ["Classifier", "Prediction", "find_images", "load_classifier", "predict"]


class Classifier:
    """A trained model in fp32 on this machine's device, with the preparation of its images and its class names.

    Args:
        preprocessing: arguments of ``timm.data.create_transform``.
        exif_rotation: whether the images that it was trained with were turned upright.
    """

    def __init__(
        self, model: nn.Module, preprocessing: Mapping[str, Any], class_names: Sequence[str], exif_rotation: bool
    ) -> None:
        self.device = create_accelerator().device
        self.model = model.to(self.device).float()
        self.class_names, self.exif_rotation = list(class_names), exif_rotation
        self.image_shape = tuple(preprocessing["input_size"])
        self.transform = transform_for(dict(preprocessing))

    def images(self, files: Sequence[str | Path | BinaryIO], max_pixels: int | None = None) -> Images:
        """The files as items (fp32 [3, H, W], -1); ``max_pixels`` as in ``read_image``."""
        return Images(files, [-1] * len(files), self.transform, self.exif_rotation, max_pixels)

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """fp32 [B, classes] on the CPU, of images fp32 [B, 3, H, W]."""
        return self.model(images.to(self.device)).cpu()

    def rank(self, logits: Tensor, top_k: int) -> list[list[tuple[str, float]]]:
        """The likeliest ``top_k`` classes of each row with their probabilities, likeliest first; all if fewer."""
        probabilities, classes = logits.softmax(1).topk(min(top_k, len(self.class_names)))
        rows = zip(classes.tolist(), probabilities.tolist(), strict=True)
        return [[(self.class_names[index], value) for index, value in zip(*row, strict=True)] for row in rows]


def load_classifier(folder: str | Path) -> Classifier:
    """The classifier of a run folder or an adapter folder; an adapter turns its images upright.

    Raises:
        CheckpointError: if it cannot be loaded.
        TrainingError: if it is neither a finished run nor an adapter with class names and preprocessing.
    """
    if not (Path(folder) / ADAPTER_FILE).is_file():
        recipe, model, preprocessing, names = load_run(folder)
        return Classifier(model, preprocessing, names, recipe.exif_rotation)
    model = InsVPViT.from_pretrained(folder, local_files_only=True)
    for name in ("class_names", "preprocessing"):
        if getattr(model, name) is None:
            raise TrainingError(f"{folder}: {name} is null in {ADAPTER_FILE}: expected it from save_pretrained")
    return Classifier(model, model.preprocessing or {}, model.class_names or [], exif_rotation=True)


class Prediction(NamedTuple):
    """The likeliest classes of an image file with their probabilities, likeliest first, or why it cannot be read."""

    file: str
    ranking: list[tuple[str, float]]
    error: str | None


def find_images(paths: Sequence[str]) -> list[str]:
    """The files among ``paths``, and the images in the folders among them, as ``image_files`` finds them.

    Raises:
        DataError: if a path does not exist, or a folder holds no image.
    """
    files: list[str] = []
    for path in map(Path, paths):
        found = image_files(path) if path.is_dir() else [str(path)]
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
        if not found:
            raise DataError(f"{path}: no image in this folder")
        files += found
    return files


def predict(
    run: str | Path, files: Sequence[str], top_k: int = 1, batch_size: int | None = None, workers: int | None = None
) -> Iterator[Prediction]:
    """Classify image files in their order, in fp32.

    Args:
        run: the run folder.
        top_k: the number of classes in each ranking; all if there are fewer.
        batch_size, workers: None for those of the run.

    Raises:
        TrainingError: if it is not a finished run.
    """
    recipe, model, preprocessing, names = load_run(run)
    classifier = Classifier(model, preprocessing, names, recipe.exif_rotation)
    images = _ReadableImages(classifier.images(files))
    workers = recipe.workers if workers is None else workers
    for batch in DataLoader(images, batch_size or recipe.batch_size, num_workers=workers, collate_fn=list):
        readable = [image for _, image, _ in batch if image is not None]
        rankings = iter(classifier.rank(classifier.logits(torch.stack(readable)), top_k) if readable else ())
        for file, image, error in batch:
            yield Prediction(file, [] if image is None else next(rankings), error)


class _ReadableImages(Dataset):
    """Items (file, image [3, H, W], None), or (file, None, error message) if the image cannot be read."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[str, Tensor | None, str | None]:
        file = self.images.name(index)
        try:
            return file, self.images[index][0], None
        except DataError as error:
            return file, None, str(error)
