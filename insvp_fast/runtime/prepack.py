"""Packed weights: frozen weights in the layout of a product, made once, and again when they change.

A packed weight is dropped when the memory of the weights that it was made of is freed, and is never used after they
have changed. Two things are compared before each forward product:

- what PyTorch knows of the weights: storage, address, layout and dtype, which change when a tensor is replaced, and the
  version counter, which counts operations in place, ``load_state_dict`` and optimizers that loop over parameters;
- what is in the weights, for writes that the counter does not see: ``weight.data.add_()``, fused optimizers, NumPy and
  DLPack aliases, flat buffers that weights are views of, two parameters with one storage. A look at a fingerprint reads
  a 128th of a large weight, another 128th each time, and indices and weights up to 64 KB in full: a write of 8 KB or
  more in a row is seen at once, a smaller one within 128 forward passes. Without the native library a look reads less,
  and a small write may take thousands of passes. On a GPU, which is not waited for, all of it takes a pass or a few
  more (``DeviceFingerprint``).

A backward pass relies on the check of the forward pass, and reads the memory that the weights had in it. ``verify()``
compares everything, ``clear()`` drops everything.
A CUDA graph of the caller's reads the packed weights that it was captured with, so these live as long as the weights
that they were made of: capture a graph after a warm-up, and again when weights have changed. Those of a model itself
(``insvp_fast.ops.graphs``) are dropped then. Outside of graphs, a stream waits for what another has packed.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, UntypedStorage

from insvp_fast.runtime import recording, torch_private
from insvp_fast.runtime.fingerprint import Fingerprint, Region, fingerprint, look_at

__all__ = ["clear", "packed", "place", "verify"]

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

    key: object
    storages: tuple[weakref.ref[UntypedStorage], ...]
    state: list[int]  # the version and the address of each
    fingerprint: Fingerprint
    made: dict[object, _Form]


_records: dict[object, _Record] = {}  # by where the weights are; without those whose weights are gone
_captured: dict[object, list[Any]] = {}  # by the same: what CUDA graphs read, until the weights are gone
_counter = itertools.count(1)
_changes = 0  # another number whenever a record was added or dropped


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
        made = record.made[name].value  # ``torch.cuda.graph`` has waited for all streams
        if (noting := recording.current()) is None:
            _keep_for_graphs(key, weights, made)
        else:
            noting.packed(_tensors(made), Use(sources, name, make, look))
        return cast(T, made)
    if record is None:
        record = _add(_new_record(key, weights, state))
    form = record.made.get(name)
    if form is None:
        with torch.inference_mode(False), torch.no_grad():  # a backward pass may keep it
            form = record.made[name] = _Form(make(), weights[0].device)
    made = form.in_order()
    if (noting := recording.current()) is not None:
        noting.packed(_tensors(made), Use(sources, name, make, look))
    return cast(T, made)


class Use:
    """Asks for the same as a call of ``packed`` did."""

    def __init__(self, sources: Sequence[Tensor | None], name: object, make: Callable[[], Any], look: bool) -> None:
        self.sources, self.name, self.make, self.look = sources, name, make, look
        self._sizes = _sizes(sources)

    def fits(self) -> bool:
        """Whether the weights have the sizes that they had."""
        return _sizes(self.sources) == self._sizes

    def known(self) -> _Record | None:
        """What is known of the weights, if all that PyTorch knows of them is as it was."""
        described = _describe(self.sources)
        record = None if described is None else _records.get(described[0])
        if described is None or record is None or not _is_current(record, *described[1:], look=False):
            return None
        return record

    def made(self, record: _Record | None) -> tuple[Tensor | None, ...]:
        """What is made of the weights, without a look at them."""
        form = None if record is None else record.made.get(self.name)
        if form is not None:
            return _tensors(form.value)
        device = next(w.device.type for w in self.sources if w is not None)
        with torch.autocast(device, enabled=False):  # as where the operations ask
            return _tensors(packed(self.sources, self.name, self.make, look=False))


class _Found(NamedTuple):
    """What ``Uses`` found last; the records by weak references, as they would keep alive what was made."""

    state: list[object]  # what PyTorch knew of the weights
    records: list[weakref.ref[_Record] | None]
    broken: Callable[[], bool]  # by one look at all of these


class Uses:
    """All packed weights that a program of native calls, or a CUDA graph, uses."""

    def __init__(self, uses: Sequence[Use] = ()) -> None:
        self._uses = [*uses]
        self._made: dict[Hashable, tuple[int, int]] = {}  # where what the uses made is: their numbers and places
        self._chained: list[tuple[Hashable, int, int]] = []  # of these, what other uses make theirs of
        self._last: _Found | None = None  # one object, of which another thread never sees half

    def add(self, use: Use, made: Sequence[Tensor | None]) -> int:
        """The number of a use that has just made these; None for what no native call reads."""
        number = len(self._uses)
        self._uses.append(use)
        sources = {place(w) for w in use.sources if w is not None}
        self._chained += [(where, *self._made[where]) for where in sources & self._made.keys()]
        self._made |= {place(x): (number, i) for i, x in enumerate(made) if x is not None}
        return number

    def weights(self) -> list[Tensor]:
        """All that is packed, each once."""
        return [*{id(w): w for use in self._uses for w in use.sources if w is not None}.values()]

    def made(self) -> list[tuple[Tensor | None, ...]] | None:
        """For each use what ``packed`` would return, with one look at all weights.

        None if a size is another, or if something would be made of what was made of weights that have changed.
        """
        state: list[object] = [_changes, len(self._uses)]
        for use in self._uses:
            state += [None if w is None else (place(w), w._version, w.data_ptr()) for w in use.sources]
        last, found = self._last, list[_Record | None]()
        if last is not None and state == last.state:  # and no storage is gone, or its record would have been dropped
            found = [None if known is None else known() for known in last.records]
        else:
            if not all(use.fits() for use in self._uses):
                return None
            found = [use.known() for use in self._uses]
            records = [None if r is None else weakref.ref(r) for r in found]
            look = look_at([record.fingerprint for record in self._looked_at(found).values()])
            last = self._last = _Found(state, records, look)
        if last.broken():
            _drop_broken(self._looked_at(found))  # to look again at each would look at its next sample
            found = [None] * len(found)
        made = [use.made(record) for use, record in zip(self._uses, found, strict=True)]
        for where, number, i in self._chained:
            x = made[number][i]
            if x is None or place(x) != where:
                return None
        return made

    def _looked_at(self, found: Sequence[_Record | None]) -> dict[object, _Record]:
        return {r.key: r for use, r in zip(self._uses, found, strict=True) if use.look and r is not None}


def _tensors(made: Any) -> tuple[Tensor | None, ...]:
    return made if isinstance(made, tuple) else (made,)


def _sizes(tensors: Sequence[Tensor | None]) -> list[object]:
    return [None if x is None else (x.shape, x.dtype) for x in tensors]


def place(x: Tensor) -> Hashable:
    """What names the part of its memory that a tensor is, as long as that lives."""
    return id(x.untyped_storage()), x.storage_offset(), x.shape, x.stride(), x.dtype


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
        places.append(place(w))
        state += w._version, w.data_ptr()
    return tuple(places), storages, state


def _keep_for_graphs(key: object, weights: Sequence[Tensor], made: Any) -> None:
    if key not in _captured:
        for weight in weights:
            weakref.finalize(weight.untyped_storage(), _captured.pop, key, None).atexit = False
    _captured.setdefault(key, []).append(made)


def clear() -> None:
    """Drop all packed weights, but those that CUDA graphs read; each is made anew when it is next used."""
    for key in list(_records):
        _drop(key)


def verify() -> int:
    """Compare all of every weight with what was packed, and drop what is out of date; on a GPU, wait for it.

    Returns:
        The number of products whose weights had changed.
    """
    return _drop_broken(_records)


def _drop_broken(records: Mapping[object, _Record]) -> int:
    held = [(key, records.get(key)) for key in list(records)]  # records may go meanwhile, with their weights
    stale = [key for key, record in held if record is not None and record.fingerprint.broken_anywhere()]
    for key in stale:
        _drop(key)
    return len(stale)


def _add(record: _Record) -> _Record:
    global _changes
    _records[record.key] = record
    _changes = next(_counter)
    return record


def _drop(key: object) -> None:
    global _changes
    _records.pop(key, None)
    _changes = next(_counter)


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
            _drop(key)

    storages = tuple(weakref.ref(w.untyped_storage(), drop) for w in weights)
    regions: list[Region] = []
    for w, storage in zip(weights, storages, strict=True):
        region = Region.of(w, storage)
        regions += [region] if w.is_floating_point() else region.pieces()  # all of an index in each look
    # before anything is made: a write between the two will be seen
    return _Record(key, storages, state, fingerprint(regions, weights[0].device), {})
