"""Calls of the native library that wait for one another: what they compute is prepared first, and computed at once.

A call fills the caches with its tensors, and the Python and PyTorch before the next call then take several times as
long as they would for many calls in a row.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

__all__ = ["Group", "are_together", "at_once", "finish", "group", "hold", "run", "together"]


class _Queue:
    """Calls that wait, and the tensors that they read and write."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []
        self.tensors: list[Tensor] = []


class Group(threading.local):
    """Nodes of an autograd graph whose calls in backward wait for its ``finish``, in each thread for its own.

    Gradients may leave the nodes only through one that calls ``finish`` (``enter_group`` in ``ops/autograd.py``), and
    nothing else may read them before: PyTorch does not where each goes from one node to one other.
    """

    def __init__(self) -> None:  # in each thread that goes through the graph
        self._queue = _Queue()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let calls of this thread wait."""
        outside, _thread.queue = _thread.queue, self._queue
        try:
            yield
        finally:
            _thread.queue = outside

    def finish(self) -> None:
        """Run what waits."""
        with self.together():
            finish()


class _Thread(threading.local):
    """Where calls of this thread wait, None outside of ``together``, and the group that its nodes belong to."""

    queue: _Queue | None = None
    group: Group | None = None


_thread = _Thread()


@contextmanager
def together(backward: Group | None = None) -> Iterator[None]:
    """Let calls of this thread wait until the end, or the next ``finish``; they run in order.

    Until then nothing but such calls may write what they read, or read or write what they compute. The implementations
    of the operations say whether they heed that (``ops/registry.py``); PyTorch's own functions do not. The nodes made
    here belong to the group ``backward``.
    """
    finish()
    outside = _thread.queue, _thread.group
    try:
        _thread.queue, _thread.group = _Queue(), backward
        yield
        finish()
    finally:
        _thread.queue, _thread.group = outside


@contextmanager
def at_once() -> Iterator[None]:
    """Inside ``together``: run what waits, and then each call when it is made."""
    finish()
    outside, _thread.queue = _thread.queue, None
    try:
        yield
    finally:
        _thread.queue = outside


def are_together() -> bool:
    """Whether calls of this thread would wait."""
    return _thread.queue is not None


def group() -> Group | None:
    """The group that nodes made now belong to."""
    return _thread.group


def finish() -> None:
    """Run what waits."""
    if (queue := _thread.queue) is None or not queue.calls:
        return
    calls, tensors = queue.calls, queue.tensors
    queue.calls, queue.tensors = [], []
    for compute in calls:
        compute()
    del tensors  # they live until all have run


def hold(x: Tensor) -> None:
    """Keep a tensor alive until the calls that wait have run, the one that is being prepared among them."""
    if _thread.queue is not None:
        _thread.queue.tensors.append(x)


def run(compute: Callable[[], None]) -> None:
    """Run a call, or let it wait."""
    if _thread.queue is None:
        compute()
    else:
        _thread.queue.calls.append(compute)
