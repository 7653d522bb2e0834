"""Checkpoints of the authors' released code: their keys, and the configuration that their shapes tell."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from insvp_fast.checkpoints.files import read_safetensors, read_torch
from insvp_fast.config import InsVPConfig
from insvp_fast.errors import CheckpointError

__all__ = ["RELEASED_PREPROCESSING", "infer_config", "read_released", "to_ours", "to_released"]

# how the authors' code prepares images in evaluation; the keys are arguments of timm.data.create_transform
RELEASED_PREPROCESSING: dict[str, Any] = {
    "input_size": [3, 224, 224],
    "interpolation": "bilinear",
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "crop_pct": 0.875,
}

NAMES = {
    "prompts": "common_prompts",
    "meta_net.0.": "patch_prompter.fc1.",
    "meta_net.2.": "patch_prompter.fc2.",
    "meta_net_2.0.": "global_prompter.conv1.",
    "meta_net_2.2.": "global_prompter.conv2.",
    "TokenPrompt.": "specific_prompter.",
    "backbone.head.": "head.",
}


def to_ours(key: str) -> str:
    """The name in ``InsVPReference`` of a tensor of the authors' code."""
    return _rename(key, NAMES)


def to_released(key: str) -> str:
    """The inverse of ``to_ours``."""
    return _rename(key, {ours: theirs for theirs, ours in NAMES.items()})


def _rename(key: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        if key == old or (old.endswith(".") and key.startswith(old)):
            return new + key[len(old) :]
    return key


def read_released(source: str | Path | Mapping[str, Any]) -> tuple[str, dict[str, Tensor]]:
    """A name for messages and the state dict, out of a file or mapping and whatever it is wrapped in.

    Raises:
        CheckpointError: if there is none, or it is of another model.
    """
    where, values = ("the state dict", source) if isinstance(source, Mapping) else (str(source), _read(Path(source)))
    for wrapper in ("state_dict", "model"):
        inner = values.get(wrapper) if isinstance(values, Mapping) else None
        values = inner if isinstance(inner, Mapping) else values
    if not isinstance(values, Mapping) or not all(isinstance(value, Tensor) for value in values.values()):
        found = sorted(map(str, values))[:5] if isinstance(values, Mapping) else type(values).__name__
        raise CheckpointError(f"{where}: found {found}, expected a state dict of tensors")
    # what DDP and torch.compile put in front
    tensors = {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in values.items()}
    if not any(key.startswith("backbone.") for key in tensors) or not any(
        to_ours(key) != key and not key.startswith("backbone.") for key in tensors
    ):
        found, expected = sorted(tensors)[:5], ["backbone.*", "prompts", "TokenPrompt.*", "meta_net.*", "meta_net_2.*"]
        raise CheckpointError(f"{where}: not a checkpoint of the authors' code: found {found}, expected {expected}")
    return where, tensors


def _read(file: Path) -> Any:
    return read_safetensors(file) if file.suffix == ".safetensors" else read_torch(file)


def infer_config(tensors: Mapping[str, Tensor], simam: bool, where: str) -> tuple[int, InsVPConfig]:
    """The depth of the backbone and the released configuration, with everything that the shapes tell.

    Args:
        tensors: under the names of ``InsVPReference``.
        simam: SimAM has no weights to be recognised by.
        where: a name for messages.
    """
    blocks = [int(match[1]) for key in tensors if (match := re.match(r"backbone\.blocks\.(\d+)\.", key))]
    depth = 1 + max(blocks, default=-1)
    parts = {
        "common_prompt": "common_prompts",
        "specific_prompt": "specific_prompter.",
        "global_prompt": "global_prompter.",
        "patch_prompt": "patch_prompter.",
    }
    has = {name: any(key.startswith(part) for key in tensors) for name, part in parts.items()}
    if has["global_prompt"] != has["patch_prompt"]:
        raise CheckpointError(f"{where}: found one of meta_net.* and meta_net_2.*, expected both or neither")
    try:
        return depth, InsVPConfig.released(simam=simam, **has, **_sizes(tensors, has, depth))
    except KeyError as error:
        raise CheckpointError(f"{where}: {to_released(error.args[0])} is missing") from error
    except (IndexError, ValueError) as error:
        raise CheckpointError(f"{where}: the shapes are not those of the authors' code: {error}") from error


def _sizes(tensors: Mapping[str, Tensor], has: Mapping[str, bool], depth: int) -> dict[str, Any]:
    sizes: dict[str, Any] = {}
    if has["common_prompt"]:
        layers, sizes["prompt_length"], _ = tensors["common_prompts"].shape
        sizes["prompted_blocks"] = None if layers == depth else layers
    if has["specific_prompt"]:
        kernels = [tensors[f"specific_prompter.conv{i}.weight"] for i in (1, 2, 3)]
        sizes["prompt_length"] = kernels[0].shape[0]
        sizes["specific_kernels"] = tuple(kernel.shape[-1] for kernel in kernels)
    if has["global_prompt"]:
        kernels = [tensors[f"global_prompter.conv{i}.weight"] for i in (1, 2)]
        sizes["global_hidden"] = kernels[0].shape[0]
        sizes["global_kernels"] = tuple(kernel.shape[-1] for kernel in kernels)
    if has["patch_prompt"]:
        sizes["patch_hidden"] = tensors["patch_prompter.fc1.weight"].shape[0]
    return sizes
