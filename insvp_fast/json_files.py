"""Reading JSON files that others may have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from insvp_fast.errors import InsVPError

__all__ = ["read_json"]


def read_json(file: Path, error: type[InsVPError]) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        InsVPError: of the type ``error``, naming the file, if there is none.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as reason:
        raise error(f"{file}: no such file") from reason
    except (OSError, RecursionError, ValueError) as reason:
        raise error(f"{file}: found no JSON: {reason}") from reason
    if not isinstance(content, dict):
        raise error(f"{file}: found no JSON: expected an object, not a {type(content).__name__}")
    return content
