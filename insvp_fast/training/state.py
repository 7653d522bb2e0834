"""Folders that are replaced whole, and the state of a training in one: tensors and JSON, nothing pickled."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from insvp_fast.checkpoints.files import read_safetensors, read_torch
from insvp_fast.errors import CheckpointError, TrainingError
from insvp_fast.storage import recover, replace_folder, write_file

__all__ = ["get_randomness", "read_state", "set_randomness", "write_state"]

WEIGHTS, TENSORS, FACTS = "trained.safetensors", "training.pt", "state.json"


def write_state(folder: Path, weights: Mapping[str, Tensor], tensors: Any, facts: Mapping[str, Any]) -> None:
    """Replace a folder by the trained weights, other tensors in plain containers, and facts for JSON."""
    content = io.BytesIO()  # torch.save would not tell a full disk as an OSError
    torch.save(tensors, content)
    with replace_folder(folder) as new:
        write_file(new / WEIGHTS, safetensors.torch.save({key: t.cpu().contiguous() for key, t in weights.items()}))
        write_file(new / TENSORS, content.getvalue())
        write_file(new / FACTS, (json.dumps(facts) + "\n").encode())


def read_state(folder: Path) -> tuple[dict[str, Tensor], Any, dict[str, Any]] | None:
    """What ``write_state`` wrote, on the CPU; None if nothing was written yet.

    Raises:
        TrainingError: if the files are damaged.
    """
    recover(folder)
    if not folder.exists():
        return None
    try:
        facts = json.loads((folder / FACTS).read_text())
        return read_safetensors(folder / WEIGHTS), read_torch(folder / TENSORS), facts
    except (CheckpointError, OSError, json.JSONDecodeError) as error:
        raise TrainingError(f"{folder}: not a state that can be resumed ({error})") from error


def get_randomness(device: torch.device) -> dict[str, Any]:
    """The random states of this process, in plain containers."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_randomness(states: Mapping[str, Any], device: torch.device) -> None:
    """Go on from what ``get_randomness`` returned."""
    name, keys, *rest = states["numpy"]
    random.setstate(states["python"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["device"] is not None:
        torch.cuda.set_rng_state(states["device"], device)
