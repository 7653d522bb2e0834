"""The state of a training in a folder, from which it can resume: tensors and JSON, nothing pickled."""

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

from insvp_fast.atomic_files import recover, replace_folder, write_file
from insvp_fast.checkpoints.files import read_safetensors, read_torch
from insvp_fast.errors import CheckpointError, TrainingError

__all__ = ["get_rng_states", "load_state", "save_state", "set_rng_states"]

WEIGHTS_FILE, TENSORS_FILE, FACTS_FILE = "trained.safetensors", "training.pt", "state.json"


def save_state(folder: Path, weights: Mapping[str, Tensor], tensors: Any, facts: Mapping[str, Any]) -> None:
    """Replace a folder by one with this state.

    Args:
        weights: what is trained.
        tensors: other tensors, in plain containers.
        facts: anything that JSON can hold.
    """
    content = io.BytesIO()  # torch.save to a file would not report a full disk as an OSError
    torch.save(tensors, content)
    with replace_folder(folder) as new:
        write_file(
            new / WEIGHTS_FILE, safetensors.torch.save({key: t.cpu().contiguous() for key, t in weights.items()})
        )
        write_file(new / TENSORS_FILE, content.getvalue())
        write_file(new / FACTS_FILE, (json.dumps(facts) + "\n").encode())


def load_state(folder: Path) -> tuple[dict[str, Tensor], Any, dict[str, Any]] | None:
    """The arguments of the last ``save_state``, on the CPU; None if nothing was saved yet.

    Raises:
        TrainingError: if the files are damaged.
    """
    recover(folder)
    if not folder.exists():
        return None
    try:
        facts = json.loads((folder / FACTS_FILE).read_text())
        return read_safetensors(folder / WEIGHTS_FILE), read_torch(folder / TENSORS_FILE), facts
    except (CheckpointError, OSError, ValueError) as error:  # not JSON, or not even UTF-8
        raise TrainingError(f"{folder}: not a state that can be resumed ({error})") from error


def get_rng_states(device: torch.device) -> dict[str, Any]:
    """The states of this process's random generators (Python, NumPy, torch, the GPU's), in plain containers."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_rng_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Restore what ``get_rng_states`` returned."""
    name, keys, *rest = states["numpy"]
    random.setstate(states["python"])
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["device"] is not None:
        torch.cuda.set_rng_state(states["device"], device)
