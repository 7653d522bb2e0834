"""From an image to the model's input: timm's transforms, and the steps of them that are the same every time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image
from timm.data import create_transform
from timm.data.transforms import ResizeKeepRatio
from torch import Tensor
from torchvision import transforms

from insvp_fast.config import RELEASED_PREPROCESSING
from insvp_fast.data.sets import AUGMENTATIONS
from insvp_fast.errors import DataError

__all__ = [
    "Transform",
    "describe_augmentation",
    "insvp_preprocessing",
    "repeatable_steps",
    "require_arguments",
    "steps_of",
    "transform_for",
]

DEFAULT_AUGMENTATION = "insvp"
Transform = Callable[[Image.Image], Tensor]


def insvp_preprocessing(size: int | Sequence[int] = 224) -> dict[str, Any]:
    """The preset ``insvp``: resize to 8/7 of the size, crop, ImageNet's mean and std; random crops and flips to train.

    Args:
        size: the side, or (height, width); 224 means resize to 256 and crop 224.
    """
    height, width = (size, size) if isinstance(size, int) else size
    return RELEASED_PREPROCESSING | {"input_size": [3, height, width], "augmentation": "insvp"}


def transform_for(preprocessing: dict[str, Any], training: bool = False) -> Transform:
    """The transform from a PIL image to a normalized fp32 tensor [3, H, W].

    Args:
        preprocessing: arguments of ``timm.data.create_transform``, and ``augmentation``, which training adds: ``timm``
            for timm's crops of random area and aspect ratio, flips and colors; ``insvp`` (the default) for random crops
            of the image at 8/7 of the size, and flips; ``crop`` for random crops of the image as evaluation resizes it,
            and flips; ``none`` for evaluation's transform. Images are flipped with the probability ``hflip``, by
            default 0.5, with ``none`` 0.

    Raises:
        DataError: if there is no such augmentation, timm has no such transform, or ``crop`` has nothing to crop from.
    """
    require_arguments(preprocessing)
    augmentation = preprocessing.get("augmentation", DEFAULT_AUGMENTATION)
    if augmentation not in AUGMENTATIONS:
        raise DataError(f"`augmentation` is {augmentation}: expected one of {', '.join(AUGMENTATIONS)}")
    if not training:
        return _timm_transform(preprocessing)
    if augmentation == "timm":
        return _timm_transform(preprocessing, is_training=True)
    if augmentation == "insvp":
        preprocessing = preprocessing | {"crop_pct": RELEASED_PREPROCESSING["crop_pct"], "crop_mode": "center"}
    resize, crop, *rest = steps_of(_timm_transform(preprocessing))
    if augmentation == "crop" and preprocessing.get("crop_pct") == 1:
        raise DataError(
            "`augmentation` is crop: images are resized to the size of the model (crop_pct 1), which leaves nothing to"
            " crop: expected insvp, timm or none"
        )
    hflip = _hflip(preprocessing)
    flip = [transforms.RandomHorizontalFlip(hflip)] if hflip else []
    return transforms.Compose(
        [resize, crop if augmentation == "none" else transforms.RandomCrop(crop.size), *flip, *rest]
    )


def require_arguments(preprocessing: object) -> None:
    """Refuse what has no names, such as the None of a model that does not say how its images are prepared.

    Raises:
        DataError: naming it.
    """
    if not isinstance(preprocessing, Mapping):
        raise DataError(f"`preprocessing` is {preprocessing!r:.200}: expected arguments of timm.data.create_transform")


def describe_augmentation(preprocessing: dict[str, Any]) -> dict[str, Any]:
    """What training adds, ready for JSON: its ``augmentation`` and ``hflip``, and the ``steps`` of the transform."""
    steps = [repr(step) for step in steps_of(transform_for(preprocessing, training=True))]
    return {
        "augmentation": preprocessing.get("augmentation", DEFAULT_AUGMENTATION),
        "hflip": _hflip(preprocessing),
        "steps": steps,
    }


def steps_of(transform: Any) -> list[Any]:
    """The steps of a transform of ``transform_for``."""
    return list(transform.transforms)


def repeatable_steps(*of_images: Transform) -> list[Any]:
    """The first steps, which all these transforms share, that turn a PIL image into another, the same every time.

    A step that is not known to be such a one ends them.
    """
    shared = []
    for first, *others in zip(*map(steps_of, of_images), strict=False):
        if not _is_repeatable(first) or any(repr(other) != repr(first) for other in others):
            break
        shared.append(first)
    return shared


def _is_repeatable(step: Any) -> bool:
    if isinstance(step, ResizeKeepRatio):
        return not step.random_scale_prob and not step.random_aspect_prob
    return type(step) in (transforms.Resize, transforms.CenterCrop)


def _hflip(preprocessing: dict[str, Any]) -> float:
    return preprocessing.get("hflip", 0.0 if preprocessing.get("augmentation") == "none" else 0.5)


def _timm_transform(preprocessing: dict[str, Any], is_training: bool = False) -> Any:
    arguments = {key: value for key, value in preprocessing.items() if key != "augmentation"}
    try:
        return create_transform(**arguments | {"input_size": tuple(arguments["input_size"])}, is_training=is_training)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        expected = "arguments of timm.data.create_transform, input_size among them"
        raise DataError(f"images would be prepared by {preprocessing} ({error}): expected {expected}") from error
