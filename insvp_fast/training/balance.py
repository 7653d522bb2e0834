"""Classes that have few images: weights of the loss, and the order of an epoch in which all are equally likely."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

__all__ = ["balanced_order", "class_weights", "targets_of"]


def targets_of(dataset: Dataset) -> Tensor:
    """The targets of all items, without decoding an image: class indices [N], or multi-hot [N, classes]."""
    if isinstance(dataset, Subset):
        return targets_of(dataset.dataset)[torch.as_tensor(dataset.indices, dtype=torch.int64)]
    if isinstance(dataset, ConcatDataset):
        return torch.cat([targets_of(part) for part in dataset.datasets])
    classes = dataset.classes  # type: ignore[attr-defined]  # all data sets of insvp_fast.data have them
    return classes if isinstance(classes, Tensor) else torch.as_tensor(classes)


def class_weights(targets: Tensor, num_classes: int) -> Tensor:
    """The inverse frequency of each class, with a mean of 1 over the images: w_c = N / (C n_c), fp32 [classes].

    N is the number of images, n_c that of class c, and C the number of classes that have any; a class without images
    weighs 1. Of multi-hot targets, labels are counted instead of images.
    """
    counts = targets.sum(0) if targets.ndim == 2 else targets.bincount(minlength=num_classes)
    present = counts > 0
    weights = counts.sum() / (present.sum() * counts.clamp(min=1)).double()
    return torch.where(present, weights, 1.0).float()


def balanced_order(targets: Tensor, generator: torch.Generator) -> list[tuple[int, int]]:
    """As many draws as there are images, equally many of every class that has any, in a random order.

    Where they do not divide, random classes get one more. A class is drawn from without replacement until it is used
    up, then again, so that its images differ by at most one draw.

    Args:
        targets: the class of each image, [N].

    Returns:
        (index, how often it was drawn before) of each draw.
    """
    classes = targets.unique()
    classes = classes[torch.randperm(len(classes), generator=generator)]
    draws: list[tuple[int, int]] = []
    for rank, index in enumerate(classes):
        images = (targets == index).nonzero()[:, 0]
        wanted = len(targets) // len(classes) + (rank < len(targets) % len(classes))
        for repetition in range(-(-wanted // len(images))):
            order = images[torch.randperm(len(images), generator=generator)].tolist()
            draws += [(image, repetition) for image in order[: wanted - repetition * len(images)]]
    return [draws[i] for i in torch.randperm(len(draws), generator=generator).tolist()]
