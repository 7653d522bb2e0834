"""Images and their classes, by name, by folder, by list or through timm; needs the extra ``train``.

sets.py is the table of the named sets, readers.py, folders.py and lists.py read what lies on disk, pictures.py opens
an image, splits.py divides a set, transforms.py prepares images, cache.py keeps them decoded, load.py ties them
together, verify.py checks a set, and fake.py makes tiny ones.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from insvp_fast.data.load import Data, load_data, load_test_data
    from insvp_fast.data.transforms import insvp_preprocessing, transform_for
    from insvp_fast.data.verify import Report, check

__all__ = ["Data", "Report", "check", "insvp_preprocessing", "load_data", "load_test_data", "transform_for"]

_HOME = {"Data": "load", "load_data": "load", "load_test_data": "load", "Report": "verify", "check": "verify"}
_HOME |= {"insvp_preprocessing": "transforms", "transform_for": "transforms"}


def __getattr__(name: str) -> Any:
    # loaded when first asked for: the command line names the sets (sets.py) without waiting for torch
    if name in _HOME:
        return getattr(import_module(f"insvp_fast.data.{_HOME[name]}"), name)
    raise AttributeError(f"module 'insvp_fast.data' has no attribute {name!r}")
