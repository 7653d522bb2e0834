"""How an official training part is divided into train and val: one seeded permutation, or the first four fifths."""

from __future__ import annotations

import numpy as np

__all__ = ["describe", "divide"]

PARTS = {"90/10": (9, 10), "80/20": (4, 5), "first 80 %": (4, 5)}  # of the images stay in train, rounded down


def divide(rule: str, count: int, seed: int) -> tuple[list[int], list[int]]:
    """The indices of train and of val, each in rising order; together every index below ``count``, each once."""
    order = np.arange(count)
    if not rule.startswith("first"):
        # RandomState: unlike numpy's newer generators its numbers are promised to stay the same
        order = np.random.RandomState(seed).permutation(count)
    numerator, denominator = PARTS[rule]
    kept = count * numerator // denominator
    return sorted(order[:kept].tolist()), sorted(order[kept:].tolist())


def describe(protocol: str, rule: str, seed: int) -> str:
    """What a result says about its splits."""
    if rule == "official":
        return f"{protocol}: the official train, val and test"
    if rule.startswith("first"):
        return f"{protocol}: train is the first 80 % of the official training images, val the rest; official test"
    also = ", where the authors' code draws two that overlap" if protocol == "released" and rule == "80/20" else ""
    how = f"train/val {rule} of the official training images by one permutation, seed {seed}{also}"
    return f"{protocol}: {how}; official test"
