"""Loading an adapter of any method."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from insvp_fast.checkpoints.files import find_file
from insvp_fast.checkpoints.names import ADAPTER_FILE, WEIGHTS_FILE
from insvp_fast.errors import CheckpointError
from insvp_fast.methods.model import MethodViT
from insvp_fast.model import InsVPViT

__all__ = ["load_model"]


def load_model(source: str | Path, backbone: str | nn.Module | None = None) -> InsVPViT | MethodViT:
    """Load an adapter, from a folder or a repository on the Hub, around its backbone, in evaluation mode.

    The key ``method`` in adapter_config.json tells a ``MethodViT`` from an ``InsVPViT``, whose file has none.

    Args:
        source: a folder; what is none is the name of a repository.
        backbone: None for the recorded one, what ``create_backbone`` takes, or a module.

    Raises:
        CheckpointError: if the files cannot be found or read, the backbone is needed, or is another one.
    """
    files = [find_file(str(source), name, {}) for name in (ADAPTER_FILE, WEIGHTS_FILE)]
    try:
        config = json.loads(files[0].read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{files[0]}: found no JSON: {error}") from error
    record = config.get("backbone") if isinstance(config, dict) else None
    if backbone is None and isinstance(record, dict) and record.get("name", "") is None:
        raise CheckpointError(f"{source} does not say where its backbone is from: expected it as `backbone`")
    kind = MethodViT if isinstance(config, dict) and "method" in config else InsVPViT
    return kind.from_pretrained(files[0].parent, backbone)
