"""One CUDA graph: a function of tensors as it was captured, with its gradients, and a launch of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from insvp_fast.ops.autograd import first_order
from insvp_fast.runtime import cuda_graphs, prepack, recording

__all__ = [
    "Graph",
    "Launch",
    "Tensors",
    "evaluate",
    "random_state",
    "same_random_numbers",
    "set_random_state",
]

Tensors = Sequence[Tensor]


class Graph:
    """A captured function, and its gradients.

    Attributes:
        space: its memory. Of it are held what goes in and out, but nothing that is kept for backward.
        has_gradients: whether it keeps something for a backward pass, of which it has a graph too.
        copies_only_image: whether all inputs but the first are read where they are.
        draws: whether it draws random numbers, which is known once it has been evaluated.
    """

    def __init__(
        self,
        space: cuda_graphs.Space,
        inputs: Tensors,
        needs: Sequence[bool],
        compute: Callable[[Tensors], Tensors],
    ) -> None:
        self.space, self._needs, self.has_gradients, weights = space, needs, any(needs), _Weights()
        self._found: list[Tensor | None] = []
        self.draws = False
        own = _own(inputs, needs)
        with _as_called(own[0].device, needs):
            outputs, self._forward = space.capture(lambda: recording.record(weights, lambda: compute(own)))
            self._outputs = [x.detach() for x in outputs]
            self._grads = [torch.zeros_like(x) for x in self._outputs] if any(needs) else []
            if any(needs):

                def differentiate() -> Sequence[Tensor | None]:
                    return _differentiate(outputs, own, self._grads)

                found, self._backward = space.capture(lambda: recording.record(weights, differentiate))
                self._found = [None if x is None else x.detach() for x in found]
        self._inputs = [None if isinstance(x, nn.Parameter) else y.detach() for x, y in zip(inputs, own, strict=True)]
        self.copies_only_image = [x is not None for x in self._inputs] == [True] + [False] * (len(inputs) - 1)
        # what is compared later is what it reads: what is packed by now may be newer
        self._uses, self._made, self._held = prepack.Uses(weights.uses), [*weights.made], weights.held

    def evaluate(self, inputs: Tensors) -> list[Tensor]:
        """As the function of this name; before, all is NaN, so that what is not computed again is seen."""
        with torch.no_grad():
            for x in (*self._outputs, *self._found):
                if x is not None:
                    x.fill_(torch.nan)
            before = random_state(inputs[0].device)
            outputs = self.forward(inputs)
            self.draws = not torch.equal(random_state(inputs[0].device), before)
            grads = self.backward([*map(_some_gradient, outputs)]) if self.has_gradients else []
            return [x for x in (*outputs, *grads) if x is not None]

    def holds(self) -> bool:
        """Whether packed weights are where they were, with one look at them."""
        made = self._uses.made()
        if made is None:
            return False
        return all(x is y for new, old in zip(made, self._made, strict=True) for x, y in zip(new, old, strict=True))

    def forward(self, inputs: Tensors) -> list[Tensor]:
        """The outputs, in memory of their own. Inputs at the end that are read in place may be left out."""
        with torch.no_grad():
            for own, x in zip(self._inputs, inputs, strict=False):
                if own is not None:
                    own.copy_(x)
            self._forward()
            return [x.clone() for x in self._outputs]

    def backward(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """For each input its gradient, in memory of its own, or None if it needs none."""
        for own, g in zip(self._grads, grads, strict=True):
            own.zero_() if g is None else own.copy_(g)
        self._backward()
        found = iter(self._found)
        results = [next(found) if needed else None for needed in self._needs]
        return [None if x is None else x.clone() for x in results]


class Launch:
    """A graph that has been launched, which counts once it is adopted.

    PyTorch's random numbers are as before until ``adopt``. The graph's memory is taken until ``drop``, or until the
    backward pass of what ``adopt`` returns is over.
    """

    def __init__(self, graph: Graph, inputs: Tensors) -> None:
        self.graph, self._device = graph, inputs[0].device
        if graph.draws:
            self._before = random_state(self._device)
        self._outputs = graph.forward(inputs)
        if graph.draws:
            self._after = random_state(self._device)
            set_random_state(self._device, self._before)
        self._kept = graph.space.lend() if graph.has_gradients else None

    def drop(self) -> None:
        """Leave the graph's memory to others, and hold no graph that is dropped."""
        vars(self).clear()

    def adopt(self, lock: threading.RLock, lasting: Tensors, inputs: Tensors) -> Tensors:
        """The outputs, with gradients where the graph has them; random numbers go on behind those that it has drawn."""
        if self.graph.draws:
            if torch.equal(random_state(self._device), self._before):
                set_random_state(self._device, self._after)
            else:  # another thread has drawn these meanwhile
                self._outputs = self.graph.forward(inputs)
        if not self.graph.has_gradients:
            return self._outputs
        kept, self._kept = self._kept, None
        assert kept is not None, "a launch is adopted once, and not after it was dropped"
        results: Tensors = _Replayed.apply(lock, self.graph, self._outputs, kept, lasting, *inputs)
        return results


