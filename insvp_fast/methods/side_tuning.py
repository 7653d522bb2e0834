"""Side-tuning (Zhang et al., ECCV 2020): a small network beside the backbone."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from insvp_fast.methods.checks import require_each_at_least
from insvp_fast.methods.tuning import Tuning
from insvp_fast.reference.structure import pixel_layer

__all__ = ["SideTuning"]


class SideTuning(Tuning):
    """σ(a)·B(x) + (1 - σ(a))·S(x): the features of the frozen backbone B and of a trained side network S, blended.

    S is a convolution of 3x3 with stride 2 and a ReLU for each of ``channels``, the mean over all places, and a linear
    layer to the width of B. The blend begins at a half.

    Raises:
        ValueError: without channels, or for a backbone that does not begin with a convolution.
    """

    def __init__(self, backbone: Any, *, channels: Sequence[int] = (32, 64, 128, 256)) -> None:
        super().__init__(backbone)
        pixels = pixel_layer(backbone)
        if not isinstance(pixels, nn.Conv2d):
            raise ValueError(f"sidetune in a {type(backbone).__name__}: expected a convolution that reads the image")
        require_each_at_least(1, channels=channels)
        if not channels:
            raise ValueError("channels is empty: expected at least one convolution")
        steps: list[nn.Module] = []
        for pair in itertools.pairwise([pixels.in_channels, *channels]):
            steps += [nn.Conv2d(*pair, kernel_size=3, stride=2, padding=1), nn.ReLU()]
        last = nn.Linear(channels[-1], backbone.head_hidden_size)
        self.side = nn.Sequential(*steps, nn.AdaptiveAvgPool2d(1), nn.Flatten(), last)
        self.alpha = nn.Parameter(torch.zeros(()))

    def combine(self, image: Tensor, features: Tensor) -> Tensor:
        """The blend, [B, D]."""
        alpha = self.alpha.sigmoid()
        return alpha * features + (1 - alpha) * self.side(image)

    def merged(self, backbone: nn.Module) -> nn.Module:
        """Not for this method.

        Raises:
            ValueError: always.
        """
        raise ValueError("a side network cannot be folded into the weights of a backbone")
