"""Reused memory for large results on CPUs, as the CUDA allocator does it for GPUs.

The C library returns large blocks to the operating system as soon as they are free, so that every training step pays
for the same page faults again. Here a block is kept when its tensor dies, and serves the next tensor of its size.

Blocks are lent through public interfaces alone. A block is an ``mmap``: page-aligned, private to a process after a
fork, and returned to the system when it is dropped, which NumPy arrays do not promise. PyTorch gets a fresh view of it
and holds the view as long as anything uses the memory: tensors and their views, storages, saved tensors, arrays, DLPack
capsules. The end of the view returns the block, in the thread that dropped the last user and even in the middle of a
call here; so there is no lock, only single operations on queues. tests/runtime/test_buffers.py checks this.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections import defaultdict, deque
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from insvp_fast.runtime import recording, torch_private

__all__ = ["empty", "empty_like", "release"]

_SMALLEST = 1 << 16  # bytes; the C library keeps smaller blocks itself
_IDLE = 1000  # a free block that so many requests have passed by is given back

# free blocks by size, each with the count of requests when it came back: the oldest on the left
_free: defaultdict[int, deque[tuple[mmap.mmap, int]]] = defaultdict(deque)
_requests = 0


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """An uninitialized contiguous tensor; on a CPU in memory that an earlier one has left, where there is some.

    Like a tensor made from an array, it cannot grow in place. Raises MemoryError where the system has no more memory.
    """
    elsewhere = device != "cpu" and torch.device(device).type != "cpu"
    # in a mode, as that of fake tensors, sizes may be symbols
    if elsewhere or torch.compiler.is_compiling() or torch_private.dispatch_modes():
        return torch.empty(shape, dtype=dtype, device=device)
    if (nbytes := prod(shape) * dtype.itemsize) < _SMALLEST:
        x = torch.empty(shape, dtype=dtype, device="cpu")
    else:
        # resize_ and no view: the result of an autograd function may then be written in place
        x = torch.frombuffer(_lend(nbytes), dtype=dtype).resize_(shape)
    if (noting := recording.current()) is not None:
        noting.new(x)
    return x


def empty_like(x: Tensor) -> Tensor:
    """``empty`` with the shape, dtype and device of ``x``."""
    return empty(x.shape, x.dtype, x.device)


def release() -> None:
    """Give all free blocks back to the operating system."""
    _drop(idle=-1)


def _lend(nbytes: int) -> memoryview:
    global _requests
    _requests += 1
    if _requests % _IDLE == 0:  # also where every request is met
        _drop(idle=_IDLE)
    blocks = _free[nbytes]
    try:
        block, _ = blocks.pop()  # the last to come back may still be in the cache
    except IndexError:
        _drop(idle=_IDLE)
        try:
            block = mmap.mmap(-1, nbytes, access=mmap.ACCESS_COPY)  # a copy after a fork, as all memory of a process
        except OSError as error:
            raise MemoryError(f"cannot allocate {nbytes} bytes") from error
    view = memoryview(block)
    lent = _Lent(view, _take_back)
    lent.block = block
    _lent[id(lent)] = lent
    return view


class _Lent(weakref.ref[memoryview]):
    """The end of a view, which gives back its block; ``weakref.finalize`` does the same more slowly."""

    block: mmap.mmap


_lent: dict[int, _Lent] = {}  # a reference that nobody holds is not told


def _take_back(lent: _Lent) -> None:
    del _lent[id(lent)]
    _free[len(lent.block)].append((lent.block, _requests))


def _drop(idle: int) -> None:
    for blocks in list(_free.values()):
        with contextlib.suppress(IndexError):  # none is left, or another thread took the last
            while _requests - blocks[0][1] > idle:
                blocks.popleft()
