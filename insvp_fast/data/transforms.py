"""From a picture to what the model takes: on the CPU one by one, or for decoded images in batches on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision import transforms

from insvp_fast.checkpoints.released import RELEASED_PREPROCESSING

__all__ = ["Eval", "Train", "insvp_preprocessing", "stored_transform", "transform_for"]

Transform = Callable[[Image.Image], Tensor]

AUGMENTATIONS = ("timm", "crop", "none")


def insvp_preprocessing(size: int | Sequence[int] = 224) -> dict[str, Any]:
    """The preset ``insvp``: resize to 8/7 of the size, crop, ImageNet's mean and std; in training random crops, flips.

    At 224 that is resize 256, crop 224. ``size`` is the side, or (height, width).
    """
    height, width = (size, size) if isinstance(size, int) else size
    return RELEASED_PREPROCESSING | {"input_size": [3, height, width], "augmentation": "crop"}


def transform_for(preprocessing: dict[str, Any], training: bool = False) -> Transform:
    """From a PIL image to a normalised tensor [3, H, W].

    Args:
        preprocessing: arguments of ``timm.data.create_transform``, and ``augmentation``: what training does besides:
            ``timm``'s usual crops, flips and colors (the default), ``crop`` at random and flip, or ``none``.
    """
    augmentation = preprocessing.get("augmentation", "timm")
    if training and augmentation == "timm":
        return _timm_transform(preprocessing, is_training=True)
    plain = _timm_transform(preprocessing)
    if not training or augmentation == "none":
        return plain
    resize, crop, *rest = plain.transforms
    return transforms.Compose(
        [resize, transforms.RandomCrop(crop.size), transforms.RandomHorizontalFlip(), *rest],
    )


def stored_transform(preprocessing: dict[str, Any]) -> Transform:
    """From a PIL image to the uint8 tensor [3, h, w] of which every later crop is taken.

    It is resized and cropped in the centre. The margin h - H is a multiple of 4, so that the centre of what is stored
    is the centre of the whole image, exactly.
    """
    height, width = preprocessing["input_size"][-2:]
    resize, crop, *_ = _timm_transform(preprocessing).transforms
    steps = [resize, crop]
    if isinstance(crop, transforms.CenterCrop) and preprocessing.get("augmentation", "timm") != "none":
        part = preprocessing.get("crop_pct", 1.0)
        larger = [side + 4 * int((side / part - side) // 4) for side in (height, width)]
        steps = [resize, transforms.CenterCrop(larger)]
    return transforms.Compose([*steps, transforms.PILToTensor()])


class Eval:
    """uint8 [B, 3, h, w] on any device -> normalised fp32 [B, 3, H, W]: the centre, the bits of ``transform_for``."""

    def __init__(self, preprocessing: dict[str, Any]) -> None:
        self.size = tuple(preprocessing["input_size"][-2:])
        self.mean, self.std = (torch.tensor(preprocessing[key]).view(3, 1, 1) for key in ("mean", "std"))

    def __call__(self, images: Tensor) -> Tensor:
        top, left = ((whole - part) // 2 for whole, part in zip(images.shape[-2:], self.size, strict=True))
        return self.normalise(images[..., top : top + self.size[0], left : left + self.size[1]])

    def normalise(self, images: Tensor) -> Tensor:
        """In the order of ToTensor and Normalize, so that no bit differs."""
        mean, std = self.mean.to(images.device), self.std.to(images.device)
        return images.float().div_(255).sub_(mean).div_(std)


class Train(Eval):
    """uint8 [B, 3, h, w] on any device -> normalised fp32 [B, 3, H, W]: crops and flips at random, each image its own.

    Draws from the CPU's generator, whatever the device, so that a seed means the same everywhere.
    """

    def __call__(self, images: Tensor) -> Tensor:
        batch, (height, width) = len(images), self.size
        free = [whole - part + 1 for whole, part in zip(images.shape[-2:], self.size, strict=True)]
        corners = zip(*(torch.randint(count, (batch,)).tolist() for count in free), strict=True)
        flipped = (torch.rand(batch) < 0.5).nonzero().flatten().to(images.device)
        # slices and one copy: no element is addressed by an index, and nothing waits for the device
        crops = [image[:, y : y + height, x : x + width] for image, (y, x) in zip(images, corners, strict=True)]
        crop = torch.stack(crops) if crops else images[..., :height, :width]
        return self.normalise(crop.index_copy(0, flipped, crop.index_select(0, flipped).flip(3)))


def _timm_transform(preprocessing: dict[str, Any], is_training: bool = False) -> Any:
    wanted = {key: value for key, value in preprocessing.items() if key != "augmentation"}
    return create_transform(**wanted | {"input_size": tuple(wanted["input_size"])}, is_training=is_training)
