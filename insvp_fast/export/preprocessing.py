"""The preprocessing of images as a module of standard operators: 8-bit images in, the model's input out.

Pillow resizes along one axis at a time. The weight of an input pixel is a filter of its distance, rounded to 22 binary
digits, and after each axis the pixels are rounded to 8 bits. Here each axis is one product with the matrix of those
weights, of which only the rows inside the crop are made. In fp64 all products and sums are exact, so that the pixels
are Pillow's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import PIL
import torch
from timm.data.transforms import CenterCropOrPad, MaybeToTensor
from torch import Tensor, nn
from torchvision import transforms

from insvp_fast.data.transforms import steps_of, transform_for
from insvp_fast.errors import ExportError

__all__ = ["ExportedPreprocessing", "image_steps", "resize_reason"]

ONE = 2**22  # Pillow's weights are integers, multiples of its inverse


def _bilinear(distance: Tensor) -> Tensor:
    return (1 - distance).clamp(min=0)


def _bicubic(distance: Tensor) -> Tensor:
    """Keys' cubic convolution with a = -1/2."""
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((2.5 - 0.5 * distance) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))


# Pillow 13 begins with the columns if they shrink by more than twice what the rows do; earlier ones never do.
BEGINS_WITH_THE_LARGER_REDUCTION = int(PIL.__version__.partition(".")[0]) >= 13

# by Pillow's names: the filter, and the distance from which on it is zero
FILTERS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {"bilinear": (_bilinear, 1), "bicubic": (_bicubic, 2)}


def image_steps(preprocessing: dict[str, Any]) -> list[Any]:
    """The steps of ``transform_for`` from an image to one of the model's size, before its tensor and normalization.

    Raises:
        ExportError: if it has other steps after them, or none that makes images of one size.
    """
    steps = steps_of(transform_for(preprocessing))
    kinds = [*map(type, steps[-3:])]
    if kinds[1:] != [MaybeToTensor, transforms.Normalize] or kinds[0] not in (transforms.CenterCrop, CenterCropOrPad):
        found = ", ".join(type(step).__name__ for step in steps)
        raise ExportError(f"the steps of the preprocessing are {found}: expected to resize, crop, ToTensor, Normalize")
    return steps[:-2]


def resize_reason(preprocessing: dict[str, Any]) -> str | None:
    """Why the resizing and cropping cannot be part of an exported file, or None."""
    resize, *_, crop = steps = image_steps(preprocessing)
    if [*map(type, steps)] != [transforms.Resize, transforms.CenterCrop]:
        return f"it is {' and '.join(type(step).__name__ for step in steps)}: expected Resize and CenterCrop"
    if resize.interpolation.value not in FILTERS:
        return f"its interpolation is {resize.interpolation.value}: expected {' or '.join(FILTERS)}"
    if any(side < cropped for side, cropped in zip(_pair(resize.size), crop.size, strict=True)):
        return f"it crops {crop.size} pixels out of {resize.size}"
    return None


class ExportedPreprocessing(nn.Module):
    """What ``transform_for`` does to images, as a module: 8-bit images in, normalized fp32 images [B, 3, H, W] out.

    Args:
        preprocessing: arguments of ``timm.data.create_transform``.
        resize: resize and crop images of any size, for which ``resize_reason`` must be None; otherwise only normalize.
        channels_last: images are [B, H, W, 3] rather than [B, 3, H, W].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, preprocessing: dict[str, Any], resize: bool, channels_last: bool) -> None:
        super().__init__()
        steps = image_steps(preprocessing)
        self.channels_last, self.resize = channels_last, resize
        if resize:
            resizing, crop = steps
            self.size, self.crop, self.filter = resizing.size, crop.size, resizing.interpolation.value
        for name in ("mean", "std"):  # one value, or one a channel
            self.register_buffer(name, torch.tensor(preprocessing[name]).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        images = images.permute(0, 3, 1, 2) if self.channels_last else images
        if self.resize:
            images = self._resize(images.double())
        return (images.float() / 255 - self.mean) / self.std

    def _resize(self, pixels: Tensor) -> Tensor:
        # numbers as tensors, so that in an exported file the size of the images stays open
        height, width = (pixels.new_full((), side) for side in pixels.shape[-2:])
        if isinstance(self.size, int):  # of the shorter side
            new_height, new_width = (
                (self.size * side / torch.minimum(height, width)).floor() for side in (height, width)
            )
        else:
            new_height, new_width = (pixels.new_full((), side) for side in self.size)
        y, x = (torch.arange(side, dtype=pixels.dtype, device=pixels.device) for side in pixels.shape[-2:])
        vertical = self._matrix(y, height / new_height, new_height, self.crop[0])
        horizontal = self._matrix(x, width / new_width, new_width, self.crop[1]).mT
        resized = _round(vertical @ _round(pixels @ horizontal))
        if not BEGINS_WITH_THE_LARGER_REDUCTION:
            return resized
        tall = height - new_height > 2 * (width - new_width).clamp(min=0)
        return torch.where(tall, _round(_round(vertical @ pixels) @ horizontal), resized)

    def _matrix(self, positions: Tensor, scale: Tensor, resized: Tensor, cropped: int) -> Tensor:
        """The weights [cropped, side] of the pixels along one axis, whose ``resized`` pixels are cropped."""
        weigh, radius = FILTERS[self.filter]
        stretch = scale.clamp(min=1)
        kept = torch.arange(cropped, dtype=positions.dtype, device=positions.device)[:, None]
        centers = (((resized - cropped) / 2).round() + kept + 0.5) * scale
        inside = (positions >= (centers - radius * stretch + 0.5).floor()) & (
            positions < (centers + radius * stretch + 0.5).floor()
        )
        weights = torch.where(inside, weigh(((positions + 0.5 - centers) * (1 / stretch)).abs()), 0.0)
        weights = weights / weights.sum(1, keepdim=True) * ONE
        return weights.sign() * (weights.abs() + 0.5).floor()


def _round(sums: Tensor) -> Tensor:
    """Sums of pixels times integer weights, to pixels."""
    return ((sums + ONE // 2) / ONE).floor().clamp(0, 255)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size
