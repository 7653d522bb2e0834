"""Folders that are replaced whole, and the state of a training in one: tensors and JSON, nothing pickled."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from insvp_fast.files import CheckpointError, read_safetensors, read_torch, write_file
from insvp_fast.training.recipe import CommandError

__all__ = ["get_randomness", "read_state", "recover", "replacing", "set_randomness", "write_state"]

NEW, OLD = ".new", ".old"
WEIGHTS, TENSORS, FACTS = "trained.safetensors", "training.pt", "state.json"


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Give an empty folder to write into; on leaving, it takes the place of ``folder``.

    Whoever is interrupted leaves the old content or the new one, once ``recover`` has put away the rest.
    """
    new, old = folder.with_name(folder.name + NEW), folder.with_name(folder.name + OLD)
    recover(folder)
    new.mkdir(parents=True)
    try:
        yield new
        for file in new.iterdir():
            _sync(file)
        _sync(new)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if folder.exists():
        folder.rename(old)  # a folder cannot be renamed over another: from here to the next line there is none
    new.rename(folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(folder: Path) -> None:
    """Put away what an interrupted ``replacing`` has left."""
    new, old = folder.with_name(folder.name + NEW), folder.with_name(folder.name + OLD)
    if old.exists() and not folder.exists():
        old.rename(folder)
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)


def write_state(folder: Path, weights: Mapping[str, Tensor], tensors: Any, facts: Mapping[str, Any]) -> None:
    """Replace a folder by the trained weights, other tensors in plain containers, and facts for JSON."""
    content = io.BytesIO()  # torch.save would not tell a full disk as an OSError
    torch.save(tensors, content)
    with replacing(folder) as new:
        write_file(new / WEIGHTS, safetensors.torch.save({key: t.cpu().contiguous() for key, t in weights.items()}))
        write_file(new / TENSORS, content.getvalue())
        write_file(new / FACTS, (json.dumps(facts) + "\n").encode())


def read_state(folder: Path) -> tuple[dict[str, Tensor], Any, dict[str, Any]] | None:
    """What ``write_state`` wrote, on the CPU; None if nothing was written yet.

    Raises:
        CommandError: if the files are damaged.
    """
    recover(folder)
    if not folder.exists():
        return None
    try:
        facts = json.loads((folder / FACTS).read_text())
        return read_safetensors(folder / WEIGHTS), read_torch(folder / TENSORS), facts
    except (CheckpointError, OSError, json.JSONDecodeError) as error:
        raise CommandError(f"{folder}: not a state that can be resumed ({error})") from error


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


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
