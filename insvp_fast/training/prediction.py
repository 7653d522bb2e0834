"""Classifying images with a trained model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from insvp_fast.data import transform_for
from insvp_fast.data.decode import read_image
from insvp_fast.data.images import Images
from insvp_fast.data.lists import escaped
from insvp_fast.data.transforms import Transform
from insvp_fast.errors import DataError, TrainingError
from insvp_fast.probabilities import finite_probabilities
from insvp_fast.training.accelerator import create_accelerator
from insvp_fast.training.load import Run, load_run
from insvp_fast.training.tta import with_tta

__all__ = ["Classifier", "Prediction", "load_classifier", "predict"]

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Classifier:
    """A trained model on this machine's device, with the preparation of its images and its class names.

    Args:
        run: a loaded run or adapter.
        tta: as in ``with_tta``.
        amp: the precision, as ``resolve_amp`` returns it; the weights stay in fp32.
        source: what an error calls it.

    Raises:
        TrainingError: if there are no class names.
    """

    def __init__(self, run: Run, tta: str = "none", amp: str = "off", source: object = "the adapter") -> None:
        if run.class_names is None:
            raise TrainingError(f"{source} records no class names: expected `class_names`, one for each class")
        self.device, self._dtype = create_accelerator(amp).device, AMP.get(amp)
        self.model = with_tta(run.model, tta).to(self.device).float()
        self.class_names = list(map(escaped, run.class_names))
        self.exif_rotation, self.multi_label = run.model.exif_rotation, run.model.multi_label
        self.image_shape = tuple(run.preprocessing["input_size"])
        self.transform = transform_for(run.preprocessing)

    def images(self, files: Sequence[str | Path | BinaryIO], max_pixels: int | None = None) -> Images:
        """The files as items (fp32 [3, H, W], -1); ``max_pixels`` as in ``read_image``."""
        return Images(files, [-1] * len(files), self.transform, self.exif_rotation, max_pixels)

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """fp32 [B, classes] on the CPU, of images fp32 [B, 3, H, W]."""
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype is not None):
            return self.model(images.to(self.device)).float().cpu()

    def rank(self, logits: Tensor, top_k: int) -> list[list[tuple[str, float]]]:
        """The likeliest ``top_k`` classes of each row with their probabilities, likeliest first; all if fewer.

        Raises:
            TrainingError: as ``finite_probabilities``.
        """
        values, classes = finite_probabilities(logits, self.multi_label).topk(min(top_k, len(self.class_names)))
        rows = zip(classes.tolist(), values.tolist(), strict=True)
        return [[(self.class_names[index], value) for index, value in zip(*row, strict=True)] for row in rows]


def load_classifier(
    source: str | Path, backbone: str | None = None, class_names: Sequence[str] | None = None
) -> Classifier:
    """The classifier of a run or an adapter; arguments and errors are those of ``load_run``.

    Raises:
        TrainingError: if an adapter records no class names and none are given.
    """
    # which of several models that are served an error is about
    return Classifier(load_run(source, backbone, class_names), source=source)


class Prediction(NamedTuple):
    """The likeliest classes of an image file with their probabilities, likeliest first, or why it cannot be read."""

    file: str
    ranking: list[tuple[str, float]]
    error: str | None


def predict(
    classifier: Classifier, files: Iterable[str], top_k: int = 1, batch_size: int = 32, workers: int = 0
) -> Iterator[Prediction]:
    """Classify image files in their order; there may be any number of them.

    At most ``2 * workers + 1`` batches of images are in memory.

    Args:
        top_k: the number of classes in each ranking; all if there are fewer.
        batch_size: images computed together; with another one the last bits may differ.
        workers: processes that read images; with 0 this one does.

    Raises:
        ValueError: for files that are one text, or a ``top_k`` or ``batch_size`` below 1.
    """
    if isinstance(files, str):
        raise ValueError(f"files={files!r}: expected a list of files")
    for name, value in (("top_k", top_k), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value}: expected an integer of at least 1")
    images = _ReadableImages(classifier.transform, classifier.exif_rotation)
    loader = DataLoader(images, batch_sampler=_batches(files, batch_size), num_workers=workers, collate_fn=_collate)
    for names, errors, readable in loader:
        rankings = iter(() if readable is None else classifier.rank(classifier.logits(readable), top_k))
        for file, error in zip(names, errors, strict=True):
            yield Prediction(file, next(rankings) if error is None else [], error)


def _batches(files: Iterable[str], size: int) -> Iterator[list[str]]:
    files = iter(files)
    while batch := list(islice(files, size)):
        yield batch


class _ReadableImages(Dataset):
    """By path: (file, None, image [3, H, W]), or (file, error message, None) if the image cannot be read."""

    def __init__(self, transform: Transform, exif_rotation: bool) -> None:
        self.transform, self.exif_rotation = transform, exif_rotation

    def __getitem__(self, file: str) -> tuple[str, str | None, Tensor | None]:
        try:
            return file, None, self.transform(read_image(file, exif_rotation=self.exif_rotation))
        except DataError as error:
            return file, str(error), None


def _collate(
    items: Sequence[tuple[str, str | None, Tensor | None]],
) -> tuple[tuple[str, ...], tuple[str | None, ...], Tensor | None]:
    """Files, errors, and the readable images [n, 3, H, W], or None if there are none."""
    files, errors, images = zip(*items, strict=True)
    readable = [image for image in images if image is not None]
    return files, errors, torch.stack(readable) if readable else None