def _own(inputs: Tensors, needs: Sequence[bool]) -> list[Tensor]:
    """The inputs without what is in their graph, as hooks; other inputs than parameters in memory of their own."""
    with torch.inference_mode(False), torch.no_grad():
        aliases = [x.detach() if isinstance(x, nn.Parameter) else _copy(x) for x in inputs]
    return [x.requires_grad_(needed) for x, needed in zip(aliases, needs, strict=True)]


def _copy(x: Tensor) -> Tensor:
    """In the same strides; ``clone`` closes gaps, and what computes may depend on these."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def _as_called(device: torch.device, needs: Sequence[bool]) -> ExitStack:
    """As the caller has it, but that casts of weights, which would be in the memory of a graph, are not kept."""
    stack, kind = ExitStack(), device.type
    dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False))
    stack.enter_context(torch.set_grad_enabled(any(needs)))
    # backward in this thread, which records what is packed
    stack.enter_context(torch.autograd.set_multithreading_enabled(False))
    return stack


def _some_gradient(x: Tensor) -> Tensor:
    values = torch.linspace(-1, 1, x.numel(), dtype=torch.float32, device=x.device)
    return values.view(x.shape).to(x.dtype)


def evaluate(compute: Callable[[Tensors], Tensors], inputs: Tensors, needs: Sequence[bool]) -> list[Tensor] | None:
    """The outputs, and the gradients of inputs that need one and have one, for some gradients of the outputs.

    None if inputs need gradients, and an output has none.
    """
    own = _own(inputs, needs)
    with _as_called(own[0].device, needs):
        outputs = compute(own)
        if any(needs) and not all(x.requires_grad for x in outputs):
            return None
        grads = _differentiate(outputs, own, [*map(_some_gradient, outputs)]) if any(needs) else []
        return [x.detach() for x in (*outputs, *grads) if x is not None]


def _differentiate(outputs: Tensors, own: Sequence[Tensor], grads: Tensors) -> Sequence[Tensor | None]:
    wanted = [x for x in own if x.requires_grad]
    # what has been kept stays where it is, for a second backward pass
    return torch.autograd.grad(outputs, wanted, grads, retain_graph=True, allow_unused=True)


def random_state(device: torch.device) -> Tensor:
    """That of PyTorch's generator for a device."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_random_state(device: torch.device, state: Tensor) -> None:
    """Let random numbers go on as they did in a ``random_state``."""
    torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(state)


def same_random_numbers(device: torch.device) -> AbstractContextManager[None]:
    """Afterwards random numbers go on where they were before."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


class _Weights(recording.Recording):
    """Takes note of packed weights."""

    def __init__(self) -> None:
        self.uses, self.made, self.held = list[prepack.Use](), list[Sequence[Tensor | None]](), list[object]()

    def packed(self, made: Sequence[Tensor | None], use: prepack.Use) -> None:
        self.held.append(made)
        if use.look:  # those of backward are made of the same weights
            self.uses.append(use)
            self.made.append(made)


@first_order("graphs", "PyTorch's own modules")
class _Replayed(torch.autograd.Function):
    """What a graph computes, and its gradients."""

    @staticmethod
    def forward(
        ctx: Any, lock: Any, graph: Graph, outputs: Tensors, kept: Any, lasting: Tensors, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.lock, kept.graph = lock, graph  # which goes with what it has kept, though its results are there
        # memory that backward reads, where the tensors have got another by then
        ctx.storages = [x.untyped_storage() for x in (*lasting, *inputs)]
        ctx.set_materialize_grads(False)
        # parameters, so that PyTorch sees whether they are written before backward reads them
        ctx.save_for_backward(kept, *(x for x in inputs if isinstance(x, nn.Parameter)))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        kept, *_ = ctx.saved_tensors  # raises if it is gone
        with ctx.lock:
            return *(None,) * 5, *kept.graph.backward(grads)
