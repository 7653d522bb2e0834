"""Finding the native CPU library, loading it with ctypes, and calling its functions.

Nothing here knows an operation: each has a file of its own beside this one, with its typed wrapper.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch  # before the library: torch's OpenMP runtime becomes the only one of the process
from torch import Tensor

from insvp_fast.runtime import recording

ABI = 15  # as in kernels/cpu/common/dispatch.cpp; raise both when an exported function is added or changed
LIBRARY = Path(__file__).parent / "libinsvp_fast_cpu.so"
TYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}
DTYPES = tuple(TYPE_CODES)

ptr, i32, i64, f32 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
array = [ptr, i32]  # a tensor's memory and the code of its dtype


@dataclass(frozen=True)
class NativeStatus:
    """Whether the native CPU library is in use, with which instruction set, and if not, why."""

    loaded: bool
    isa: str | None  # "generic", "avx2", "avx512", "avx512_bf16" or "amx"
    detail: str

    def __bool__(self) -> bool:
        return self.loaded

    def __str__(self) -> str:
        return self.detail


@lru_cache(None)
def load() -> tuple[ctypes.CDLL | None, NativeStatus]:
    """The library, or None, and its status: loaded once, with the best instruction set that INSVP_FAST_CPU_ISA allows.

    Never raises: where the library is missing, of another ABI or switched off, the status says so.
    """

    def absent(why: str) -> tuple[None, NativeStatus]:
        return None, NativeStatus(False, None, f"native CPU library not in use: {why}")

    if os.environ.get("INSVP_FAST_NATIVE") == "0":
        return absent("switched off by INSVP_FAST_NATIVE=0")
    if not LIBRARY.exists():
        return absent("not built; INSVP_FAST_NATIVE=1 pip install -v -e . shows why")
    try:
        lib = ctypes.CDLL(str(LIBRARY))
        abi = lib.insvp_fast_abi_version()
    except (OSError, AttributeError) as error:
        return absent(f"cannot load {LIBRARY.name}: {error}")
    if abi != ABI:
        return absent(f"{LIBRARY.name} has interface {abi}, this version needs {ABI}; run pip install -e . again")

    lib.insvp_fast_select_isa.argtypes, lib.insvp_fast_select_isa.restype = [ctypes.c_char_p], ctypes.c_char_p
    limit = os.environ.get("INSVP_FAST_CPU_ISA", "")
    selected = lib.insvp_fast_select_isa(limit.encode())
    if selected is None:
        return absent(f"INSVP_FAST_CPU_ISA={limit!r} is none of generic, avx2, avx512, avx512_bf16, amx")
    isa = selected.decode()
    return lib, NativeStatus(True, isa, f"native CPU library in use ({isa})")


def native_status() -> NativeStatus:
    """Tells whether the native CPU library is in use, and why not; never raises."""
    return load()[1]


def available(*dtypes: torch.dtype) -> bool:
    """Whether the native operations can be used for tensors of ``dtypes`` (float32 and bfloat16 can).

    Raises RuntimeError where INSVP_FAST_NATIVE=1 demands a library that is not there.
    """
    status = native_status()
    if not status.loaded and os.environ.get("INSVP_FAST_NATIVE") == "1":
        raise RuntimeError(f"INSVP_FAST_NATIVE=1, but {status}")
    return status.loaded and all(map(TYPE_CODES.__contains__, dtypes))


def require_kind(name: str, x: Tensor, *dtypes: torch.dtype) -> None:
    """Check that ``x`` is on the CPU, in one of the dtypes; ``name`` is what messages call it.

    Raises ValueError for another device, TypeError for another dtype.
    """
    if not x.is_cpu:
        raise ValueError(f"{name} is on {x.device}, the native library computes on the CPU")
    if x.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {x.dtype}: expected {' or '.join(map(str, dtypes))}")


def require_dtype(name: str, dtype: torch.dtype) -> None:
    """Check that C++ has a dtype; raises TypeError."""
    if dtype not in TYPE_CODES:
        raise TypeError(f"{name} cannot have dtype {dtype}: expected {' or '.join(map(str, TYPE_CODES))}")


def require(name: str, x: Tensor, shape: tuple[int, ...], *dtypes: torch.dtype) -> Tensor:
    """``x``, contiguous, after a check of its device, dtype and shape.

    Raises ValueError for another device or shape, TypeError for another dtype.
    """
    require_kind(name, x, *dtypes)
    if x.shape != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: expected {shape}")
    return x if x.is_contiguous() else contiguous(x)


def checked_keys(num_keys: Tensor | None, B: int, S: int, T: int) -> Tensor | None:
    """``num_keys``, contiguous, after a check: other values would let C++ read and write anywhere."""
    if num_keys is None:
        return None
    recording.interrupt()  # a program would not look at the values again
    num_keys = require("num_keys", num_keys, (B,), torch.int64)
    if B and not max(T, 1) <= int(num_keys.min()) <= int(num_keys.max()) <= S:
        raise ValueError(f"num_keys is {num_keys.tolist()}: expected {max(T, 1)} to {S}, queries to tokens")
    return num_keys


def contiguous(x: Tensor) -> Tensor:
    """A contiguous copy of ``x``."""
    recording.interrupt()
    return x.contiguous()


def pointer(x: Tensor | None) -> tuple[int | None, int]:
    """The two arguments of a tensor; an absent or empty one has no memory."""
    return (None, 0) if x is None or not x.numel() else (address(x), TYPE_CODES[x.dtype])


def address(x: Tensor | None) -> int | None:
    """The one argument of a tensor whose dtype is fixed."""
    if x is None:
        return None
    if not x.is_cpu:  # of a result that a default device has put elsewhere: C++ would write anywhere
        raise ValueError(f"a tensor is on {x.device}, the native library computes on the CPU")
    recording.hold(x)
    return x.data_ptr()


def function(name: str, argtypes: Sequence[type], restype: type = i32, *, threads: bool = False) -> Any:
    """The C function ``name``; its last argument is the number of ``threads``, if it has any.

    Raises RuntimeError where the library is not in use.
    """
    lib, status = load()
    if lib is None:
        raise RuntimeError(str(status))
    found = getattr(lib, name)
    if found.argtypes is None:
        found.restype, found.argtypes = restype, [*argtypes, *[i32] * threads]  # in this order, for other threads
    return found


@dataclass(slots=True)
class Call:
    """A call of a C function, whose last argument, the number of threads, is added when it runs."""

    name: str
    compute: Any
    argtypes: Sequence[type]
    args: Sequence[Any]

    def __call__(self) -> None:
        """Raises MemoryError where there is no memory for its workspace."""
        if self.compute(*self.args, torch.get_num_threads()):
            raise MemoryError(f"{self.name}: no memory for the workspace")


def call(name: str, argtypes: Sequence[type], *args: object) -> None:
    """Run the C function ``name``, whose last argument, the number of threads, is added here.

    Arguments are not checked: ``require`` does that for tensors. Raises RuntimeError where the library is not in use,
    MemoryError where there is no memory for its workspace.
    """
    Call(name, function(name, argtypes, threads=True), argtypes, args)()


def launch(name: str, argtypes: Sequence[type], *args: object) -> None:
    """As ``call``, of what a program may run again on other memory (``runtime/programs.py``): in C++ it is a step too.

    Its tensors have to be given by ``pointer`` or ``address``, and their values may decide over nothing here.
    """
    recording.run(Call(name, function(name, argtypes, threads=True), argtypes, args))


def _after_fork() -> None:
    """GNU's OpenMP would wait forever, in PyTorch too, for threads that the parent, or PyTorch in it, has started."""
    torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
