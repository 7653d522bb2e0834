"""Files of a checkpoint: found in a folder or on the Hub, and read without running any code in them."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import threading
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.utils import get_session
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from insvp_fast.atomic_files import write_file
from insvp_fast.checkpoints.names import ADAPTER_FILE, WEIGHTS_FILE
from insvp_fast.errors import CheckpointError

__all__ = [
    "find_file",
    "read_metadata",
    "read_npz",
    "read_safetensors",
    "read_torch",
    "read_weights",
    "require_hub",
    "save_adapter",
]

INDEX = ".safetensors.index.json"  # of weights that are in several files
HUB_TIMEOUT = 3  # seconds to wait for the Hub's first answer, unless HF_HUB_ETAG_TIMEOUT is set


def find_file(place: str, name: str, hub: Mapping[str, Any]) -> Path:
    """A file of an adapter, in a folder or downloaded from the Hub.

    Args:
        place: a folder, or the name of a repository on the Hub.
        hub: arguments of ``hf_hub_download``.

    Raises:
        CheckpointError: if there is no such file.
    """
    if os.path.isdir(place):
        if not os.path.isfile(os.path.join(place, name)):
            found = sorted(os.listdir(place))
            text = f"{place}: not an adapter: found {found[:8]}: expected {name}"
            if "training_args.bin" in found:
                text += (
                    "; what the Trainer of transformers saves is loaded by load_state_dict, into a model made as before"
                )
            raise CheckpointError(text)
        return Path(place, name)
    try:
        if not hub.get("local_files_only"):
            require_hub(place, (name,), hub.get("revision"), hub.get("cache_dir"))
        return Path(hf_hub_download(place, name, **hub))
    except (OSError, ValueError) as error:
        text = f"found no such folder, and no repository with {name} within reach"
        raise CheckpointError(f"{place}: {text}: {error}") from error


def require_hub(
    repository: str, endings: tuple[str, ...], revision: str | None, cache_dir: str | Path | None = None
) -> None:
    """Fail at once, where a download would retry for minutes: the file is not cached, and the Hub does not answer.

    Args:
        repository: its name on the Hub.
        endings: a file whose name ends in one of these counts as cached.

    Raises:
        CheckpointError: after three seconds, or as many as HF_HUB_ETAG_TIMEOUT says.
    """
    try:
        folder = snapshot_download(repository, revision=revision, cache_dir=cache_dir, local_files_only=True)
        names = os.listdir(folder)
    except (OSError, ValueError):  # not cached, or not the name of a repository
        names = []
    timeout = constants.HF_HUB_ETAG_TIMEOUT
    seconds = HUB_TIMEOUT if timeout == constants.DEFAULT_ETAG_TIMEOUT else timeout
    if not any(name.endswith(endings) for name in names) and not _hub_answers(seconds):
        where = f"{constants.ENDPOINT} does not answer within {seconds} seconds (HF_HUB_ETAG_TIMEOUT sets others)"
        if constants.HF_HUB_OFFLINE:
            where = "HF_HUB_OFFLINE is set"
        raise CheckpointError(f"{repository} is not in the cache of the Hub, and {where}")


def _hub_answers(seconds: float) -> bool:
    """Whether the Hub answers at all, be it with an error; in a thread, as name resolution has no time limit."""
    answers: list[Any] = []

    def ask() -> None:
        with contextlib.suppress(Exception):
            answers.append(get_session().head(constants.ENDPOINT, timeout=seconds))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers)


def read_weights(file: Path) -> Any:
    """What a file of weights holds: safetensors, or the index of several, by its suffix, else what torch saved."""
    if file.name.endswith(INDEX):
        return _read_shards(file)
    return read_safetensors(file) if file.suffix == ".safetensors" else read_torch(file)


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of the safetensors files that an index beside them lists."""
    try:
        listed = dict(json.loads(index.read_text())["weight_map"])
        names = sorted(set(listed.values()))
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(f"{index}: found no index of safetensors: expected weight_map in it") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not os.path.isfile(index.parent / name):
            raise CheckpointError(f"{index}: found the file {name!r}: expected one beside it")
    tensors = {key: value for name in names for key, value in read_safetensors(index.parent / name).items()}
    if tensors.keys() != listed.keys():
        differ = sorted(tensors.keys() ^ listed.keys())[:3]
        raise CheckpointError(f"{index}: the index and its files differ in {differ}: expected the same tensors")
    return tensors


def read_npz(file: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file; nothing is unpickled.

    Raises:
        CheckpointError: if it is not such a file, or holds objects.
    """
    try:
        with np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (EOFError, OSError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        found = "a pickle" if "Object arrays" in str(error) else "a truncated or foreign file"
        raise CheckpointError(f"{file}: found {found} in it: expected arrays as numpy.savez writes them") from error


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: if it is not such a file.
    """
    try:
        return load_file(file)
    except SafetensorError as error:
        raise CheckpointError(f"{file}: found a truncated or foreign file, not safetensors: {error}") from error


def read_metadata(file: Path) -> dict[str, str]:
    """The metadata in the header of a safetensors file; no tensor is read.

    Raises:
        CheckpointError: if it is not such a file.
    """
    try:
        with safe_open(file, "pt") as tensors:
            return tensors.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"{file}: found a truncated or foreign file, not safetensors: {error}") from error


def read_torch(file: Path) -> Any:
    """What ``torch.save`` wrote, if it holds only tensors, plain containers and ``argparse.Namespace``.

    Raises:
        CheckpointError: if it is not such a file, or holds anything else, of which no code is run.
    """
    try:
        # timm's train.py saves its options as a Namespace; unpickling one sets attributes and calls nothing
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol|.*looks like a TorchScript")  # both are refused
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of many types for broken files
        text = "found a truncated file or one with code, not tensors of torch.save"
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if "TorchScript" in str(error):
            text = "found a TorchScript archive, which is code: expected its state dict, saved by torch.save"
            raise CheckpointError(f"{file}: {text}") from error
        # the rest of torch's message is of no use, or advice to trust the file
        raise CheckpointError(f"{file}: {text}{f': it asks for {asked[1]}' if asked else ''}") from error


def save_adapter(folder: Path, tensors: Mapping[str, Tensor], config: bytes) -> None:
    """Write an adapter's tensors, and the content of its adapter_config.json, into a folder, made if need be."""
    # as they lie in memory: contiguous, and without the sign that PyTorch may put off
    stored = {key: tensor.detach().cpu().resolve_neg().contiguous() for key, tensor in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / WEIGHTS_FILE, save(stored, metadata={"format": "pt"}))
    write_file(folder / ADAPTER_FILE, config)
