"""Calls of the native library that wait for one another: what they compute is prepared first, and computed at once.

A call fills the caches with its tensors, and the Python and PyTorch before the next call then take several times as
long as they would for many calls in a row. That counts where there are few images.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

__all__ = ["are_together", "at_once", "finish", "hold", "run", "together"]


class _Waiting(threading.local):
    """The calls of this thread that wait, None outside of ``together``, and the tensors that they read and write."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] | None = None
        self.tensors: list[Tensor] = []


_waiting = _Waiting()


@contextmanager
def together() -> Iterator[None]:
    """Let calls of this thread wait until the end, or the next ``finish``; they run in order.

    Until then nothing but such calls may write what they read, or read or write what they compute. The implementations
    of the operations say whether they heed that (``ops/registry.py``); PyTorch's own functions do not.
    """
    finish()
    outside = _waiting.calls, _waiting.tensors
    try:
        _waiting.calls, _waiting.tensors = [], []
        yield
        finish()
    finally:
        _waiting.calls, _waiting.tensors = outside


@contextmanager
def at_once() -> Iterator[None]:
    """Inside ``together``: run what waits, and then each call when it is made."""
    finish()
    outside, _waiting.calls = _waiting.calls, None
    try:
        yield
    finally:
        _waiting.calls = outside


def are_together() -> bool:
    """Whether calls of this thread would wait."""
    return _waiting.calls is not None


def finish() -> None:
    """Run what waits."""
    if not (calls := _waiting.calls):
        return
    tensors = _waiting.tensors
    _waiting.calls, _waiting.tensors = [], []
    for compute in calls:
        compute()
    del tensors  # they live until all have run


def hold(x: Tensor) -> None:
    """Keep a tensor alive until the calls that wait have run, the one that is being prepared among them."""
    if _waiting.calls is not None:
        _waiting.tensors.append(x)


def run(compute: Callable[[], None]) -> None:
    """Run a call, or let it wait."""
    if _waiting.calls is None:
        compute()
    else:
        _waiting.calls.append(compute)
