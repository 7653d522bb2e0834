"""Programs: native calls that are recorded once and run again, without the Python that has led to them.

A model of twelve blocks calls the native library some ninety times, and twice as often in a training step. Between two
calls Python checks arguments, looks up packed weights and asks for memory, while the processor waits with cold caches.
A program runs the same calls in the same order, so it computes the same bits; only memory differs. The address of each
tensor is recorded as a place in a piece of memory, which is found again when the program runs: given memory, new memory
for what the calls write, a packed weight, or a tensor that lasts.

A tensor of which nothing is known would have an address that means nothing later. So one that comes from anywhere else,
or something else than native calls between them, makes what is recorded no program.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, UntypedStorage

from insvp_fast.runtime import buffers, native
from insvp_fast.runtime.prepack import Use, Uses

__all__ = ["Given", "New", "Piece", "Program", "Recorder"]


@dataclass(frozen=True)
class Given:
    """Memory that is given when a program runs."""

    number: int


@dataclass(frozen=True)
class New:
    """Memory that a program asks for when it runs; it serves several tensors, one after the other."""

    number: int


class _Packed(NamedTuple):
    use: int  # of ``prepack.Uses``
    number: int  # in the tuple of tensors that is used


class _Lasting(NamedTuple):
    tensor: Tensor
    layout: tuple[torch.Size, tuple[int, ...], torch.dtype]


Piece = Given | New | _Packed | _Lasting


class _Place(NamedTuple):
    """Where an argument points to."""

    argument: int
    piece: int
    offset: int  # bytes


class Program:
    """Recorded calls. Of what they read and write, nothing is kept but tensors that last.

    Attributes:
        weights: those of which the packed weights are made.
    """

    def __init__(self, recorder: Recorder, outputs: Sequence[tuple[int, Tensor] | None]) -> None:
        self._calls, self._pieces, self._uses = recorder.calls, recorder.pieces, recorder.uses
        self.weights = recorder.uses.weights()
        self._new: list[tuple[Sequence[int], torch.dtype]] = [((nbytes,), torch.uint8) for nbytes in recorder.sizes]
        self._outputs = [None if output is None else output[0] for output in outputs]
        for output in outputs:
            if output is not None:
                self._new[output[0]] = output[1].shape, output[1].dtype

    def run(self, given: Sequence[int]) -> list[Tensor] | None:
        """Run the calls where given memory starts at other addresses; returns all new memory.

        None, and nothing is done, if weights or tensors that last have other sizes than they had.
        """
        packed = self._uses.made()
        if packed is None or any(_layout(p.tensor) != p.layout for p in self._pieces if isinstance(p, _Lasting)):
            return None
        new = [buffers.empty(shape, dtype) for shape, dtype in self._new]
        starts = [self._start(piece, given, new, packed) for piece in self._pieces]
        for call, places in self._calls:
            args = [*call.args]
            for argument, piece, offset in places:
                args[argument] = starts[piece] + offset
            call.run(args)
        return new

    @staticmethod
    def _start(
        piece: Piece, given: Sequence[int], new: Sequence[Tensor], packed: Sequence[tuple[Tensor | None, ...]]
    ) -> int:
        if isinstance(piece, Given):
            return given[piece.number]
        if isinstance(piece, New):
            return new[piece.number].data_ptr()
        x = piece.tensor if isinstance(piece, _Lasting) else packed[piece.use][piece.number]
        return 0 if x is None else x.untyped_storage().data_ptr()

    def outputs(self, new: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """Of all new memory, that which the outputs are in."""
        return tuple(None if number is None else new[number] for number in self._outputs)


def _layout(x: Tensor) -> tuple[torch.Size, tuple[int, ...], torch.dtype]:
    return x.shape, x.stride(), x.dtype


class _Known(NamedTuple):
    """Memory is known by its storage, an object that lives as long as it does."""

    storage: weakref.ref[UntypedStorage]
    piece: int


class Recorder:
    """See ``recording.Recording``.

    Args:
        given: tensors in all the memory that will be given when the program runs.
        before: whose memory may be read; what is given and new in it is then given behind ``given``.

    Attributes:
        taken: what was read of the recorder before, and where that starts.
    """

    def __init__(self, given: Sequence[Tensor], before: Recorder | None = None) -> None:
        self.calls: list[tuple[native.Call, list[_Place]]] = []
        self.pieces: list[Piece] = []
        self.sizes: list[int] = []  # of new memory, in bytes
        self.uses = Uses()
        self.taken: dict[Given | New, int] = {}
        self._obstacle: str | None = None
        self._before, self._num_given = before, len(given)
        self._known: dict[int, _Known] = {}
        self._free: defaultdict[int, list[int]] = defaultdict(list)  # pieces of new memory that is gone, by size
        self._pointers: dict[int, tuple[int, int] | None] = {}  # of the call that is being prepared
        for number, x in enumerate(given):
            self._know(x.untyped_storage(), self._piece(Given(number)))

    def _piece(self, piece: Piece) -> int:
        self.pieces.append(piece)
        return len(self.pieces) - 1

    def _know(self, storage: UntypedStorage, piece: int) -> None:
        self._known[id(storage)] = _Known(weakref.ref(storage), piece)

    def new(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        free = self._free[storage.nbytes()]
        if free:
            piece = free.pop()
        else:
            piece = self._piece(New(len(self.sizes)))
            self.sizes.append(storage.nbytes())
        # what is written later may be where this was
        self._known[id(storage)] = _Known(weakref.ref(storage, lambda _: free.append(piece)), piece)

    def packed(self, made: Sequence[Tensor | None], use: Use) -> None:
        number = self.uses.add(use)
        for i, x in enumerate(made):
            if x is not None and x.layout is torch.strided:  # not oneDNN's, which no native call reads
                self._know(x.untyped_storage(), self._piece(_Packed(number, i)))

    def lasts(self, x: Tensor) -> None:
        self._know(x.untyped_storage(), self._piece(_Lasting(x, _layout(x))))

    def find(self, storage: UntypedStorage) -> int | None:
        """The number of a piece; None if the memory is of another kind."""
        known = self._known.get(id(storage))
        if known is not None and known.storage() is storage:
            return known.piece
        if self._before is None or (number := self._before.find(storage)) is None:
            return None
        piece = self._before.pieces[number]
        if isinstance(piece, _Packed):
            piece = _Packed(self.uses.add(self._before.uses.without_look(piece.use)), piece.number)
        elif isinstance(piece, Given | New):
            self.taken[piece] = storage.data_ptr()
            piece = Given(self._num_given + len(self.taken) - 1)
        self._know(storage, self._piece(piece))
        return len(self.pieces) - 1

    def hold(self, x: Tensor) -> None:
        storage, address = x.untyped_storage(), x.data_ptr()
        piece = self.find(storage)
        self._pointers[address] = None if piece is None else (piece, address - storage.data_ptr())

    def run(self, call: native.Call) -> None:
        places = []
        for argument, (kind, value) in enumerate(zip(call.argtypes, call.args, strict=False)):
            if kind is native.POINTER and value is not None:
                if (place := self._pointers.get(value)) is None:
                    self._obstacle = f"{call.name} reads or writes memory of another kind"
                else:
                    places.append(_Place(argument, *place))
        self._pointers.clear()
        self.calls.append((call, places))
        call()

    def interrupt(self) -> None:
        self._obstacle = "something else than native calls is between them"

    def program(self, outputs: Sequence[Tensor | None]) -> Program | None:
        """What was recorded, with outputs that are new memory; None if it cannot run again."""
        found: list[tuple[int, Tensor] | None] = []
        for x in outputs:
            if x is None:
                found.append(None)
                continue
            number = self.find(x.untyped_storage())
            piece = None if number is None else self.pieces[number]
            if not (isinstance(piece, New) and x.is_contiguous() and x.nbytes == x.untyped_storage().nbytes()):
                return None
            found.append((piece.number, x))
        return Program(self, found) if self._obstacle is None else None
