"""The training loss of a batch: with mixing, label smoothing and class weights, for one label per image or several."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor

from insvp_fast.training.recipe import Recipe

__all__ = ["Loss", "plain_loss"]


class Loss:
    """Mixes a batch, and gives the sum of its images' losses.

    With one label per image it is the cross-entropy. With several, it is the mean over the classes of the binary
    cross-entropy, and smoothing by s moves every target y to (1 - s) y + s / 2, as timm does. A class weight multiplies
    the class's term of the cross-entropy, or the positive one of the binary cross-entropy.

    Args:
        weights: of the classes, [classes], on the device; None for 1.
        multi_label: whether targets are multi-hot, fp32 [B, classes].
    """

    def __init__(self, recipe: Recipe, num_classes: int, weights: Tensor | None = None, multi_label: bool = False):
        self.weights, self.multi_label, self.smoothing = weights, multi_label, recipe.label_smoothing
        self.mixup = None
        if recipe.mixup or recipe.cutmix:
            self.mixup = Mixup(
                recipe.mixup,
                recipe.cutmix,
                prob=recipe.mix_prob,
                label_smoothing=recipe.label_smoothing,
                num_classes=num_classes,
                multi_label=multi_label,
            )

    def mix(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, float]:
        """The images, mixed, which may be in place; their targets; and the label smoothing that is left to do."""
        if self.mixup is None:
            return images, targets, self.smoothing
        count = len(images)
        if count % 2:  # timm mixes pairs: the last image is taken twice, and its copy dropped afterwards
            images, targets = (torch.cat([part, part[-1:]]) for part in (images, targets))
        images, targets = self.mixup(images, targets)  # it smooths the targets itself
        return images[:count], targets[:count], 0.0

    def __call__(self, logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """The sum over the batch, of logits [B, classes] and targets as ``mix`` returns them."""
        if not self.multi_label:
            return F.cross_entropy(logits, targets, self.weights, reduction="sum", label_smoothing=smoothing)
        smoothed = targets * (1 - smoothing) + smoothing / 2
        return _binary_cross_entropy(logits, smoothed, self.weights)


def plain_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum of the images' losses without smoothing and weights, by which models are compared."""
    if targets.ndim == 1:
        return F.cross_entropy(logits, targets, reduction="sum")
    return _binary_cross_entropy(logits, targets)


def _binary_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    total = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights, reduction="sum")
    return total / logits.shape[1]
