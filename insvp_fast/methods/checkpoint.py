"""Models with a method on disk: adapter_config.json and adapter_model.safetensors, without the frozen backbone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from insvp_fast.checkpoints.adapter import recorded_backbone, require_described
from insvp_fast.checkpoints.adapter_config import (
    AdapterConfig,
    BackboneRecord,
    Described,
    check_description,
    check_fields,
    to_json,
    with_later_fields,
)
from insvp_fast.checkpoints.files import find_file, read_safetensors, save_adapter
from insvp_fast.checkpoints.names import ADAPTER_FILE, WEIGHTS_FILE
from insvp_fast.checkpoints.state_dict import assign, check_shapes, head_of
from insvp_fast.errors import CheckpointError
from insvp_fast.json_files import read_json
from insvp_fast.methods.table import CLASSES
from insvp_fast.methods.tuning import Tuning

__all__ = ["MethodCheckpoint", "MethodConfig"]


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """The content of adapter_config.json.

    Raises:
        ValueError: as ``check_description``.
    """

    method: str
    options: dict
    num_classes: int
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
            CheckpointError: naming the key, if it is not of such an adapter.
        """
        values = read_json(file, CheckpointError)
        method = values.get("method")
        if not isinstance(method, str) or method not in CLASSES:
            raise CheckpointError(f"{file}: method is {method!r}: expected one of {sorted(CLASSES)}")
        values = with_later_fields(values)
        check_fields(cls, values, f"{file}: ")
        try:
            return cls(**values | {"backbone": BackboneRecord.read(values["backbone"], file)})
        except ValueError as error:
            raise CheckpointError(f"{file}: {error}") from error


def read_adapter_config(file: Path) -> AdapterConfig | MethodConfig:
    """What the adapter_config.json of any method says.

    Raises:
        CheckpointError: naming the key, if it is not of an adapter.
    """
    return (MethodConfig if "method" in read_json(file, CheckpointError) else AdapterConfig).read(file)


class MethodCheckpoint(Described, nn.Module):
    """Saving and loading, for a class with a constructor (backbone, num_classes, method=...).

    The attributes of ``Described`` are saved with the adapter.
    """

    KIND: ClassVar[type[nn.Module]]  # of which its methods are

    backbone: Any
    head: Any
    method: Any
    num_classes: int
    _options: dict[str, Any] | None

    def _adapter(self) -> dict[str, Tensor]:
        """What is saved of the state dict: what is trained, and what belongs to it."""
        raise NotImplementedError

    def _backbone_record(self) -> BackboneRecord:
        """The record of the backbone as it was before training."""
        raise NotImplementedError

    def save_pretrained(
        self,
        folder: str | Path,
        class_names: Sequence[str] | None = None,
        preprocessing: Mapping[str, Any] | None = None,
    ) -> None:
        """Write what is trained and what to build it around: adapter_config.json and adapter_model.safetensors.

        Args:
            class_names, preprocessing: the attributes' new values; None leaves them unchanged.

        Raises:
            ValueError: if the method is not one of ``METHODS``, or its settings are not JSON, or not known because it
                was made by another function, if there is not one class name for each class, or for a head of one's own.
        """
        kind, names = type(self.method).__name__, [name for name, cls in CLASSES.items() if cls is type(self.method)]
        if not names:
            raise ValueError(f"the method is a {kind}: expected one of {sorted(CLASSES)}; save the state dict instead")
        if self._options is None:
            raise ValueError(f"the settings of the {kind} are not known: expected method={kind}, or a partial of it")
        config = MethodConfig(
            method=names[0],
            options=self._options,
            num_classes=self.num_classes,
            backbone=self._backbone_record(),
            **self.description(class_names, preprocessing),
        )
        content = to_json(dataclasses.asdict(config), f"what is said of {names[0]}")
        head = head_of(self.backbone, self.num_classes)
        head = self.method.make_head(head) if isinstance(self.method, Tuning) else head
        require_described(nn.ModuleDict({"head": self.head}), nn.ModuleDict({"head": head}), owner=self)
        save_adapter(Path(folder), self._adapter(), content)
        self.describe_as(config)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, backbone: str | nn.Module | None = None, *, local_files_only: bool = False
    ) -> Self:
        """Build the recorded backbone, or take the given one, and load an adapter that ``save_pretrained`` wrote.

        The model is in evaluation mode. It has the dtypes that it was saved in, or that of a given backbone if it
        differs.

        Args:
            folder: a folder, or the name of a repository on the Hub.
            backbone: what ``create_backbone`` takes, or a module, which becomes part of the model.
            local_files_only: do not ask the Hub.

        Raises:
            CheckpointError: if the files are not of such an adapter, or the backbone is another one.
        """
        hub = {"local_files_only": local_files_only}
        file = find_file(str(folder), ADAPTER_FILE, hub)
        config, weights = MethodConfig.read(file), read_safetensors(find_file(str(folder), WEIGHTS_FILE, hub))
        make: Any = CLASSES[config.method]
        if not issubclass(make, cls.KIND):
            raise CheckpointError(f"{file}: {config.method} is not for a {cls.__name__}: expected load_model")
        replaces_all = getattr(make, "trains_all", False)
        module: Any = recorded_backbone(config.backbone, backbone, not replaces_all, {}, file)
        if not replaces_all or backbone is not None:
            config.backbone.require_same_weights(module, file)
        dtype = _dtype_when_saved(config.backbone, weights) if issubclass(make, Tuning) else config.backbone.torch_dtype
        module = module if module is backbone else module.to(dtype)
        try:
            model = cls(module, config.num_classes, method=partial(make, **config.options))  # type: ignore[call-arg]
        except (RuntimeError, TypeError, ValueError) as error:  # the first of sizes that no tensor has
            raise CheckpointError(f"{file}: {error}") from error
        expected = model._adapter()
        integers = {key for key, value in expected.items() if not value.is_floating_point()}
        check_shapes(weights, {key: tuple(value.shape) for key, value in expected.items()}, folder, integers)
        assign(model, weights, saved=dtype)
        model.describe_as(config)
        return model.eval()


def require_method(make: object, kind: type[nn.Module]) -> None:
    """Refuse what does not make a method of this kind.

    Raises:
        TypeError: naming it.
    """
    made = make.func if isinstance(make, partial) else make
    unfit = not callable(made) or isinstance(made, nn.Module)  # a module that is made already can be called
    if unfit or (isinstance(made, type) and not issubclass(made, kind)):
        found = made.__name__ if isinstance(made, type) else repr(made)
        raise TypeError(f"method={found}: expected a subclass of {kind.__name__}; create_model takes names")


def options_of(method: Callable[..., Any]) -> dict[str, Any] | None:
    """The settings of a method; None for a function of its own, which may have chosen any."""
    if isinstance(method, partial) and isinstance(method.func, type):
        return method.keywords
    return {} if isinstance(method, type) else None


def _dtype_when_saved(record: BackboneRecord, weights: Mapping[str, Tensor]) -> torch.dtype:
    """That of a ``TunedViT``, whose record is from before training: a narrower one can only be that of all of it."""
    dtypes = {value.dtype for value in weights.values() if value.is_floating_point()}
    found = dtypes.pop() if len(dtypes) == 1 else record.torch_dtype
    return found if found.itemsize < record.torch_dtype.itemsize else record.torch_dtype
