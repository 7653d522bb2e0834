"""What adapter_config.json says of an adapter: what to build, and around which backbone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, get_type_hints

import torch
from timm.models import get_model_args
from torch import nn

from insvp_fast import __version__
from insvp_fast.checkpoints.backbone import image_size, require_architecture_only, source_of
from insvp_fast.checkpoints.state_dict import backbone_sha256
from insvp_fast.config import InsVPConfig, is_number
from insvp_fast.errors import CheckpointError, warn
from insvp_fast.json_files import read_json

__all__ = ["AdapterConfig", "BackboneRecord", "Described", "check_fields", "to_json"]

PEFT_TYPE, FORMAT_VERSION = "INSVP", 1
REMEDY = (
    "Give as backbone= the one that the adapter was trained with; InsVPViT.from_pretrained takes another with"
    " allow_backbone_mismatch=True"
)


class Described:
    """What an adapter says of a model besides its configuration and weights; earlier versions said less.

    Attributes:
        class_names: the names of the classes in order, or None.
        multi_label: whether an image may have several of them.
        preprocessing: how images are prepared, as arguments of ``timm.data.create_transform`` (mean, std,
            interpolation, crop_pct, input_size, ...), or None if unknown.
        exif_rotation: whether images are first turned upright, as their EXIF orientation says.
        trained_on: ``insvp_fast.data.Data.origin``, the images of training and how they were divided; None if unknown.
    """

    class_names: list[str] | None = None
    multi_label: bool = False
    preprocessing: dict[str, Any] | None = None
    exif_rotation: bool = True
    trained_on: dict[str, Any] | None = None

    def description(
        self, class_names: Sequence[str] | None = None, preprocessing: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """The attributes by their names, two of them with new values where these are given.

        Raises:
            ValueError: if class names are one text, or how images are prepared is no dictionary or not JSON.
        """
        found = {name: getattr(self, name) for name in get_type_hints(Described)}
        if isinstance(class_names, str):
            raise ValueError(f"class_names is {class_names!r}: expected a list of names")
        if class_names is not None:
            found["class_names"] = list(class_names)
        if not isinstance(preprocessing, Mapping | None):
            raise ValueError(
                f"preprocessing is {preprocessing!r:.200}: expected arguments of timm.data.create_transform"
            )
        if preprocessing is not None:  # through JSON, so that the attribute is what will be loaded
            found["preprocessing"] = json.loads(to_json(dict(preprocessing), "preprocessing"))
        return found

    def describe_as(self, other: object) -> None:
        """Take the attributes of a model or of what was read from a file."""
        for name in get_type_hints(Described):
            setattr(self, name, getattr(other, name))


def to_json(values: object, what: str) -> bytes:
    """The values as a file; ``what`` they are is named by messages.

    Raises:
        ValueError: if they are not JSON.
    """
    try:
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    except TypeError as error:
        raise ValueError(f"{what}: {error}: expected numbers, text, lists and dictionaries") from error
    return text.encode(errors="backslashreplace")  # class names may be file names that are not UTF-8


LATER = ("multi_label", "exif_rotation", "trained_on")  # not in all files


@dataclass(frozen=True, kw_only=True)
class BackboneRecord:
    """Where a backbone came from, and how to recognize it.

    Args:
        name: what ``create_backbone`` takes to build it again; None if that cannot be written down.
        arguments: of ``create_backbone``, besides its name.
        dtype: of the weights when the adapter was saved, by its name in torch.
        sha256: of the weights, see ``backbone_sha256``.
        global_pool: how tokens are pooled, by timm's name; None if the backbone does not say.
        sha256_but_positions: of the weights but the embeddings of positions, where these were resampled for an
            ``img_size``, of which the last bits depend on the CPU; else None.
    """

    name: str | None
    arguments: dict | None
    dtype: str
    sha256: str
    global_pool: str | None
    sha256_but_positions: str | None

    @classmethod
    def of(cls, backbone: nn.Module) -> Self:
        """The record of a backbone."""
        name, arguments = source_of(backbone), get_model_args(backbone)
        try:
            json.dumps(arguments)
        except TypeError:  # a layer type, for example: only the caller can build it again
            name = None
        dtype = next(backbone.parameters()).dtype
        return cls(
            name=name,
            arguments=arguments if name else None,
            dtype=str(dtype).removeprefix("torch."),
            sha256=backbone_sha256(backbone, dtype),
            global_pool=_pooling(backbone),
            sha256_but_positions=backbone_sha256(backbone, dtype, False) if "img_size" in (arguments or {}) else None,
        )

    def unless(self, change: str | None) -> Self:
        """This record, without the name and with a warning if something that it does not say was changed."""
        if change is None or self.name is None:
            return self
        text = f"the backbone is not what {self.name} names: {change}"
        warn(f"{text}; what is saved is loaded around the backbone itself, given as backbone=")
        return dataclasses.replace(self, name=None, arguments=None)

    @classmethod
    def read(cls, values: Mapping[str, Any], file: Path) -> Self:
        """The record in a file of others.

        Raises:
            CheckpointError: naming the key, if it is not such a record.
        """
        arguments = values.get("arguments")  # where earlier versions recorded the pooling, if it was chosen
        pool = arguments.get("global_pool") if isinstance(arguments, dict) else None
        fields: dict[str, Any] = {"global_pool": pool, "sha256_but_positions": None} | dict(values)
        check_fields(cls, fields, f"{file}: backbone.")
        record = cls(**fields)
        dtype = getattr(torch, record.dtype, None)
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1):
            raise CheckpointError(f"{file}: backbone.dtype is {record.dtype!r}: expected a floating dtype of torch")
        require_architecture_only(record.arguments or {}, f"{file}: backbone.arguments")
        return record

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        return getattr(torch, self.dtype)

    def require_same_weights(self, backbone: nn.Module, where: object) -> None:
        """Check that a backbone has the recorded weights, and pools its tokens as recorded, for which it needs none.

        Warns if embeddings of positions that were resampled differ, as they do between CPUs, for images of one size.

        Raises:
            CheckpointError: if it has others, or pools otherwise.
        """
        found, but_positions = backbone_sha256(backbone, self.torch_dtype), self.sha256_but_positions
        size, trained = self._image_sizes(backbone)
        if found != self.sha256 and size != trained:
            text = f"the backbone is for images of {size} pixels: expected {trained}, those of the training"
            raise CheckpointError(f"{where}: {text}. {REMEDY}")
        if found != self.sha256 and but_positions == backbone_sha256(backbone, self.torch_dtype, positions=False):
            text = "the position embeddings, resampled for `img_size`, are not to the bit those of the training"
            reasons = "another CPU or version of PyTorch rounds them otherwise, or they were resampled more than once"
            warn(f"{where}: {text}: {reasons}")
        elif found != self.sha256:
            expected = f"{self.sha256} ({self.name or 'not made by timm'}, {self.dtype})"
            raise CheckpointError(f"{where}: the backbone has sha256 {found}: expected {expected}. {REMEDY}")
        pool = _pooling(backbone)
        if None not in (pool, self.global_pool) and pool != self.global_pool:
            raise CheckpointError(
                f"{where}: the backbone has global_pool={pool!r}: expected {self.global_pool!r}, as the adapter was"
                " trained"
            )

    def _image_sizes(self, backbone: nn.Module) -> tuple[str, str]:
        """The sizes of images of a backbone and of the recorded one, in words; twice the same if one is not known."""
        sizes = [image_size(source_of(backbone), get_model_args(backbone)), image_size(self.name, self.arguments or {})]
        size, trained = (f"{pair[0]}x{pair[1]}" if pair else "" for pair in sizes)
        return (size, trained) if size and trained else ("", "")


def _pooling(backbone: Any) -> str | None:
    """How a backbone of timm pools its tokens; None if it does not say."""
    head = getattr(backbone, "head", None)  # of Swin and of pyramids it is there
    pool = getattr(backbone, "global_pool", None) or getattr(head, "global_pool", None)
    pool = getattr(pool, "pool_type", pool)  # of convolutional models it is a module
    return pool if isinstance(pool, str) else None


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The content of adapter_config.json, in the order of the file.

    Args:
        base_model_name_or_path: the backbone's repository on the Hub, or else its name; for readers of PEFT adapters.
        insvp: the configuration of the method.

    The others are those of ``Described``.

    Raises:
        ValueError: as ``check_description``.
    """

    peft_type: str = PEFT_TYPE
    format_version: int = FORMAT_VERSION
    insvp_fast_version: str = __version__
    base_model_name_or_path: str | None
    num_classes: int
    insvp: InsVPConfig
    backbone: BackboneRecord
    class_names: list | None
    multi_label: bool
    preprocessing: dict | None
    exif_rotation: bool
    trained_on: dict | None

    def __post_init__(self) -> None:
        check_description(self)

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read the file.

        Raises:
            CheckpointError: naming the key, if the file is not of an adapter that this version can read.
        """
        values = read_json(file, CheckpointError)
        if "method" in values:
            remedy = "expected insvp; insvp_fast.methods.load_model loads adapters of all methods"
            raise CheckpointError(f"{file}: not an InsVP adapter: its method is {values['method']}: {remedy}")
        found = values.get("peft_type")
        if found != PEFT_TYPE:
            raise CheckpointError(f"{file}: not an InsVP adapter: peft_type is {found!r}: expected {PEFT_TYPE!r}")
        version = values.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            text = f"format_version is {version}: expected at most {FORMAT_VERSION}"
            raise CheckpointError(f"{file}: {text}: it needs insvp_fast {values.get('insvp_fast_version')} or later")
        values = with_later_fields(values)
        check_fields(cls, values, f"{file}: ")
        backbone = BackboneRecord.read(values["backbone"], file)
        try:
            return cls(**values | {"backbone": backbone, "insvp": InsVPConfig.from_dict(values["insvp"])})
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{file}: {error}") from error


def with_later_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a file, and what files of earlier versions mean by what they do not say."""
    return {name: getattr(Described, name) for name in LATER} | dict(values)


