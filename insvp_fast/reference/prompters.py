"""The prompters: the networks that make prompts from an image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from insvp_fast.config import InsVPConfig
from insvp_fast.reference.images import crop_center, fold, pool_center, unfold

__all__ = ["GlobalPrompter", "PatchPrompter", "PyramidPrompter", "SpecificPrompter"]


class GlobalPrompter(nn.Module):
    """G_g: two dilated convolutions with a ReLU between, dropout after (eq. 4). [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, channels: int, config: InsVPConfig) -> None:
        super().__init__()
        (k1, k2), (d1, d2) = config.global_kernels, config.global_dilations
        self.conv1 = nn.Conv2d(channels, config.global_hidden, k1, padding="same", dilation=d1)
        self.conv2 = nn.Conv2d(config.global_hidden, channels, k2, padding="same", dilation=d2)
        self.dropout = nn.Dropout(config.global_dropout)

    def forward(self, image: Tensor) -> Tensor:
        return self.dropout(self.conv2(self.conv1(image).relu()))


class PatchPrompter(nn.Module):
    """G_l: two fully connected layers with a ReLU between, on every patch (eq. 5). [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, channels: int, patch_size: int, config: InsVPConfig) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.fc1 = nn.Linear(channels * patch_size**2, config.patch_hidden)
        self.fc2 = nn.Linear(config.patch_hidden, channels * patch_size**2)
        self.dropout = nn.Dropout(config.patch_dropout)

    def forward(self, image: Tensor) -> Tensor:
        patches = self.fc2(self.fc1(unfold(image, self.patch_size)).relu())
        return self.dropout(fold(patches, self.patch_size, *image.shape[-2:]))


class SpecificPrompter(nn.Module):
    """G_s: three convolutions with pooling between that make L tokens from an image (eq. 9). [B, C, H, W] -> [B, L, D].

    The paper reshapes [c·L, grid, grid] to [L, D], which needs D = c·grid². Its own case is c = 3 and grid = P = 16;
    for other widths c and grid come from ``token_grid``. The first pooling, to 3·grid + 4, has the largest windows that
    fit on the center of the image (on a smaller image they overlap), the second has windows of 3 on the center of the
    map. For 224 pixels, P = 16 and D = 768 all sizes are those of the authors' release.
    """

    def __init__(self, channels: int, patch_size: int, embed_dim: int, config: InsVPConfig) -> None:
        super().__init__()
        self.token_channels, self.grid = self.token_grid(embed_dim, patch_size)
        L, (k1, k2, k3) = config.prompt_length, config.specific_kernels
        self.conv1 = nn.Conv2d(channels, L, k1, padding="same")
        self.conv2 = nn.Conv2d(L, self.token_channels * L, k2, padding="same")
        self.conv3: nn.Module = nn.Conv2d(self.token_channels * L, self.token_channels * L, k3, padding="same")
        self.dropout = nn.Dropout(config.specific_dropout)

    @staticmethod
    def token_grid(embed_dim: int, patch_size: int) -> tuple[int, int]:
        """(c, grid) with c·grid² = D, where grid is the possible value nearest to the patch size."""
        fits = [grid for grid in range(1, embed_dim + 1) if embed_dim % grid**2 == 0]
        grid = min(fits, key=lambda grid: (abs(grid - patch_size), -grid))
        return embed_dim // grid**2, grid

    def trunk(self, image: Tensor) -> Tensor:
        """All before the last convolution, [B, c·L, grid, grid]."""
        x = pool_center(F.leaky_relu(self.conv1(image)), 3 * self.grid + 4)
        x = F.leaky_relu(self.conv2(self.dropout(x)))
        x = F.max_pool2d(crop_center(x, 3 * self.grid, 3 * self.grid), 3)
        return self.dropout(x)

    def forward(self, image: Tensor) -> Any:  # a PyramidPrompter returns several tensors
        B, L, D = image.shape[0], self.conv1.out_channels, self.token_channels * self.grid**2
        tokens: Tensor = self.conv3(self.trunk(image)).reshape(B, L, D)
        return tokens


class PyramidPrompter(SpecificPrompter):
    """G_s for a backbone of several widths: one trunk, and a last convolution for each width.

    [B, C, H, W] -> [B, L, D] for each D of ``widths``. The grid is the possible value nearest to the paper's 16 that
    fits all widths.
    """

    def __init__(self, channels: int, widths: Sequence[int], config: InsVPConfig) -> None:
        common = math.gcd(*widths)
        super().__init__(channels, 16, common, config)
        self.widths, C, kernel = tuple(widths), self.conv2.out_channels, config.specific_kernels[2]
        self.conv3 = nn.ModuleList(nn.Conv2d(C, width // common * C, kernel, padding="same") for width in widths)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        x = self.trunk(image)
        shapes = [(image.shape[0], self.conv1.out_channels, width) for width in self.widths]
        return tuple(conv(x).reshape(shape) for conv, shape in zip(self.conv3.children(), shapes, strict=True))
