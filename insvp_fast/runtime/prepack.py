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
made of: capture a graph after a warm-up, and again when weights have changed. Outside of graphs, a stream waits for
what another has packed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, UntypedStorage

from insvp_fast.runtime import torch_private, waiting
from insvp_fast.runtime.fingerprint import Fingerprint, Region, broken_together, fingerprint

__all__ = ["clear", "packed", "verify"]

T = TypeVar("T")


class _Form:
    """Something made of weights. What a stream of a GPU has written, others wait for before they read it."""

    def __init__(self, value: Any, device: torch.device) -> None:
        self.value, self._device = value, device
        self._streams: set[int] | None = None  # that read it in order
        if device.type == "cuda":
            self._streams = {torch_private.current_stream(device)}
            self._made = torch.cuda.Event()
            self._made.record(torch.cuda.current_stream(device))

    def in_order(self) -> Any:
        """What was made, for the current stream."""
        if self._streams is not None and torch_private.current_stream(self._device) not in self._streams:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(self._made)
            for x in self.value if isinstance(self.value, tuple) else (self.value,):
                if x is not None:
                    x.record_stream(stream)  # its memory is not used again before this stream has read it
            self._streams.add(torch_private.current_stream(self._device))
        return self.value


@dataclass
class _Record:
    """What was made of some weights, and what these were like."""

    storages: tuple[weakref.ref[UntypedStorage], ...]
    state: list[int]  # the version and the address of each
    fingerprint: Fingerprint
    made: dict[object, _Form] = field(default_factory=dict)


_records: dict[object, _Record] = {}  # by where the weights are; without those whose weights are gone
_captured: dict[object, list[Any]] = {}  # by the same: what CUDA graphs read, until the weights are gone


def packed(sources: Sequence[Tensor | None], name: object, make: Callable[[], T], *, look: bool = True) -> T:
    """What ``make()`` makes of ``sources``, tensors or a tuple of them, kept under ``name`` until one of them changes.

    Args:
        sources: all weights that ``make`` reads.
        look: compare their contents too, as forward products do.
    """
    described = _describe(sources)
    if described is None:
        return make()
    key, storages, state = described
    weights = [w for w in sources if w is not None]
    capturing = weights[0].is_cuda and torch.cuda.is_current_stream_capturing()
    record = _records.get(key)
    # a look is no part of a graph, and a capture allows none
    if record is not None and not _is_current(record, storages, state, look and not capturing):
        record = None
    if capturing:
        if record is None or name not in record.made:  # memory taken during a capture belongs to the graph
            return make()
        _keep_for_graphs(key, weights, record.made[name].value)
        return cast(T, record.made[name].value)  # ``torch.cuda.graph`` has waited for all streams
    if record is None:
        record = _records[key] = _new_record(key, weights, state)
    form = record.made.get(name)
    if form is None:
        with torch.no_grad():
            form = record.made[name] = _Form(make(), weights[0].device)
    made = form.in_order()
    if look and (recording := waiting.recording()) is not None:
        recording.rests_on(made, Use(sources, record, form))
    return cast(T, made)


class Use:
    """That something reads what was made of weights, which it does not keep alive."""

    def __init__(self, sources: Sequence[Tensor | None], record: _Record, form: _Form) -> None:
        self._sources, self._record, self._form = sources, weakref.ref(record), weakref.ref(form)

    def current(self) -> tuple[object, _Record, Any] | None:
        """The key of what was made, and this, if all that PyTorch knows of the weights is as it was."""
        record, form, described = self._record(), self._form(), _describe(self._sources)
        if record is None or form is None or described is None or _records.get(described[0]) is not record:
            return None
        current = _is_current(record, *described[1:], look=False)
        return (described[0], record, form.value) if current else None


class Uses:
    """All that a program of native calls reads of packed weights."""

    def __init__(self) -> None:
        self._uses: list[Use] = []
        self._broken: Callable[[], bool] | None = None

    def add(self, use: Use) -> None:
        self._uses.append(use)

    def current(self) -> list[Any] | None:
        """What was made of the weights, as ``packed`` would return it after a look at all of them; None if it is not.

        As long as the list lives, so do the tensors in it.
        """
        records, made = {}, []
        for use in self._uses:
            if (found := use.current()) is None:
                return None
            key, record, value = found
            records[key] = record
            made.append(value)
        if self._broken is None:
            self._broken = broken_together([record.fingerprint for record in records.values()])
        if not self._broken():
            return made
        _drop_broken(records)  # a look at each would be one at its next sample
        return None


def _describe(sources: Sequence[Tensor | None]) -> tuple[object, list[UntypedStorage], list[int]] | None:
    """What names weights as long as their storages live, also when these are moved; the storages; what PyTorch knows of
    writes to them and of moves. None if it does not count writes."""
    storages: list[UntypedStorage] = []
    places: list[object] = []
    state: list[int] = []
    for w in sources:
        if w is None:
            places.append(None)
            continue
        if w.is_inference():  # it has no version counter
            return None
        storage = w.untyped_storage()
        storages.append(storage)
        places += id(storage), w.storage_offset(), w.shape, w.stride(), w.dtype
        state += w._version, w.data_ptr()
    return tuple(places), storages, state


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
    return _drop_broken(_records)


def _drop_broken(records: Mapping[object, _Record]) -> int:
    stale = [key for key, record in list(records.items()) if record.fingerprint.broken_anywhere()]
    for key in stale:
        _records.pop(key, None)
    return len(stale)


def _is_current(record: _Record, storages: Sequence[UntypedStorage], state: list[int], look: bool) -> bool:
    for known, storage in zip(record.storages, storages, strict=True):
        if known() is not storage:
            return False
    return record.state == state and not (look and record.fingerprint.broken())


def _new_record(key: object, weights: Sequence[Tensor], state: list[int]) -> _Record:
    def drop(storage: weakref.ref[UntypedStorage]) -> None:
        record = _records.get(key)
        # a new storage may have the number of the old one, and a record of its own
        if record is not None and any(s is storage for s in record.storages):
            _records.pop(key, None)

    storages = tuple(weakref.ref(w.untyped_storage(), drop) for w in weights)
    regions = [Region.of(w, storage) for w, storage in zip(weights, storages, strict=True)]
    # before anything is made: a write between the two will be seen
    return _Record(storages, state, fingerprint(regions, weights[0].device), {})
