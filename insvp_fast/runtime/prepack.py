"""Packed weights: frozen weights in the layout of a product, made once, and again when they change.

A packed weight is dropped when the memory of the weights that it was made of is freed, and is never used after they
have changed. Two things are compared before each forward product:

- what PyTorch knows of the weights: storage, address, layout and dtype, which change when a tensor is replaced, and the
  version counter, which counts operations in place, ``load_state_dict`` and optimizers that loop over parameters;
- what is in the weights, for writes that the counter does not see: ``weight.data.add_()``, fused optimizers, NumPy and
  DLPack aliases, flat buffers that weights are views of, two parameters with one storage. A look at a fingerprint reads
  a 128th of a large weight, another 128th each time, and weights up to 64 KB in full: a write of 8 KB or more in a row
  is seen at once, a smaller one within 128 forward passes. Without the native library a look reads less, and a small
  write may take thousands of passes. On a GPU, which is not waited for, all of it takes a pass or a few more
  (``DeviceFingerprint``).

A backward pass relies on the check of the forward pass. ``verify()`` compares everything, ``clear()`` drops everything.
A CUDA graph reads the packed weights that it was captured with, so these live as long as the weights that they were
made of: capture a graph after a warm-up, and again when weights have changed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, UntypedStorage

from insvp_fast.runtime.fingerprint import Fingerprint, Region, fingerprint

__all__ = ["clear", "packed", "verify"]

T = TypeVar("T")


@dataclass
class _Record:
    """What was made of some weights, and what these were like."""

    storages: tuple[weakref.ref[UntypedStorage], ...]
    state: tuple[object, ...]
    fingerprint: Fingerprint
    made: dict[object, Any] = field(default_factory=dict)


_records: dict[object, _Record] = {}  # by where the weights are; without those whose weights are gone
_captured: dict[object, list[Any]] = {}  # by the same: what CUDA graphs read, until the weights are gone


def packed(sources: Sequence[Tensor | None], name: object, make: Callable[[], T], *, look: bool = True) -> T:
    """What ``make()`` makes of ``sources``, kept under ``name`` until one of them changes.

    Args:
        sources: all weights that ``make`` reads.
        look: compare their contents too, as forward products do.
    """
    weights = [w for w in sources if w is not None]
    if any(w.is_inference() for w in weights):  # they have no version counter
        return make()
    key = tuple(None if w is None else _place(w) for w in sources)
    record = _records.get(key)
    if record is not None and not _is_current(record, weights, look):
        record = None
    if weights[0].is_cuda and torch.cuda.is_current_stream_capturing():
        if record is None or name not in record.made:  # memory taken during a capture belongs to the graph
            return make()
        _keep_for_graphs(key, weights, record.made[name])
    if record is None:
        record = _records[key] = _new_record(key, weights)
    if name not in record.made:
        with torch.no_grad():
            record.made[name] = make()
    return cast(T, record.made[name])


def _keep_for_graphs(key: object, weights: Sequence[Tensor], made: Any) -> None:
    if key not in _captured:
        for weight in weights:
            weakref.finalize(weight.untyped_storage(), _captured.pop, key, None).atexit = False
    _captured.setdefault(key, []).append(made)


def clear() -> None:
    """Drop all packed weights, but those that CUDA graphs read; each is made anew when it is next used."""
    _records.clear()


def verify() -> int:
    """Compare all of every weight with what was packed, and drop what is out of date; on a GPU, wait for it.

    Returns:
        The number of products whose weights had changed.
    """
    stale = [key for key, record in list(_records.items()) if record.fingerprint.broken_anywhere()]
    for key in stale:
        _records.pop(key, None)
    return len(stale)


def _is_current(record: _Record, weights: Sequence[Tensor], look: bool) -> bool:
    return (
        all(storage() is w.untyped_storage() for storage, w in zip(record.storages, weights, strict=True))
        and record.state == _state(weights)
        and not (look and record.fingerprint.broken())
    )


def _new_record(key: object, weights: Sequence[Tensor]) -> _Record:
    def drop(storage: weakref.ref[UntypedStorage]) -> None:
        record = _records.get(key)
        # a new storage may have the number of the old one, and a record of its own
        if record is not None and any(s is storage for s in record.storages):
            _records.pop(key, None)

    storages = tuple(weakref.ref(w.untyped_storage(), drop) for w in weights)
    regions = [Region.of(w, storage) for w, storage in zip(weights, storages, strict=True)]
    # before anything is made: a write between the two will be seen
    return _Record(storages, _state(weights), fingerprint(regions, weights[0].device), {})


def _place(weight: Tensor) -> tuple[object, ...]:
    """What names a weight as long as its storage lives, also when that is moved."""
    return id(weight.untyped_storage()), weight.storage_offset(), weight.shape, weight.stride(), weight.dtype


def _state(weights: Sequence[Tensor]) -> tuple[object, ...]:
    """What PyTorch knows of writes to weights, and of moves of their storage."""
    return tuple((w._version, w.data_ptr()) for w in weights)
