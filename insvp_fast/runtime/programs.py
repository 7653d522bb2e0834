"""Programs: native calls that are recorded once and run again, without the Python that has led to them.

A model of twelve blocks calls the native library some ninety times. Between two calls Python checks arguments, looks up
packed weights and asks for memory, which for a single image takes as long as a fifth of the products. A program runs
the same calls in the same order, so it computes the same bits; only memory differs. The address of each tensor is
recorded as a place in a piece of memory: one that is given, new memory for what the calls write, or what lasts, as a
packed weight. When the program runs, the given tensors and the new memory are others, and the rest has to be what it
was.

A tensor of which nothing else is known would have an address that means nothing later. So one that comes from anywhere
else, or a result that PyTorch has to see, makes what is recorded no program, and every call of it is prepared anew.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, UntypedStorage

from insvp_fast.runtime import buffers, native, torch_private, waiting
from insvp_fast.runtime.prepack import Use, Uses

__all__ = ["Programs"]

MOST = 8  # programs of a model, for as many shapes of batches; each is about 100 KB without its memory


class _Place(NamedTuple):
    """Where an argument points to."""

    argument: int
    piece: int  # the number of a given storage, or behind those of new memory
    offset: int  # bytes


class _Output(NamedTuple):
    piece: int
    shape: torch.Size
    dtype: torch.dtype


class _Program:
    """Calls, the pieces of memory that they read and write, and the packed weights that they read."""

    def __init__(self, outputs: Sequence[_Output | None], recording: _Recording) -> None:
        self._outputs, self._calls = outputs, recording.calls
        self._new = [(size,) for size in recording.new]  # bytes
        self._shapes = {output.piece: output for output in outputs if output is not None}
        self._uses, self._lasting = recording.uses, recording.lasting

    def weights(self) -> list[object] | None:
        """What the calls read besides the given memory, to be kept while they run; None if it is not what it was."""
        if any(x.data_ptr() != address for x, address in self._lasting):
            return None
        return self._uses.current()

    def run(self, given: Sequence[UntypedStorage]) -> list[Tensor | None]:
        """The outputs for other memory than that which was recorded, with the same layout."""
        memory: list[Tensor] = []
        for piece, nbytes in enumerate(self._new, len(given)):
            own = self._shapes.get(piece)
            memory.append(buffers.empty(nbytes, torch.uint8) if own is None else buffers.empty(own.shape, own.dtype))
        starts = [*(storage.data_ptr() for storage in given), *(x.data_ptr() for x in memory)]
        for call, places in self._calls:
            args = [*call.args]
            for argument, piece, offset in places:
                args[argument] = starts[piece] + offset
            call.run(args)
        return [None if output is None else memory[output.piece - len(given)] for output in self._outputs]


class _Recording:
    """See ``waiting.Recording``. Memory is known by its storage, an object that lives as long as the memory."""

    def __init__(self, given: Sequence[UntypedStorage]) -> None:
        self.calls: list[tuple[native.Call, list[_Place]]] = []
        self.new: list[int] = []
        self.uses = Uses()
        self.lasting: list[tuple[Tensor, int]] = []
        self.obstacle: str | None = None
        self._num_given = len(given)
        self._known: dict[int, tuple[weakref.ref[UntypedStorage], int | None]] = {}  # None: it lasts
        self._pieces: dict[tuple[int, int], int] = {}  # new memory by address and size: one piece serves several times
        self._pointers: dict[int, tuple[int, int] | None] = {}  # of the call that is being prepared
        for piece, storage in enumerate(given):
            self._know(storage, piece)

    def _know(self, storage: UntypedStorage, piece: int | None) -> None:
        self._known[id(storage)] = weakref.ref(storage), piece

    def lent(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        block = storage.data_ptr(), storage.nbytes()
        if block not in self._pieces:
            self._pieces[block] = self._num_given + len(self.new)
            self.new.append(storage.nbytes())
        self._know(storage, self._pieces[block])

    def lasts(self, x: Tensor) -> None:
        self.lasting.append((x, x.data_ptr()))
        self._know(x.untyped_storage(), None)

    def rests_on(self, made: object, use: Use) -> None:
        self.uses.add(use)
        for x in made if isinstance(made, tuple) else (made,):
            if isinstance(x, Tensor):
                self._know(x.untyped_storage(), None)

    def piece(self, x: Tensor) -> int | None:
        """The number of the piece that ``x`` lies in; None for what lasts. Raises KeyError for other memory."""
        storage = x.untyped_storage()
        known, piece = self._known[id(storage)]
        if known() is not storage:
            raise KeyError
        return piece

    def hold(self, x: Tensor) -> None:
        address = x.data_ptr()
        self._pointers.pop(address, None)
        try:
            piece = self.piece(x)
        except KeyError:
            return
        self._pointers[address] = None if piece is None else (piece, address - x.untyped_storage().data_ptr())

    def run(self, call: native.Call) -> None:
        places = []
        for argument, (kind, value) in enumerate(zip(call.argtypes, call.args, strict=False)):
            if kind is native.POINTER and value is not None:
                if value not in self._pointers:
                    self.obstacle = f"{call.name} reads or writes memory of another kind"
                elif (place := self._pointers[value]) is not None:
                    places.append(_Place(argument, *place))
        self._pointers.clear()
        self.calls.append((call, places))
        call()

    def finish(self) -> None:
        self.obstacle = "something else than native calls reads what they compute"

    def program(self, outputs: Sequence[Tensor | None]) -> _Program | None:
        """What was recorded; None if it cannot run again."""
        found: list[_Output | None] = []
        for x in outputs:
            if x is None:
                found.append(None)
                continue
            try:
                piece = self.piece(x)
            except KeyError:
                return None
            whole = x.is_contiguous() and x.nbytes == x.untyped_storage().nbytes()
            if piece is None or piece < self._num_given or not whole:
                return None
            found.append(_Output(piece, x.shape, x.dtype))
        return _Program(found, self) if self.obstacle is None else None


class Programs:
    """The programs of a model, by what decides which calls they make."""

    def __init__(self) -> None:
        self._programs: OrderedDict[Hashable, _Program | None] = OrderedDict()

    def run(
        self,
        key: Hashable,
        inputs: Sequence[Tensor | None],
        compute: Callable[[], Sequence[Tensor | None]],
    ) -> Sequence[Tensor | None]:
        """``compute()``, by a program from the second time on.

        Args:
            key: with the layouts of the inputs, all that decides which native calls ``compute`` makes, but the values
                of packed weights.
            inputs: all other tensors that it reads, without gradients, but those that are ``native.lasting``.
        """
        if torch_private.dispatches(inputs):
            return compute()
        given, layouts = _layouts(inputs)
        key = key, layouts
        program = self._programs.get(key)
        if program is not None and (weights := program.weights()) is not None:
            outputs = program.run(given)
            del weights  # they are held until all calls have run
            return outputs
        if program is None and key in self._programs:
            return compute()
        recording = _Recording(given)
        computed = waiting.record(recording, compute)
        self._programs[key] = recording.program(computed)
        while len(self._programs) > MOST:
            self._programs.popitem(last=False)
        return computed


def _layouts(inputs: Sequence[Tensor | None]) -> tuple[list[UntypedStorage], Hashable]:
    """The storages of tensors, each once, and where in them these are."""
    given: dict[int, UntypedStorage] = {}
    numbers: dict[int, int] = {}
    layouts: list[Hashable] = []
    for x in inputs:
        if x is None:
            layouts.append(None)
            continue
        storage = x.untyped_storage()
        given.setdefault(id(storage), storage)
        number = numbers.setdefault(id(storage), len(numbers))
        layouts.append((x.shape, x.stride(), x.storage_offset(), x.dtype, number))
    return [*given.values()], tuple(layouts)
