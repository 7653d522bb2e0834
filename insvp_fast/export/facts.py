"""What an exported file says of itself besides its graph, in every format: class names, preprocessing, input."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from insvp_fast.data.decode import to_rgb
from insvp_fast.data.transforms import transform_for
from insvp_fast.errors import CheckpointError
from insvp_fast.export.preprocessing import image_steps

__all__ = ["ExportedModel", "Facts"]

NOTHING, NORMALIZE, ALL = "nothing", "normalize", "resize, crop, normalize"  # what is inside a file
# what is right under the names of the fields, and in words: a file may be damaged, or another program's
VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "class_names": (
        lambda v: v is None or (isinstance(v, list) and all(isinstance(name, str) for name in v)),
        "a list of texts, or null",
    ),
    "preprocessing": (lambda v: isinstance(v, dict | None), "an object, or null"),
    "inside": (lambda v: v in (NOTHING, NORMALIZE, ALL), f"one of {NOTHING!r}, {NORMALIZE!r}, {ALL!r}"),
    "input": (
        lambda v: isinstance(v, list) and len(v) == 4 and all(n is None or (type(n) is int and n > 0) for n in v),
        "four sizes, of which those that are open are null",
    ),
    "insvp_fast_version": (lambda v: isinstance(v, str), "text"),
    "multi_label": (lambda v: isinstance(v, bool), "true or false"),
    "exif_rotation": (lambda v: isinstance(v, bool), "true or false"),
}


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The metadata of an exported file, each value as JSON under the name of its field.

    Args:
        class_names: the names of the classes in order, or None.
        multi_label: whether an image may have several: the logits then give a probability each, by a sigmoid.
        preprocessing: how images are prepared, as arguments of ``timm.data.create_transform``, or None if unknown.
        inside: the steps of it that the file takes itself, ``NOTHING``, ``NORMALIZE`` or ``ALL``.
        input: the shape of the images, [B, C, H, W] or [B, H, W, C], with None where any size will do.
        insvp_fast_version: what wrote it.
        exif_rotation: whether images were turned upright in training, as their EXIF orientation says.
    """

    class_names: list[str] | None
    preprocessing: dict[str, Any] | None
    inside: str
    input: list[int | None]
    insvp_fast_version: str
    # what files of earlier versions do not say
    multi_label: bool = False
    exif_rotation: bool = True

    @property
    def batches(self) -> tuple[int, ...]:
        """Numbers of images to try it with."""
        return (1, 7) if self.input[0] is None else (self.input[0],)

    @property
    def dtype(self) -> torch.dtype:
        """Of the images: fp32, or 8 bits where normalization is inside."""
        return torch.float32 if self.inside == NOTHING else torch.uint8

    def prepare(self, image: Image.Image) -> Tensor:
        """One image for the file, without the batch's dimension: after the steps that are not inside.

        Args:
            image: of any mode, as Pillow opens it; turned upright here, as in training, if its EXIF data say how.

        Raises:
            TypeError: for what is not an image of Pillow.
            ValueError: if the preprocessing is unknown.
        """
        if not isinstance(image, Image.Image):
            raise TypeError(f"image is a {type(image).__name__}: expected an image as Pillow opens it")
        if self.preprocessing is None:
            raise ValueError("preprocessing is None: expected images to be prepared as they were in training")
        image = to_rgb(image, self.exif_rotation)
        if self.inside == NOTHING:
            return transform_for(self.preprocessing)(image)
        for step in [] if self.inside == ALL else image_steps(self.preprocessing):
            image = step(image)
        pixels = pil_to_tensor(image)
        return pixels.permute(1, 2, 0) if self.input[-1] == 3 else pixels

    def to_metadata(self) -> dict[str, str]:
        return {name: json.dumps(value, ensure_ascii=False) for name, value in vars(self).items()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], file: object) -> Self:
        """What ``to_metadata`` gave; other entries are ignored.

        Raises:
            CheckpointError: if a field is missing, not JSON, or has a value that it cannot have.
        """
        required = {field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING}
        try:
            names = required | {field.name for field in dataclasses.fields(cls) if field.name in metadata}
            values = {name: json.loads(metadata[name]) for name in names}
        except (KeyError, RecursionError, TypeError, ValueError) as error:  # of type: JSON, but no texts under names
            found = f"its metadata are {metadata!s:.200}: expected JSON under {', '.join(sorted(required))}"
            raise CheckpointError(f"{file}: not written by `insvp export`: {found}") from error
        for name, value in values.items():
            is_valid, expected = VALUES[name]
            if not is_valid(value):
                found = f"its {name} is {json.dumps(value):.200}: expected {expected}"
                raise CheckpointError(f"{file}: not written by `insvp export`: {found}")
        return cls(**values)


@dataclass(frozen=True)
class ExportedModel:
    """A loaded file: images as ``facts`` say in, logits [B, num_classes] in fp32 out.

    Threads may share one; it computes for one of them at a time.

    Raises:
        TypeError: if the images are no tensor.
        ValueError: if they have another dtype or shape, or are not on the CPU.
    """

    run: Callable[[Tensor], Tensor]
    facts: Facts
    # some runtimes fail when two threads run one file, and AOTInductor's waits forever
    _one_at_a_time: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    def __call__(self, images: Tensor) -> Tensor:
        if not isinstance(images, Tensor):
            raise TypeError(f"images is a {type(images).__name__}: expected a tensor")
        sizes = [None if size is None else found for found, size in zip(images.shape, self.facts.input, strict=False)]
        kind = images.dtype, images.device.type, images.ndim
        if kind != (self.facts.dtype, "cpu", len(sizes)) or sizes != self.facts.input:
            found = f"{_name(images.dtype, images.shape)} on {images.device}"
            raise ValueError(f"the images are {found}: expected {_name(self.facts.dtype, self.facts.input)} on cpu")
        # AOTInductor's files read the memory as it lies
        with torch.no_grad(), self._one_at_a_time:
            return self.run(images.resolve_neg().contiguous())


def _name(dtype: torch.dtype, shape: Iterable[int | None]) -> str:
    sizes = ", ".join("any" if size is None else str(size) for size in shape)
    return f"{str(dtype).removeprefix('torch.')} [{sizes}]"
