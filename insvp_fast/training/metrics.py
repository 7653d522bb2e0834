"""How well a trained model classifies: accuracies and the confusion matrix, over all processes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from insvp_fast.training.loader import Loader

__all__ = ["Metrics", "compute_metrics", "evaluate_accuracy", "metrics_from_confusion"]


class Metrics(NamedTuple):
    """Accuracies in [0, 1] on the images of a data set."""

    top1: float
    top5: float  # with fewer than five classes, over all of them
    mean_per_class: float  # the mean of the classes' accuracies, over the classes that have images
    per_class: list[float | None]  # None for a class without images
    confusion: Tensor  # [true class, predicted class], int64: numbers of images

    @property
    def images(self) -> int:
        """The number of images."""
        return int(self.confusion.sum())


@torch.inference_mode()
def compute_metrics(
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], num_classes: int, accelerator: Accelerator
) -> Metrics:
    """Evaluate a model on all batches (images, classes) of a loader; each is evaluated in one of the processes."""
    model = model.to(accelerator.device).eval()
    confusion = torch.zeros(num_classes**2, dtype=torch.int64, device=accelerator.device)
    top5_hits = torch.zeros((), dtype=torch.int64, device=accelerator.device)
    for images, classes in loader:
        predicted = model(images).topk(min(5, num_classes)).indices
        confusion += torch.bincount(classes * num_classes + predicted[:, 0], minlength=num_classes**2)
        top5_hits += (predicted == classes[:, None]).any(1).sum()
    confusion, top5_hits = accelerator.reduce((confusion, top5_hits))
    return metrics_from_confusion(confusion.view(num_classes, num_classes).cpu(), int(top5_hits))


def metrics_from_confusion(confusion: Tensor, top5_hits: int) -> Metrics:
    """All metrics, from a confusion matrix and the number of images with their class among the five likeliest."""
    images, hits = confusion.sum(1), confusion.diagonal().double()
    total, present = max(1, int(images.sum())), images > 0
    accuracies = hits / images.clamp(min=1)
    mean = accuracies[present].mean().item() if present.any() else 0.0
    per_class = [value if there else None for value, there in zip(accuracies.tolist(), present.tolist(), strict=True)]
    return Metrics(hits.sum().item() / total, top5_hits / total, mean, per_class, confusion)


@torch.inference_mode()
def evaluate_accuracy(model: nn.Module, loader: Loader, accelerator: Accelerator) -> float:
    """The top-1 accuracy in [0, 1]; each image is evaluated in one of the processes."""
    # DDP's forward would wait for the processes that have fewer batches
    model = accelerator.unwrap_model(model).eval()
    hits = [(model(images).argmax(1) == classes).sum() for images, classes in loader]
    total = int(torch.stack(hits).sum()) if hits else 0
    return sum(gather_object([total])) / loader.sampler.num_images
