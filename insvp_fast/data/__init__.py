"""Images and their classes, from named data sets, folders, lists or timm's formats; needs the extra ``train``.

load.py gives a run its data. sources.py reads a data set from wherever it is: readers.py the named sets of the table
sets.py, folders.py class folders, lists.py list files and tables.py tables among them, timm_formats.py and tfds.py
formats that timm reads too. images.py is a data set of images, decode.py opens one image, splits.py divides train,
transforms.py prepares images, cache.py keeps them decoded, verify.py checks a data set.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from insvp_fast.data.load import Data, load_data, load_test_data
    from insvp_fast.data.transforms import insvp_preprocessing, transform_for
    from insvp_fast.data.verify import Report, check

__all__ = ["Data", "Report", "check", "insvp_preprocessing", "load_data", "load_test_data", "transform_for"]

_MODULES = {
    "load": ("Data", "load_data", "load_test_data"),
    "transforms": ("insvp_preprocessing", "transform_for"),
    "verify": ("Report", "check"),
}


def __getattr__(name: str) -> Any:
    # imported when first used: the command line lists the sets of sets.py without waiting for torch
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
