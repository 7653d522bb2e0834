"""Functions of tensors that run as programs of native calls once these are recorded, with their gradients."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from insvp_fast.ops.autograd import first_order
from insvp_fast.runtime import prepack, recording, torch_private
from insvp_fast.runtime.programs import Given, Memory, New, Packed, Program, Read, Recorder

__all__ = ["Programs"]

MOST = 64  # programs that are kept of a model: for each shape of batches some, with and without gradients

Tensors = Sequence[Tensor | None]


class _Pair(NamedTuple):
    """A program, and that of its gradients, to which ``kept`` of the former's memory is given besides gradients."""

    forward: Program
    backward: Program
    kept: Sequence[Given | New | Packed]


class Programs:
    """The programs of a model, by what decides which calls they make."""

    def __init__(self) -> None:
        self._programs: OrderedDict[Hashable, Program | _Pair | None] = OrderedDict()

    def run(self, key: Hashable, inputs: Tensors, compute: Callable[[Tensors], Tensors]) -> Tensors:
        """``compute(inputs)``, by a program as soon as it, and its gradients if there are any, have been recorded.

        Args:
            key: with the layouts of the inputs, all that decides which native calls ``compute`` makes, but the values
                of packed weights.
            inputs: all tensors that it reads, but those that are ``native.lasting``. Where they have gradients, each
                of them and of the results in between is used once, so that PyTorch adds no gradients.
        """
        if torch_private.dispatches(inputs) or recording.current() is not None:
            return compute(inputs)
        needs = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs)
        given, layouts = _given(inputs)
        key = key, needs, layouts
        program = self._programs.get(key)
        if program is None and key in self._programs:
            return compute(inputs)
        if program is not None:
            with contextlib.suppress(KeyError):  # another thread may have dropped it
                self._programs.move_to_end(key)
            pair, forward = (program, program.forward) if isinstance(program, _Pair) else (None, program)
            read, later = forward.read(), None if pair is None else pair.backward.read()
            if read is not None and (pair is None or later is not None):
                memory = forward.run(_starts(given), read)
                return forward.outputs(memory) if pair is None else _Replayed.apply(pair, memory, later, *inputs)
            # weights have changed: others would be refused too, and until then hold what was made of the old ones
            self._programs = OrderedDict()
        if any(needs):
            if not _may_hook():
                return compute(inputs)
            return cast(Tensors, _Recorded.apply(self, key, compute, *inputs))
        recorder = Recorder(given)
        outputs = recording.record(recorder, lambda: compute(inputs))
        program = recorder.program(outputs)
        self.keep(key, program if program is not None and _agrees(program, _starts(given), outputs) else None)
        return outputs

    def keep(self, key: Hashable, program: Program | _Pair | None) -> None:
        """Note what was recorded, or that it was no program."""
        programs = self._programs  # which another thread may replace
        programs[key] = program
        while len(programs) > MOST:
            programs.popitem(last=False)


def _may_hook() -> bool:
    """Whether saved tensors may pass through hooks, see ``torch.autograd.graph.disable_saved_tensors_hooks``."""
    try:
        with saved_tensors_hooks(lambda x: x, lambda x: x):
            return True
    except RuntimeError:
        return False


def _given(inputs: Tensors) -> tuple[list[Tensor], Hashable]:
    """One tensor for each storage of the inputs, and where in the storages these are."""
    numbers: dict[int, int] = {}
    given: list[Tensor] = []
    layouts: list[Hashable] = []
    for x in inputs:
        if x is None:
            layouts.append(None)
            continue
        number = numbers.setdefault(id(x.untyped_storage()), len(given))
        if number == len(given):
            given.append(x)
        layouts.append((x.shape, x.stride(), x.storage_offset(), x.dtype, x.device, number))
    return given, tuple(layouts)


def _starts(tensors: Sequence[Tensor]) -> list[int]:
    return [x.untyped_storage().data_ptr() for x in tensors]


