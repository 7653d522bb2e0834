"""VP, visual prompting (Bahng et al., 2022): a frame of trained pixels around the image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from insvp_fast.methods.checks import require_at_least
from insvp_fast.reference import Geometry, PromptMethod

__all__ = ["VP"]


class VP(PromptMethod):
    """x~ = x + v, where v is trained on a frame along the border of the image, and zero within.

    Args:
        padding: the width of the frame in pixels; None for the paper's 30 of 224, in proportion to the shorter side.
            The image size is that for which the backbone was made.

    Raises:
        ValueError: if the frame is wider than half of the image.
    """

    def __init__(self, geometry: Geometry, *, padding: int | None = None) -> None:
        super().__init__(geometry)
        require_at_least(1, padding=padding)
        C, (H, W) = geometry.in_channels, geometry.fixed_image_size
        p = round(30 / 224 * min(H, W)) if padding is None else padding
        if not 1 <= p <= min(H, W) // 2:
            raise ValueError(f"padding={p}: expected 1 to {min(H, W) // 2}, half of a {H}x{W} image")
        self.top, self.bottom = (nn.Parameter(torch.randn(C, p, W)) for _ in range(2))
        self.left, self.right = (nn.Parameter(torch.randn(C, H - 2 * p, p)) for _ in range(2))

    def prompt_image(self, image: Tensor) -> tuple[Tensor, Any]:
        """x~, and no context.

        Raises:
            ValueError: for images of another size than the backbone was made for.
        """
        return image + self.canvas(image), None

    def canvas(self, image: Tensor) -> Tensor:
        """v, [C, H, W], for images [B, C, H, W].

        Raises:
            ValueError: for images of another size than the backbone was made for.
        """
        (H, W), p = self.geometry.fixed_image_size, self.top.shape[1]
        if image.shape[-2:] != (H, W):
            raise ValueError(f"image has shape {tuple(image.shape)}: expected {H}x{W} pixels, as the frame has")
        within = self.left.new_zeros(len(self.left), H - 2 * p, W - 2 * p)
        middle = torch.cat([self.left, within, self.right], dim=2)
        return torch.cat([self.top, middle, self.bottom], dim=1)
