"""Dividing images into train and val: official training splits by the rules of a protocol, others by class."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

__all__ = ["describe", "divide", "stratified_split", "three_way_split"]

KEPT = {"90/10": (9, 10), "80/20": (4, 5), "first 80 %": (4, 5)}  # the fraction that stays in train, rounded down


def divide(rule: str, count: int, seed: int) -> tuple[list[int], list[int]]:
    """Divide the indices 0 to ``count`` - 1 into those of train and those of val, both in rising order.

    Args:
        rule: ``90/10`` and ``80/20`` divide a random permutation of the images, ``first 80 %`` their order on disk.
    """
    order = np.arange(count)
    if not rule.startswith("first"):
        # RandomState: numpy promises that its numbers never change, unlike those of the newer generators
        order = np.random.RandomState(seed).permutation(count)
    numerator, denominator = KEPT[rule]
    kept = count * numerator // denominator
    return sorted(order[:kept].tolist()), sorted(order[kept:].tolist())


def describe(protocol: str, rule: str, seed: int) -> str:
    """Which splits a result was measured on, in words."""
    if rule == "official":
        return f"{protocol}: the official train, val and test"
    if rule.startswith("first"):
        return f"{protocol}: train is the first 80 % of the official training images, val the rest; official test"
    # a rule of the released protocol alone
    also = ", where the authors' code draws two that overlap" if rule == "80/20" else ""
    how = f"train/val {rule} of the official training images by one permutation, seed {seed}{also}"
    return f"{protocol}: {how}; official test"


def stratified_split(
    indices: Sequence[int], classes: Sequence[int] | np.ndarray | Tensor, fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Divide ``indices`` into the rest and a ``fraction`` of them, with the same fraction of every class.

    Args:
        classes: of all images, those that ``indices`` leave out too. Images with several labels, [N, classes], are
            divided at random.

    Raises:
        ValueError: if a class has too few images.
    """
    from sklearn.model_selection import train_test_split  # over a second

    labels = np.asarray(classes)[list(indices)]
    if labels.ndim > 1:
        return train_test_split(list(indices), test_size=fraction, random_state=seed)
    # at least one image per class on average, without which scikit-learn refuses: there are sets of five per class
    count = max(math.ceil(fraction * len(labels)), len(np.unique(labels)))
    return train_test_split(list(indices), test_size=count, stratify=labels, random_state=seed)


def three_way_split(classes: Sequence[int] | np.ndarray | Tensor, seed: int) -> tuple[list[int], list[int], list[int]]:
    """Divide images into train, val and test: 70 %, 10 % and 20 % of every class; errors as in ``stratified_split``."""
    rest, test = stratified_split(range(len(classes)), classes, 0.2, seed)
    train, val = stratified_split(rest, classes, 0.125, seed)
    return train, val, test
