"""Test-time augmentation: a model asked about several views of an image."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["FlipAverage", "with_tta"]


class FlipAverage(nn.Module):
    """The mean of a model's logits for an image and for its mirror image, [B, C, H, W] -> [B, classes].

    Logits are averaged and not probabilities, because then the result is logits again: softmax, sigmoid, thresholds
    and losses apply to them as to the model's own. Their softmax is the geometric mean of both probabilities, scaled
    to a sum of 1. They are averaged in fp32, in whatever precision the model computes.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return (self.model(images).float() + self.model(images.flip(-1)).float()) / 2


def with_tta(model: nn.Module, tta: str) -> nn.Module:
    """The model itself for ``none``, or a ``FlipAverage`` of it for ``flip``."""
    return {"none": lambda: model, "flip": lambda: FlipAverage(model)}[tta]()