def check_description(config: Any) -> None:
    """Check that what an adapter says of classes, images and their origin can be used.

    Args:
        config: with ``num_classes`` and the attributes of ``Described``.

    Raises:
        ValueError: if there are class names, and not one for each class, if images cannot be prepared so, or if what
            dividing the images again needs is missing.
    """
    if config.num_classes < 0:
        raise ValueError(f"num_classes is {config.num_classes}: expected at least 0")
    names, images, origin = config.class_names, config.preprocessing or {}, config.trained_on or {"split_seed": 0}
    if names is not None and len(names) != config.num_classes:
        raise ValueError(
            f"class_names has {len(names)} names: expected one for each of the {config.num_classes} classes"
        )
    for name in names or ():
        if not isinstance(name, str):
            raise ValueError(f"class_names has {name!r}: expected text")
    for name in ("input_size", "mean", "std"):
        if config.preprocessing is not None and name not in images:
            raise ValueError(f"preprocessing has no {name}: expected input_size, mean and std")
    for name, (is_valid, expected) in PREPROCESSING.items():
        if name in images and not is_valid(images[name]):
            raise ValueError(f"preprocessing.{name} is {images[name]!r}: expected {expected}")
    channels = images.get("input_size", (3,))[0]
    for name in ("mean", "std"):
        if len(images.get(name, (0,))) not in (1, channels):
            raise ValueError(f"preprocessing.{name} is {images[name]!r}: expected one number, or {channels}")
    seed, digest = origin.get("split_seed"), origin.get("undivided_sha256")
    if not isinstance(seed, int) or not isinstance(digest, str | None):
        raise ValueError(f"trained_on has split_seed {seed!r} and undivided_sha256 {digest!r}: expected an int, a str")


