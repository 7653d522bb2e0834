"""Files of a checkpoint: found, written at once, read without unpickling code, and checked against a model."""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import os
import pickle
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.utils import get_session
from safetensors import SafetensorError
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from insvp_fast.config import InsVPConfig
from insvp_fast.errors import CheckpointError
from insvp_fast.reference import InsVPReference

__all__ = [
    "backbone_sha256",
    "check_schema",
    "check_shapes",
    "expected_shapes",
    "find_file",
    "read_safetensors",
    "read_torch",
    "require_hub",
]


PATIENCE = 3  # seconds for the Hub's first answer


def find_file(place: str, name: str, hub: Mapping[str, Any]) -> Path:
    """The file in a folder, or downloaded from the Hub."""
    if os.path.isdir(place):
        if not os.path.isfile(os.path.join(place, name)):
            raise CheckpointError(f"{place}: not an adapter: found {sorted(os.listdir(place))[:8]}, expected {name}")
        return Path(place, name)
    try:
        if not hub.get("local_files_only"):
            require_hub(place, (name,), hub.get("revision"), hub.get("cache_dir"))
        return Path(hf_hub_download(place, name, **hub))
    except (OSError, ValueError) as error:
        text = f"found no such folder, and no repository with {name} within reach"
        raise CheckpointError(f"{place}: {text}: {error}") from error


def require_hub(
    repository: str, endings: tuple[str, ...], revision: str | None = None, cache_dir: str | Path | None = None
) -> None:
    """Refuse a repository that is not in the cache if the Hub does not answer, before a download tries for minutes.

    Args:
        endings: of the names of files, one of which has to be in the cache.

    Raises:
        CheckpointError: after three seconds, or as many as HF_HUB_ETAG_TIMEOUT says.
    """
    try:
        folder = snapshot_download(repository, revision=revision, cache_dir=cache_dir, local_files_only=True)
        names = os.listdir(folder)
    except (OSError, ValueError):  # not in the cache, or no name of a repository
        names = []
    waited = constants.HF_HUB_ETAG_TIMEOUT
    seconds = PATIENCE if waited == constants.DEFAULT_ETAG_TIMEOUT else waited
    if not any(name.endswith(endings) for name in names) and not _hub_answers(seconds):
        where = f"{constants.ENDPOINT} does not answer within {seconds} seconds (HF_HUB_ETAG_TIMEOUT sets others)"
        raise CheckpointError(f"{repository} is not in the cache of the Hub, and {where}")


def _hub_answers(seconds: float) -> bool:
    """Whether there is an answer, be it an error; asked in a thread, because looking a name up knows no time limit."""
    answers: list[Any] = []

    def ask() -> None:
        with contextlib.suppress(Exception):
            answers.append(get_session().head(constants.ENDPOINT, timeout=seconds))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    return bool(answers)


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    try:
        return safetensors.torch.load_file(file)
    except SafetensorError as error:
        raise CheckpointError(f"{file}: found a truncated or foreign file, expected safetensors: {error}") from error


def read_torch(file: Path) -> Any:
    """What ``torch.save`` wrote, if it is made of tensors, plain containers and the options of a command line."""
    try:
        # the Namespace is timm's train.py's; of one, attributes are set and nothing is called
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        text = "found a truncated file or one with code, expected tensors of torch.save"
        asked = re.search(r"GLOBAL (\S+)", str(error))  # the rest is advice to trust the file
        reason = f"it asks for {asked[1]}" if asked else (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{file}: {text}: {reason}") from error


def check_schema(values: Mapping[str, Any], schema: Mapping[str, Any], where: str) -> None:
    """Refuse keys that are unknown or missing and values of another type; ``where`` precedes a key in messages."""
    for key in values:
        if key not in schema:
            raise CheckpointError(f"{where}{key} is unknown, expected {sorted(schema)}")
    for key, kind in schema.items():
        if key not in values:
            raise CheckpointError(f"{where}{key} is missing, found {sorted(values)}")
        if not isinstance(values[key], kind):
            expected = getattr(kind, "__name__", str(kind))
            raise CheckpointError(f"{where}{key} is {values[key]!r}, expected {expected}")


def expected_shapes(
    backbone: nn.Module, num_classes: int, config: InsVPConfig, where: object
) -> dict[str, tuple[int, ...]]:
    """The keys and shapes of a model's state dict, found without touching the backbone or copying its weights."""
    if not isinstance(backbone, VisionTransformer):
        raise TypeError(f"backbone is a {type(backbone).__name__}: expected a timm VisionTransformer")
    weights: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in backbone.parameters()
    }
    weights |= {id(b): b.to("meta") for b in backbone.buffers()}
    try:
        skeleton = InsVPReference(copy.deepcopy(backbone, weights), num_classes, config)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error
    return {key: tuple(value.shape) for key, value in skeleton.state_dict().items()}


def check_shapes(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], where: object) -> None:
    """Refuse tensors that are missing, unexpected or of another shape."""
    found = {key: tuple(value.shape) for key, value in tensors.items()}
    problems = [f"{key} is missing, expected shape {shape}" for key, shape in expected.items() if key not in found]
    for key, shape in found.items():
        if key not in expected:
            problems.append(f"found the unexpected {key} of shape {shape}")
        elif shape != expected[key]:
            problems.append(f"{key} has shape {shape}, expected {expected[key]}")
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"{where}: {'; '.join(problems[:3])}{more}")


def backbone_sha256(backbone: nn.Module, dtype: torch.dtype) -> str:
    """The identity of a backbone: SHA-256 over names, shapes and fp32 bytes of its state dict, sorted by name.

    The head does not count. Weights are first rounded to ``dtype``, the one the adapter was saved in. So an adapter
    trained around the bf16 copy of a backbone recognises the copy and the fp32 original; an adapter trained around the
    original refuses the copy, whose weights are others.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(backbone.state_dict().items()):
        if not name.startswith("head."):
            tensor = tensor.detach().cpu()
            tensor = (tensor.to(dtype) if tensor.is_floating_point() else tensor).float()
            digest.update(f"{name}{list(tensor.shape)}".encode())
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
