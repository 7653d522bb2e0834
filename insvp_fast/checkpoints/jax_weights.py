"""Weights in Google's .npz files, of the original ViT, of "How to train your ViT?" (augreg) and of big_vision.

timm's ``load_pretrained`` converts them. It takes what it looks for and leaves the rest, so what the file holds is
compared here with what the module got.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from insvp_fast.checkpoints.files import read_npz
from insvp_fast.checkpoints.state_dict import Resized
from insvp_fast.errors import CheckpointError

__all__ = ["convert"]

ROOTS = ("opt/target/", "params/img/", "params/")  # of the names; the original files have none
LAYER = r"(kernel|bias|scale)"
ATTENTION = rf"MultiHeadDotProductAttention_[01]/(query|key|value|out)/{LAYER}"
MLP = rf"MlpBlock_[03]/Dense_[01]/{LAYER}"
NORM = rf"LayerNorm_[0-2]/{LAYER}"
# what timm reads of them
USED = (
    rf"embedding/{LAYER}|cls|pos_embedding|Transformer/posembed_input/pos_embedding|Transformer/encoder_norm/{LAYER}"
    rf"|Transformer/encoderblock(_\d+)?/({NORM}|{ATTENTION}|{MLP})|(conv_root|gn_root|block\d+/unit\d+)/.*"
)
LEFT_OUT = {
    "head": rf"head/{LAYER}",
    "representation layer": rf"pre_logits/{LAYER}",
    "attention pooling": rf"MAPHead_0/(probe|{NORM}|{ATTENTION}|{MLP})",
    "text tower": r"params/(txt/.*|t|b)",
    "optimizer": r"opt/state/.*",
}
ADAPTED = ("pos_embed", "patch_embed.proj.weight")  # timm makes them fit


def convert(file: Path, backbone: nn.Module) -> tuple[dict[str, Tensor], Counter[str], Resized]:
    """What timm's ``load_pretrained`` makes of an .npz file, as a state dict; the module is not changed.

    Returns:
        The state dict, without a head if it is not of the module's size; what was left out, in how many arrays; and the
        tensors that were adapted, with their shapes in the file and in the model.

    Raises:
        CheckpointError: if the file is none of these, or not of this architecture.
    """
    if not hasattr(backbone, "load_pretrained"):
        name = type(backbone).__name__
        raise CheckpointError(f"{file}: found an .npz file: expected another one for a {name}, timm reads none into it")
    used, besides = _sort(read_npz(file), file)
    model: Any = copy.deepcopy(backbone)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)  # what is left of it was not in the file
    try:
        model.load_pretrained(str(file))
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{file}: not weights of this model: {reason}") from error
    state = model.state_dict()
    if any(value.isnan().all() for key, value in state.items() if key.startswith("head.")):
        state = {key: value for key, value in state.items() if not key.startswith("head.")}
    for what, prefix in (("head", "head."), ("attention pooling", "attn_pool.")):
        if any(key.startswith(prefix) for key in state):
            used |= besides.pop(what, {})
    for key, value in state.items():
        if value.is_floating_point() and value.isnan().any():
            raise CheckpointError(f"{file}: not weights of this model: {key} is missing, or not a number")
    shapes = _adapted_shapes(used, state)
    _require_all_used(used, state, file)
    return state, Counter({what: len(arrays) for what, arrays in besides.items()}), shapes


def _sort(arrays: dict[str, np.ndarray], file: Path) -> tuple[dict[str, np.ndarray], dict[str, dict[str, np.ndarray]]]:
    """The arrays that timm reads into every model, and the others by what they are, all without their root."""
    root = next((root for root in ROOTS if f"{root}embedding/kernel" in arrays), "")
    if f"{root}embedding/kernel" not in arrays:
        found = sorted(arrays)[:5]
        raise CheckpointError(f"{file}: found the names {found}: expected a ViT's, such as embedding/kernel")
    used: dict[str, np.ndarray] = {}
    besides: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        key = name.removeprefix(root)
        what = next((what for what, pattern in LEFT_OUT.items() if re.fullmatch(pattern, key)), None)
        if what:
            besides.setdefault(what, {})[key] = array
        elif re.fullmatch(USED, key) and array.dtype.kind == "f":
            used[key] = array
        else:
            raise CheckpointError(f"{file}: found {name} of {array.dtype}: expected the names and numbers of a ViT")
    return used, besides


def _adapted_shapes(used: dict[str, np.ndarray], state: dict[str, Tensor]) -> Resized:
    """The position and patch embeddings whose shapes in the file and in the model differ."""
    shapes = {"patch_embed.proj.weight": np.moveaxis(used["embedding/kernel"], (-1, -2), (0, 1)).shape}
    shapes["pos_embed"] = next(value.shape for key, value in used.items() if key.endswith("pos_embedding"))
    new = {key: tuple(state[key].shape) for key in shapes if key in state}
    return {key: (shapes[key], shape) for key, shape in new.items() if shape != shapes[key]}


def _require_all_used(used: dict[str, np.ndarray], state: dict[str, Tensor], file: Path) -> None:
    """Raise if the file holds more, or fewer, numbers than the model got of it: blocks, or a width, that it has not."""
    given = sum(a.size for key, a in used.items() if not key.endswith("pos_embedding") and key != "embedding/kernel")
    taken = sum(value.numel() for key, value in state.items() if not key.endswith(ADAPTED))
    if given != taken:
        raise CheckpointError(f"{file}: not weights of this model: found {given:,} numbers: expected {taken:,}")
