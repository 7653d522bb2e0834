"""The frozen backbone of a run: the shipped one, or any Vision Transformer of timm."""

from __future__ import annotations

import json
import pickle
from importlib.resources import files
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file
from timm.data import resolve_data_config
from timm.models import clean_state_dict
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

from insvp_fast.training.recipe import BUILTIN, CommandError

__all__ = ["builtin_backbone", "load_backbone", "preprocessing_of"]


def load_backbone(name: str = BUILTIN, checkpoint: str | None = None) -> VisionTransformer:
    """The backbone called ``name``, or ``NAME@FILE``, with pretrained weights and without a head.

    Raises:
        CommandError: if there is no such model, or its weights cannot be had.
    """
    name, _, file = name.partition("@")
    file = checkpoint or file
    if name == BUILTIN and not file:
        return builtin_backbone()
    if not timm.is_model(name.removeprefix("hf-hub:")) and not name.startswith("hf-hub:"):
        raise CommandError(f"--backbone is {name}: timm has no such model, and the shipped one is {BUILTIN}")
    try:
        backbone = timm.create_model(name, pretrained=not file, num_classes=0)
    except Exception as error:  # whatever a download can fail with
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CommandError(f"--backbone is {name}: no weights ({reason}); or give a file, {name}@FILE") from error
    if not isinstance(backbone, VisionTransformer):
        raise CommandError(f"--backbone is {name}, a {type(backbone).__name__}: expected a Vision Transformer of timm")
    if file:
        _load_checkpoint(backbone, Path(file))
    return backbone


def builtin_backbone() -> VisionTransformer:
    """The shipped backbone: 32x32 pixels, patches of 8x8, D = 192, pretrained on drawn shapes and textures."""
    folder = files("insvp_fast") / "assets"
    facts = json.loads((folder / f"{BUILTIN}.json").read_text())
    backbone = VisionTransformer(**facts["architecture"])
    backbone.load_state_dict(load((folder / f"{BUILTIN}.safetensors").read_bytes()))  # fp16 in the file
    size = facts["architecture"]["img_size"]
    backbone.pretrained_cfg = {
        "input_size": (3, size, size),
        "mean": facts["mean"],
        "std": facts["std"],
        "crop_pct": 1.0,
    }
    return backbone


def preprocessing_of(backbone: VisionTransformer) -> dict[str, Any]:
    """How images are prepared for a backbone, as arguments of ``timm.data.create_transform``."""
    resolved = resolve_data_config(model=backbone)
    wanted = ("input_size", "interpolation", "mean", "std", "crop_pct")
    return {key: list(value) if isinstance(value := resolved[key], tuple) else value for key in wanted}


def _load_checkpoint(backbone: VisionTransformer, file: Path) -> None:
    """Load weights from a file, strictly, apart from its classification head."""
    if not file.is_file():
        raise CommandError(f"checkpoint {file}: there is no such file")
    if file.suffix == ".npz":
        try:
            backbone.load_pretrained(str(file))
            return
        except (KeyError, OSError, RuntimeError, ValueError) as error:
            raise CommandError(f"checkpoint {file}: not weights of this model ({error})") from error
    state = _read(file)
    try:
        state = checkpoint_filter_fn(state, backbone)
        state = {key: value for key, value in state.items() if not key.startswith(("head.", "head_dist."))}
        backbone.load_state_dict(state)
    except (KeyError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CommandError(f"checkpoint {file}: not weights of this model ({reason[:300]})") from error


def _read(file: Path) -> dict[str, Tensor]:
    try:
        # weights_only: a checkpoint may come from anywhere, and unpickling runs code
        state = (
            load_file(file)
            if file.suffix == ".safetensors"
            else torch.load(file, map_location="cpu", weights_only=True)
        )
    except (pickle.UnpicklingError, SafetensorError, EOFError, RuntimeError) as error:
        raise CommandError(f"checkpoint {file}: not a file of tensors only ({str(error).splitlines()[0]})") from error
    for key in ("state_dict", "model"):
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CommandError(f"checkpoint {file}: expected a dictionary of tensors")
    return clean_state_dict(state)
