"""Functions of images that the equations use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["crop_center", "fold", "normalize", "pixel_scale", "pool_center", "simam", "unfold"]


def unfold(image: Tensor, patch_size: int) -> Tensor:  # [B, C, H, W] -> [B, N, K]
    """Cut an image into patches, row by row, each flattened as channel, row, column.

    Raises:
        ValueError: if the patches do not fill it.
    """
    B, C, H, W = image.shape
    P = patch_size
    if H % P or W % P:
        raise ValueError(f"image has {H}x{W} pixels: expected multiples of the patch size {P}")
    return (
        image.reshape(B, C, H // P, P, W // P, P).permute(0, 2, 4, 1, 3, 5).reshape(B, (H // P) * (W // P), C * P * P)
    )


def fold(patches: Tensor, patch_size: int, height: int, width: int) -> Tensor:  # [B, N, K] -> [B, C, H, W]
    """The inverse of ``unfold``."""
    B, _, K = patches.shape
    P = patch_size
    C = K // (P * P)
    return patches.reshape(B, height // P, width // P, C, P, P).permute(0, 3, 1, 4, 2, 5).reshape(B, C, height, width)


def normalize(image: Tensor, scale: Tensor, shift: Tensor) -> Tensor:  # [B, C, H, W], uint8
    """The values u·scale + shift that an 8-bit image stands for; both [C], the dataset's mean and deviation in them."""
    return image.to(scale.dtype) * scale[:, None, None] + shift[:, None, None]


def pixel_scale(mean: Sequence[float], std: Sequence[float], device: torch.device) -> tuple[Tensor, Tensor]:
    """The scale and shift of ``normalize``, [C] each, for the mean and deviation of a data set."""
    center, deviation = (torch.tensor(values, dtype=torch.float32, device=device) for values in (mean, std))
    return 1 / (255 * deviation), -center / deviation


def simam(image: Tensor) -> Tensor:  # [B, C, H, W]
    """Weigh each pixel by its SimAM energy, the parameter-free attention of the authors' release."""
    H, W = image.shape[-2:]
    deviation = (image - image.mean(dim=(2, 3), keepdim=True)).square()
    energy = deviation / (4 * (deviation.sum(dim=(2, 3), keepdim=True) / (H * W - 1) + 1e-3)) + 0.5
    return image * energy.sigmoid()


def pool_center(x: Tensor, size: int) -> Tensor:
    """Max-pool to ``size`` x ``size`` with the largest equal windows that fit on the center of a map."""
    H, W = (side // size * size or side for side in x.shape[-2:])
    return F.adaptive_max_pool2d(crop_center(x, H, W), size)


def crop_center(x: Tensor, height: int, width: int) -> Tensor:
    """The central ``height`` x ``width`` of the last two dimensions."""
    top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
    return x[..., top : top + height, left : left + width]
