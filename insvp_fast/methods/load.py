"""Models by the names of their methods, and adapters of any method."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from insvp_fast.checkpoints.files import find_file
from insvp_fast.checkpoints.names import ADAPTER_FILE
from insvp_fast.methods.checkpoint import MethodConfig, read_adapter_config
from insvp_fast.methods.model import MethodViT
from insvp_fast.methods.table import CLASSES
from insvp_fast.methods.tuned import TunedViT
from insvp_fast.model import InsVPViT

__all__ = ["AnyModel", "create_model", "load_model"]

AnyModel = InsVPViT | MethodViT | TunedViT  # of any method


def create_model(
    method: str,
    backbone: str | nn.Module,
    num_classes: int | None = None,
    *,
    pretrained: bool = False,
    backbone_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> MethodViT | TunedViT:
    """A model with a method of ``METHODS``: ``create_model("vpt_deep", "vit_base_patch16_224", 100, length=50)``.

    Args:
        method: a name in ``METHODS``.
        options: the settings of the method, by their names.
        backbone_kwargs: for ``timm.create_model``, where the backbone is a name.

    Other arguments and errors: see ``MethodViT`` and ``TunedViT``.

    Raises:
        ValueError: for a name that is not in the table.
        TypeError: for an option that the method does not have.
    """
    if method not in CLASSES:
        raise ValueError(f"method={method!r}: expected one of {sorted(CLASSES)}")
    make: Any = partial(CLASSES[method], **options)
    cls = _model_of(method)
    return cls(backbone, num_classes, method=make, pretrained=pretrained, **backbone_kwargs or {})


def load_model(
    folder: str | Path, backbone: str | nn.Module | None = None, *, local_files_only: bool = False
) -> AnyModel:
    """The model of an adapter of any method, InsVP's or one of ``METHODS``, in evaluation mode.

    Args:
        folder: a folder, or the name of a repository on the Hub.
        backbone: None for the recorded one, what ``create_backbone`` takes, or a module, which becomes part of the
            model.
        local_files_only: do not ask the Hub for the adapter.

    Raises:
        CheckpointError: if the files are not of an adapter, or the backbone is another one.
    """
    file = find_file(str(folder), ADAPTER_FILE, {"local_files_only": local_files_only})
    config = read_adapter_config(file)
    cls: Any = _model_of(config.method) if isinstance(config, MethodConfig) else InsVPViT
    return cls.from_pretrained(folder, backbone, local_files_only=local_files_only)


def _model_of(method: str) -> type[MethodViT | TunedViT]:
    return TunedViT if issubclass(CLASSES[method], TunedViT.KIND) else MethodViT
