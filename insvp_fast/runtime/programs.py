"""Programs: native calls that are recorded once and run again, without the Python that has led to them.

A model of twelve blocks calls the native library some ninety times, and twice as often in a training step. Between two
calls Python checks arguments, looks up packed weights and asks for memory, while the processor waits with cold caches.
A program makes the same calls in the same order, within one call of the library, so it computes the same bits; only
memory differs. The address of each tensor is recorded as a place in a piece of memory, which is found again when the
program runs: given memory, new memory for what the calls write, a packed weight, or a tensor that lasts.

A tensor of which nothing is known would have an address that means nothing later. So one that comes from anywhere else,
or something else than native calls between them, makes what is recorded no program.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, UntypedStorage

from insvp_fast.runtime import buffers, native
from insvp_fast.runtime.prepack import Use, Uses
from insvp_fast.runtime.recording import Recording

__all__ = ["Given", "Memory", "New", "Packed", "Program", "Read", "Recorder"]


@dataclass(frozen=True)
class Given:
    """Memory that is given when a program runs."""

    number: int


@dataclass(frozen=True)
class New:
    """Memory that a program asks for when it runs; it serves several tensors, one after the other."""

    number: int


@dataclass(frozen=True)
class Packed:
    """A packed weight."""

    use: int  # of ``prepack.Uses``
    number: int  # in the tuple of tensors that is used


@dataclass(frozen=True, eq=False)
class Lasting:
    """A tensor that is there when a program runs."""

    tensor: Tensor
    layout: object


Piece = Given | New | Packed | Lasting


class Read(NamedTuple):
    """What the calls of a program read that is not given; a pass that waits for its gradients holds it."""

    packed: Sequence[tuple[Tensor | None, ...]]
    lasting: Mapping[Lasting, Tensor]


class Memory(NamedTuple):
    """What a program has read and written."""

    given: Sequence[int]  # addresses
    new: Sequence[Tensor]
    read: Read

    def start(self, piece: Piece) -> int:
        """The address where a piece begins."""
        if isinstance(piece, Given):
            return self.given[piece.number]
        x = self.tensor(piece)
        return 0 if x is None else x.untyped_storage().data_ptr()

    def tensor(self, piece: New | Packed | Lasting) -> Tensor | None:
        """A tensor in a piece."""
        if isinstance(piece, Lasting):
            return self.read.lasting[piece]
        return self.new[piece.number] if isinstance(piece, New) else self.read.packed[piece.use][piece.number]


class Program:
    """Recorded calls. Of what they read and write, nothing is kept but tensors that last.

    Attributes:
        sources: the weights of which the packed ones are made, and the tensors that last.
    """

    def __init__(self, recorder: Recorder, outputs: Sequence[tuple[int, Tensor] | None]) -> None:
        self.steps, self._pieces, self._uses = native.Steps(recorder.calls), recorder.pieces, recorder.uses
        self._lasting = [piece for piece in recorder.pieces if isinstance(piece, Lasting)]
        self.sources = [*recorder.uses.weights(), *(piece.tensor for piece in self._lasting)]
        self._new: list[tuple[Sequence[int], torch.dtype]] = [((nbytes,), torch.uint8) for nbytes in recorder.sizes]
        self._outputs = [None if output is None else output[0] for output in outputs]
        for output in outputs:
            if output is not None:
                self._new[output[0]] = output[1].shape, output[1].dtype

    def read(self) -> Read | None:
        """What the calls would read now; None if weights or tensors that last have other sizes than they had."""
        packed = self._uses.made()
        if packed is None or any(_layout(piece.tensor) != piece.layout for piece in self._lasting):
            return None
        return Read(packed, {piece: piece.tensor.detach() for piece in self._lasting})

    def run(self, given: Sequence[int], read: Read, *, poison: bool = False) -> Memory:
        """Run the calls where given memory starts at other addresses.

        With ``poison`` all new memory is NaN before, so that what reads memory that no call has written gives other
        results.
        """
        memory = Memory(given, [buffers.empty(shape, dtype) for shape, dtype in self._new], read)
        if poison:
            for x in memory.new:
                x.view(-1).view(torch.uint8).fill_(0xFF)
        self.steps.run([*map(memory.start, self._pieces)])
        return memory

    def outputs(self, memory: Memory) -> tuple[Tensor | None, ...]:
        """The outputs, which are new memory."""
        return tuple(None if number is None else memory.new[number] for number in self._outputs)


def _layout(x: Tensor) -> object:
    return x.device, x.shape, x.stride(), x.storage_offset(), x.dtype


class _Known(NamedTuple):
    """Memory is known by its storage, an object that lives as long as it does."""

    storage: weakref.ref[UntypedStorage]
    piece: int
    version: int | None = None  # of the tensor that native calls write


def _version(x: Tensor) -> int | None:
    """How often PyTorch has written into a tensor or its views; None in inference mode, which does not count."""
    return None if x.is_inference() else x._version


class Recorder(Recording):
    """Takes note of calls, and of the places of the memory that they read and write.

    Args:
        given: tensors in all the memory that will be given when the program runs.
        before: whose memory may be read. But for what lasts, it is given behind ``given``.

    Attributes:
        taken: what was read of the recorder before, and where that starts.
    """

    def __init__(self, given: Sequence[Tensor], before: Recorder | None = None) -> None:
        self.calls: list[tuple[native.Call, list[native.Place]]] = []
        self.pieces: list[Piece] = []
        self.sizes: list[int] = []  # of new memory, in bytes
        self.uses = Uses()
        self.taken: dict[Given | New | Packed, int] = {}
        self._runs_again = True
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
        self._known[id(storage)] = _Known(weakref.ref(storage, lambda _: free.append(piece)), piece, _version(x))

    def packed(self, made: Sequence[Tensor | None], use: Use) -> None:
        readable = [x if x is not None and x.layout is torch.strided else None for x in made]  # not oneDNN's layout
        number = self.uses.add(use, readable)
        for i, x in enumerate(readable):
            if x is not None:
                self._know(x.untyped_storage(), self._piece(Packed(number, i)))

    def lasts(self, x: Tensor) -> None:
        piece = self.find(x.untyped_storage())
        known = None if piece is None else self.pieces[piece]
        if known is None:
            self._know(x.untyped_storage(), self._piece(Lasting(x, _layout(x))))
        elif not (isinstance(known, Lasting) and known.tensor is x):
            self._runs_again = False  # tensors that share memory may be replaced one by one

    def find(self, storage: UntypedStorage) -> int | None:
        """The number of a piece; None if the memory is of another kind."""
        known = self._known.get(id(storage))
        if known is not None and known.storage() is storage:
            return known.piece
        if self._before is None or (number := self._before.find(storage)) is None:
            return None
        piece = self._before.pieces[number]
        if not isinstance(piece, Lasting):
            self.taken[piece] = storage.data_ptr()
            piece = Given(self._num_given + len(self.taken) - 1)
        self._know(storage, self._piece(piece))
        return len(self.pieces) - 1

    def _find_written(self, x: Tensor) -> int | None:
        """The number of a piece, in which PyTorch must not have written what native calls would have to."""
        storage = x.untyped_storage()
        piece = self.find(storage)
        if piece is not None and (version := self._known[id(storage)].version) is not None:
            self._runs_again &= _version(x) == version
        return piece

    def hold(self, x: Tensor) -> None:
        storage, address = x.untyped_storage(), x.data_ptr()
        piece = self._find_written(x)
        self._pointers[address] = None if piece is None else (piece, address - storage.data_ptr())

    def run(self, call: native.Call) -> None:
        places = []
        for argument, (kind, value) in enumerate(zip(call.argtypes, call.args, strict=False)):
            if kind is native.ptr and value is not None:
                if (place := self._pointers.get(value)) is None:
                    self._runs_again = False
                else:
                    places.append(native.Place(argument, *place))
        self._pointers.clear()
        self.calls.append((call, places))
        call()

    def interrupt(self) -> None:
        self._runs_again = False

    def program(self, outputs: Sequence[Tensor | None]) -> Program | None:
        """What was recorded, with outputs that are new memory; None if it cannot run again."""
        found: list[tuple[int, Tensor] | None] = []
        for x in outputs:
            if x is None:
                found.append(None)
                continue
            number = self._find_written(x)
            piece = None if number is None else self.pieces[number]
            if not (isinstance(piece, New) and x.is_contiguous() and x.nbytes == x.untyped_storage().nbytes()):
                return None
            found.append((piece.number, x))
        return Program(self, found) if self._runs_again else None
