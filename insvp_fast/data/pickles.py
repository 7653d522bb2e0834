"""Pickles of arrays and plain values, as CIFAR comes in, read without running any code in them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

__all__ = ["read_pickle"]

_reconstruct = np.empty(0).__reduce__()[0]  # its module has different names in numpy 1 and 2


class _PlainUnpickler(pickle.Unpickler):
    ALLOWED: ClassVar = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("_codecs", "encode"): str.encode,  # how Python 3 writes bytes in the old protocol
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"asks for {module}.{name}; only arrays and plain values are read")
        return self.ALLOWED[module, name]


def read_pickle(file: Path) -> Any:
    """Read a pickle of numpy arrays, dict, list, bytes, str and int.

    Raises:
        pickle.UnpicklingError: if there is anything else in it; none of it is run.
    """
    with file.open("rb") as stream:
        return _PlainUnpickler(stream, encoding="latin1").load()
