"""How good a trained model is, in figures: top-1, top-5, the mean over the classes, and the confusion matrix."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from insvp_fast.data import load_test_data
from insvp_fast.training.device import start
from insvp_fast.training.folders import read_config
from insvp_fast.training.order import Loader, loader_for
from insvp_fast.training.run import load_run

__all__ = ["Figures", "evaluate_run", "measure"]


class Figures(NamedTuple):
    """Shares in [0, 1] of the images whose class was found."""

    top1: float
    top5: float  # the class is among the five likeliest, or among all where there are fewer
    mean_per_class: float  # of top1, every class with images counting the same
    per_class: list[float | None]  # None for a class without images
    confusion: Tensor  # [classes, classes], int64: images of the row's class that were taken for the column's

    @property
    def images(self) -> int:
        return int(self.confusion.sum())


def evaluate_run(
    run: str | Path,
    data: str | None = None,
    root: str | None = None,
    batch_size: int | None = None,
    workers: int | None = None,
) -> tuple[dict[str, Any], Figures, bool]:
    """Test the model of a run, in fp32, on its own test data or on others with the same classes.

    Args:
        run: the run folder.
        data, root: other data, as in ``Recipe``; None for the run's own.
        batch_size, workers: None for those of the run.

    Returns:
        What was tested on what, the figures, and whether this is the process that reports them.

    Raises:
        TrainingError: if it is not a finished run, or the data are not there or have other classes.
    """
    accelerator = start()
    recipe, model, preprocessing, names = load_run(run)
    source, root = data or recipe.data, root or (recipe.root if data in (None, recipe.data) else None)
    tested = load_test_data(source, preprocessing, recipe.seed, names, root=root, exif_rotation=recipe.exif_rotation)
    workers = recipe.workers if workers is None else workers
    how = dataclasses.replace(recipe, batch_size=batch_size or recipe.batch_size, workers=workers)
    figures = measure(model, loader_for(tested, how, accelerator), len(names), accelerator)
    facts = {"run": str(run), "data": source, "root": root, "protocol": recipe.protocol, "class_names": names}
    facts |= {"tested_on": read_config(run)[1]["tested_on"]} if data is None else {}
    return facts, figures, accelerator.is_main_process


@torch.inference_mode()
def measure(model: nn.Module, loader: Loader, num_classes: int, accelerator: Accelerator) -> Figures:
    """Put all images through the model; each counts once, whoever of several processes looks at it."""
    model = model.to(accelerator.device).eval()
    confusion = torch.zeros(num_classes**2, dtype=torch.int64, device=accelerator.device)
    among_five = torch.zeros((), dtype=torch.int64, device=accelerator.device)
    for images, classes in loader:
        likeliest = model(images).topk(min(5, num_classes)).indices
        confusion += torch.bincount(classes * num_classes + likeliest[:, 0], minlength=num_classes**2)
        among_five += (likeliest == classes[:, None]).any(1).sum()
    confusion, among_five = accelerator.reduce((confusion, among_five))
    return figures_of(confusion.view(num_classes, num_classes).cpu(), int(among_five))


def figures_of(confusion: Tensor, among_five: int) -> Figures:
    """All figures, from a confusion matrix and the number of images whose class is among the five likeliest."""
    images, found = confusion.sum(1), confusion.diagonal().double()
    total, present = max(1, int(images.sum())), images > 0
    shares = found / images.clamp(min=1)
    mean = shares[present].mean().item() if present.any() else 0.0
    per_class = [share if there else None for share, there in zip(shares.tolist(), present.tolist(), strict=True)]
    return Figures(found.sum().item() / total, among_five / total, mean, per_class, confusion)
