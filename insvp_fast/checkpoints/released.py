"""Checkpoints of the authors' released code: the names of their tensors, and the configuration behind their shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from insvp_fast.checkpoints.files import read_weights
from insvp_fast.checkpoints.state_dict import unwrap_state_dict
from insvp_fast.config import InsVPConfig
from insvp_fast.errors import CheckpointError
from insvp_fast.reference import split_common_prompts

__all__ = ["infer_config", "read_released", "to_ours", "to_released"]

NAMES = {  # of the authors' code: of InsVPReference; those with a dot at the end are prefixes
    "prompts": "common_prompts",
    "meta_net.0.": "patch_prompter.fc1.",
    "meta_net.2.": "patch_prompter.fc2.",
    "meta_net_2.0.": "global_prompter.conv1.",
    "meta_net_2.2.": "global_prompter.conv2.",
    "TokenPrompt.": "specific_prompter.",
    "backbone.head.": "head.",
}
THEIRS = {ours: theirs for theirs, ours in NAMES.items()}


def to_ours(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the authors' code, one of which stacks the prompts of all blocks, as ``InsVPReference`` has them."""
    return split_common_prompts({_rename(key, NAMES): value for key, value in tensors.items()})


def to_released(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of ``to_ours``.

    Raises:
        CheckpointError: for blocks of several widths, whose prompts the authors' code has no place for.
    """
    blocks = [key for key in tensors if key.startswith("common_prompts.")]
    prompts = [tensors[f"common_prompts.{i}"] for i in range(len(blocks))]  # a file sorts 10 before 2
    if len(widths := {one.shape[-1] for one in prompts}) > 1:
        raise CheckpointError(f"the prompts have widths {sorted(widths)}: expected one, as in the authors' code")
    stacked = {"prompts": torch.stack(prompts)} if prompts else {}
    return stacked | {_rename(key, THEIRS): value for key, value in tensors.items() if key not in blocks}


def _rename(key: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        if key == old or (old.endswith(".") and key.startswith(old)):
            return new + key[len(old) :]
    return key


def read_released(source: str | Path | Mapping[str, Any]) -> tuple[str, dict[str, Tensor]]:
    """Read a checkpoint of the authors' code, from a file or from what such a file holds.

    Returns:
        What messages call it, and its state dict.

    Raises:
        CheckpointError: if there is no state dict in it, or one of another model.
    """
    where = "the state dict" if isinstance(source, Mapping) else str(source)
    tensors = unwrap_state_dict(source if isinstance(source, Mapping) else read_weights(Path(source)), where)
    has_backbone = any(key.startswith("backbone.") for key in tensors)
    if not has_backbone or all(key == _rename(key, NAMES) or key.startswith("backbone.") for key in tensors):
        found, expected = sorted(tensors)[:5], ["backbone.*", "prompts", "TokenPrompt.*", "meta_net.*", "meta_net_2.*"]
        raise CheckpointError(f"{where}: not a checkpoint of the authors' code: found {found}: expected {expected}")
    return where, tensors


def infer_config(tensors: Mapping[str, Tensor], simam: bool, where: str) -> tuple[int, InsVPConfig]:
    """The depth of the backbone, and the released configuration with all sizes taken from the weights.

    Args:
        tensors: the state dict, under the names of ``InsVPReference``.
        simam: whether the model uses SimAM, which has no weights.
        where: what messages call the checkpoint.

    Raises:
        CheckpointError: if a tensor is missing, or the shapes fit no configuration.
    """
    blocks = [int(match[1]) for key in tensors if (match := re.match(r"backbone\.blocks\.(\d+)\.", key))]
    depth = 1 + max(blocks, default=-1)
    prefixes = {
        "common_prompt": "common_prompts",
        "specific_prompt": "specific_prompter.",
        "global_prompt": "global_prompter.",
        "patch_prompt": "patch_prompter.",
    }
    has = {name: any(key.startswith(prefix) for key in tensors) for name, prefix in prefixes.items()}
    if has["global_prompt"] != has["patch_prompt"]:
        raise CheckpointError(f"{where}: found one of meta_net.* and meta_net_2.*: expected both or neither")
    try:
        return depth, InsVPConfig.released(simam=simam, **has, **_sizes(tensors, has, depth))
    except KeyError as error:
        raise CheckpointError(f"{where}: {_rename(error.args[0], THEIRS)} is missing") from error
    except (IndexError, ValueError) as error:
        raise CheckpointError(f"{where}: the shapes are not those of the authors' code: {error}") from error


def _sizes(tensors: Mapping[str, Tensor], has: Mapping[str, bool], depth: int) -> dict[str, Any]:
    sizes: dict[str, Any] = {}
    if has["common_prompt"]:
        prompts = [value for key, value in tensors.items() if key.startswith("common_prompts")]
        sizes["prompt_length"], _ = prompts[0].shape
        sizes["prompted_blocks"] = None if len(prompts) == depth else len(prompts)
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