@first_order("programs", "PyTorch's own modules")
class _Recorded(torch.autograd.Function):
    """Computes a function and its gradients as they are, and takes note of them."""

    @staticmethod
    def forward(ctx: Any, programs: Programs, key: Hashable, compute: Any, *inputs: Tensor | None) -> Any:
        own = [None if x is None else x.detach().requires_grad_(x.requires_grad) for x in inputs]
        saved, recorder = _Saved(), Recorder(_given(own)[0])
        with torch.enable_grad(), saved_tensors_hooks(saved.pack, saved.unpack):
            outputs = recording.record(recorder, lambda: compute(own))
        # weights themselves, not aliases: only they tell a program whether their memory has been replaced
        weights = {prepack.place(w): w for w in recorder.uses.weights()}
        ctx.save_for_backward(*(weights.get(prepack.place(x), x) for x in saved.tensors))
        ctx.places = [prepack.place(x) for x in saved.tensors]
        saved.tensors = ()
        forward = recorder.program(outputs)
        if forward is None:
            programs.keep(key, None)
        ctx.graph, ctx.record = (own, outputs, saved), (programs, key, recorder, forward)
        return tuple(x.detach() for x in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (own, outputs, saved), (programs, key, before, forward) = ctx.graph, ctx.record
        given = [torch.empty(g.shape, dtype=g.dtype, device="cpu").copy_(g) for g in grads]  # memory of their own
        recorder = Recorder(given, before)
        wanted = [x for x in own if x is not None and x.requires_grad]

        def differentiate() -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(outputs, wanted, given, retain_graph=True, allow_unused=True)

        saved.tensors = ctx.saved_tensors
        moved = [prepack.place(x) for x in saved.tensors] != ctx.places  # the program would read the new memory
        try:
            found = iter(recording.record(recorder, differentiate))
            results = [next(found) if x is not None and x.requires_grad else None for x in own]
            if forward is not None and not moved:
                backward = recorder.program(results)
                if backward is not None and _agrees(backward, [*_starts(given), *recorder.taken.values()], results):
                    programs.keep(key, _Pair(forward, backward, [*recorder.taken]))
                else:
                    programs.keep(key, None)
        finally:
            saved.tensors = ()
        return *(None,) * 3, *results


def _agrees(program: Program, given: Sequence[int], expected: Tensors) -> bool:
    """Whether a program computes these bits; not if PyTorch has written into the memory of native calls."""
    if (read := program.read()) is None:
        return False
    memory = program.run(given, read, poison=True)
    pairs = [(x, y) for x, y in zip(program.outputs(memory), expected, strict=True) if x is not None and y is not None]
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in pairs)


class _Saved(threading.local):
    """What a recorded graph saves for backward, and reads in each thread that goes through it.

    Between the two PyTorch holds it for the function that records, and frees it with that.
    """

    tensors: Sequence[Tensor] = ()

    def pack(self, x: Tensor) -> int:
        self.tensors = *self.tensors, x.detach()
        return len(self.tensors) - 1

    def unpack(self, number: int) -> Tensor:
        return self.tensors[number]


@first_order("programs", "PyTorch's own modules")
class _Replayed(torch.autograd.Function):
    """What a program has computed, and its gradients by another."""

    @staticmethod
    def forward(ctx: Any, pair: _Pair, memory: Memory, read: Read, *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
        given, _ = _given(inputs)
        kept = [given[piece.number] if isinstance(piece, Given) else memory.tensor(piece) for piece in pair.kept]
        # the latter, so that PyTorch sees whether they are written; what is read is ``read``, wherever they are then
        ctx.save_for_backward(*kept, *pair.backward.sources)
        ctx.backward, ctx.read, ctx.num_kept = pair.backward, read, len(kept)
        return pair.forward.outputs(memory)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors[: ctx.num_kept]
        given = [_plain(g) for g in grads]
        memory = ctx.backward.run([g.data_ptr() for g in given] + _starts(kept), ctx.read)
        return *(None,) * 3, *ctx.backward.outputs(memory)


def _plain(grad: Tensor) -> Tensor:
    """A gradient in memory that native calls can read."""
    if torch_private.dispatches([grad]):  # zeros without memory, numbers without their sign
        return torch.empty(grad.shape, dtype=grad.dtype, device="cpu").copy_(grad)
    return grad.contiguous()
