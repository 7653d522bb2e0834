"""Memory for large CPU results that is used again, as the CUDA allocator does it for GPUs.

The C library gives large blocks back to the operating system as soon as they are free, and every step of a training
pays for the same pages again: a fresh 19 MB buffer costs several times what GELU does with it. Here a block is kept
when its tensor dies, and handed out again for the next one of its size.
"""

from __future__ import annotations

import sys
import threading
from collections import defaultdict
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, UntypedStorage

__all__ = ["empty", "empty_like", "release"]

_SMALLEST = 1 << 16  # bytes; the C library keeps smaller blocks itself
_IDLE = 1000  # a free block that so many requests have passed by is given back


class _Block:
    def __init__(self, nbytes: int) -> None:
        self.storage, self.nbytes, self.last = UntypedStorage(nbytes, device="cpu"), nbytes, 0

    def is_free(self) -> bool:
        # tensors, saved tensors and views count as users of the memory; tensor.untyped_storage() is this very object,
        # which `self` and the call of getrefcount refer to
        return torch._C._storage_Use_Count(self.storage._cdata) == 1 and sys.getrefcount(self.storage) == 2

    def is_ours(self) -> bool:
        # another process may see a shared block for as long as it likes; a resized one has lost its size
        return not self.storage.is_shared() and self.storage.nbytes() == self.nbytes


_blocks: defaultdict[int, list[_Block]] = defaultdict(list)
_lock = threading.Lock()
_requests = 0


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """An uninitialised contiguous tensor; on a CPU in memory that an earlier one has left, where there is some."""
    traced = torch.compiler.is_compiling() or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    if traced or torch.device(device).type != "cpu":  # sizes may be symbols while compiling
        return torch.empty(shape, dtype=dtype, device=device)
    nbytes = prod(shape) * dtype.itemsize
    if nbytes < _SMALLEST:
        return torch.empty(shape, dtype=dtype, device="cpu")
    with _lock:
        storage = _take(nbytes)
    strides = [prod(shape[i + 1 :]) for i in range(len(shape))]
    return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, shape, strides)


def empty_like(x: Tensor) -> Tensor:
    """``empty`` with the shape, dtype and device of ``x``."""
    return empty(x.shape, x.dtype, x.device)


def release() -> None:
    """Give all free blocks back to the operating system."""
    with _lock:
        _drop(idle=-1)


def _take(nbytes: int) -> UntypedStorage:
    global _requests
    _requests += 1
    block = next((block for block in _blocks[nbytes] if block.is_free() and block.is_ours()), None)
    if block is None:
        _drop(idle=_IDLE)
        block = _Block(nbytes)
        _blocks[nbytes].append(block)
    block.last = _requests
    return block.storage


def _drop(idle: int) -> None:
    for nbytes, blocks in list(_blocks.items()):
        kept = [b for b in blocks if b.is_ours() and not (b.is_free() and _requests - b.last > idle)]
        if kept:
            _blocks[nbytes] = kept
        else:
            del _blocks[nbytes]