def _is_list(value: Any, is_valid: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(map(is_valid, value))


# what may be wrong in ``Described.preprocessing``; the number of channels is the backbone's
PREPROCESSING: dict[str, tuple[Callable[[Any], bool], str]] = {
    "input_size": (
        lambda v: _is_list(v, lambda n: type(n) is int and n > 0) and len(v) == 3,
        "channels, height and width",
    ),
    "mean": (lambda v: _is_list(v, is_number), "a number for each channel"),
    "std": (lambda v: _is_list(v, lambda n: is_number(n) and n > 0), "a positive number for each channel"),
    "crop_pct": (lambda v: v is None or (is_number(v) and 0 < v <= 10), "a number in (0, 10]"),
    "crop_mode": (lambda v: v is None or isinstance(v, str), "text"),
    "interpolation": (lambda v: isinstance(v, str), "text"),
}


def check_fields(cls: type, values: Mapping[str, Any], where: str) -> None:
    """Check that JSON values are the fields of a dataclass, no more and no fewer, and of their types.

    Raises:
        CheckpointError: with ``where`` before the key.
    """
    types = get_type_hints(cls)
    for key in values:
        if key not in types:
            raise CheckpointError(f"{where}{key} is unknown: expected {sorted(types)}")
    for key, kind in types.items():
        if key not in values:
            raise CheckpointError(f"{where}{key} is missing, found {sorted(values)}")
        kind = dict if dataclasses.is_dataclass(kind) else kind
        if not isinstance(values[key], kind):
            expected = getattr(kind, "__name__", str(kind))
            raise CheckpointError(f"{where}{key} is {values[key]!r}: expected {expected}")
