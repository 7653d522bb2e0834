"""From an image to the model's input: one by one on the CPU, or from cached pixels in batches on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision import transforms

from insvp_fast.config import RELEASED_PREPROCESSING

__all__ = [
    "EvalBatchTransform",
    "TrainBatchTransform",
    "Transform",
    "cache_transform",
    "insvp_preprocessing",
    "transform_for",
]

Transform = Callable[[Image.Image], Tensor]


def insvp_preprocessing(size: int | Sequence[int] = 224) -> dict[str, Any]:
    """The preset ``insvp``: resize to 8/7 of the size, crop, ImageNet's mean and std; random crops and flips to train.

    Args:
        size: the side, or (height, width); 224 means resize to 256 and crop 224.
    """
    height, width = (size, size) if isinstance(size, int) else size
    return RELEASED_PREPROCESSING | {"input_size": [3, height, width], "augmentation": "crop"}


def transform_for(preprocessing: dict[str, Any], training: bool = False) -> Transform:
    """The transform from a PIL image to a normalized fp32 tensor [3, H, W].

    Args:
        preprocessing: arguments of ``timm.data.create_transform``, and ``augmentation``, which training adds: ``timm``
            for timm's usual crops, flips and colors (the default), ``crop`` for random crops and flips, or ``none``.
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


def cache_transform(preprocessing: dict[str, Any]) -> Transform:
    """The transform from a PIL image to the uint8 tensor [3, h, w] that a cache stores and later crops are taken from.

    It resizes and crops the center. The margin h - H is a multiple of 4, so that the center crop of the stored pixels
    is exactly that of the whole image.
    """
    height, width = preprocessing["input_size"][-2:]
    resize, crop, *_ = _timm_transform(preprocessing).transforms
    steps = [resize, crop]
    if isinstance(crop, transforms.CenterCrop) and preprocessing.get("augmentation", "timm") != "none":
        fraction = preprocessing.get("crop_pct", 1.0)
        larger = [side + 4 * int((side / fraction - side) // 4) for side in (height, width)]
        steps = [resize, transforms.CenterCrop(larger)]
    return transforms.Compose([*steps, transforms.PILToTensor()])


class EvalBatchTransform:
    """The center crop of cached images, normalized: uint8 [B, 3, h, w] on any device -> fp32 [B, 3, H, W].

    The result is bit for bit that of ``transform_for``.
    """

    def __init__(self, preprocessing: dict[str, Any]) -> None:
        self.size = tuple(preprocessing["input_size"][-2:])
        self.mean, self.std = (torch.tensor(preprocessing[key]).view(3, 1, 1) for key in ("mean", "std"))

    def __call__(self, images: Tensor) -> Tensor:
        top, left = ((stored - side) // 2 for stored, side in zip(images.shape[-2:], self.size, strict=True))
        return self.normalize(images[..., top : top + self.size[0], left : left + self.size[1]])

    def normalize(self, images: Tensor) -> Tensor:
        """Scale by 255, mean and std, in the order of torchvision's ToTensor and Normalize, so that no bit differs."""
        mean, std = self.mean.to(images.device), self.std.to(images.device)
        return images.float().div_(255).sub_(mean).div_(std)


class TrainBatchTransform(EvalBatchTransform):
    """Random crops and flips of cached images, normalized: uint8 [B, 3, h, w] on any device -> fp32 [B, 3, H, W].

    Each image has its own crop. The random numbers are the CPU generator's, whatever the device, so that a seed gives
    the same crops everywhere.
    """

    def __call__(self, images: Tensor) -> Tensor:
        batch, (height, width) = len(images), self.size
        places = [stored - side + 1 for stored, side in zip(images.shape[-2:], self.size, strict=True)]
        corners = zip(*(torch.randint(count, (batch,)).tolist() for count in places), strict=True)
        flipped = (torch.rand(batch) < 0.5).nonzero().flatten().to(images.device)
        # slices and one copy, because indexing by tensors is slower and waits for the device
        crops = [image[:, y : y + height, x : x + width] for image, (y, x) in zip(images, corners, strict=True)]
        crop = torch.stack(crops) if crops else images[..., :height, :width]
        return self.normalize(crop.index_copy(0, flipped, crop.index_select(0, flipped).flip(3)))


def _timm_transform(preprocessing: dict[str, Any], is_training: bool = False) -> Any:
    arguments = {key: value for key, value in preprocessing.items() if key != "augmentation"}
    return create_transform(**arguments | {"input_size": tuple(arguments["input_size"])}, is_training=is_training)
