"""Beginning a training with the weights of another adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from insvp_fast.checkpoints.adapter_config import AdapterConfig
from insvp_fast.checkpoints.files import find_file
from insvp_fast.checkpoints.names import ADAPTER_FILE, WEIGHTS_FILE
from insvp_fast.checkpoints.state_dict import check_shapes, read_adapter_weights
from insvp_fast.data.sets import DIGITS, PREFIXES
from insvp_fast.errors import CheckpointError

__all__ = ["warm_start"]


def warm_start(model: Any, source: str) -> str:
    """Copy the weights of an adapter into a model; a head of other classes stays as it is. Returns what was done.

    Args:
        source: an adapter's folder, that of a run, or the name of a repository on the Hub.

    Raises:
        CheckpointError: if there is no such adapter, or it has other prompts, or is of another backbone; or if it was
            trained on images that ``model.trained_on`` holds out.
    """
    in_run = Path(source) / "adapter"
    place = str(in_run) if (in_run / ADAPTER_FILE).is_file() else source
    try:
        config = AdapterConfig.read(find_file(place, ADAPTER_FILE, {}))
        file = find_file(place, WEIGHTS_FILE, {})
        same_classes = config.num_classes == model.num_classes and config.class_names in (None, model.class_names)
        left = ("backbone.",) if same_classes else ("backbone.", "head.")
        expected = {key: tuple(value.shape) for key, value in model.state_dict().items() if not key.startswith(left)}
        weights = {key: value for key, value in read_adapter_weights(file).items() if not key.startswith(left)}
        check_shapes(weights, expected, file)
        config.backbone.require_same_weights(model.backbone, file)
        _require_same_division(config.trained_on or {}, model.trained_on or {})
    except CheckpointError as error:
        raise CheckpointError(f"`init_from` is {source}: {error}") from error
    model.load_state_dict(weights, strict=False)
    drawn = "" if same_classes else f"; its head is of {config.num_classes} other classes, a new one is drawn"
    return f"begins with the weights of {source}{drawn}"


def _require_same_division(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    if (digest := ours.get("undivided_sha256")) is None:
        same = theirs.get("data") == ours.get("data") == DIGITS
    else:
        same = theirs.get("undivided_sha256") == digest
        if same and ours["data"].startswith(PREFIXES):  # of folders it has the files' names, whatever they are called
            same = theirs["data"] == ours["data"]
    if same and theirs["split_seed"] != ours["split_seed"]:
        expected = f"expected `split_seed` {theirs['split_seed']}"
        raise CheckpointError(f"it was trained on images of {ours['data']} that are tested here: {expected}")
