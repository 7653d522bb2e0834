"""Functions of tensors on a GPU that run as CUDA graphs once these are captured, with their gradients."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn

from insvp_fast.ops.autograd import first_order
from insvp_fast.runtime import cuda_graphs, prepack, recording, torch_private

__all__ = ["Graphs"]

MOST = 16  # graphs that are kept of a model: for each shape of batches one or two

Tensors = Sequence[Tensor]


class Graphs:
    """The graphs of a model, by what decides which kernels they launch.

    A function is captured when it is called for the second time, as the first one packs weights and compiles kernels.
    Then its graph is compared with the function, bit for bit, and not used if they differ.
    """

    def __init__(self) -> None:
        # False for what cannot be captured, True for what has been called once
        self._graphs: OrderedDict[Hashable, _Graph | bool] = OrderedDict()
        self._spaces: weakref.WeakValueDictionary[Hashable, cuda_graphs.Space] = weakref.WeakValueDictionary()
        self._places: list[int] = []  # of parameters
        self._lock = threading.RLock()  # memory is written and read in turn

    def run(
        self, key: Hashable, inputs: Tensors, lasting: Tensors, compute: Callable[[Tensors], Tensors]
    ) -> Sequence[Tensor]:
        """``compute(inputs)``, by a graph as soon as it has been captured.

        Args:
            key: with the layouts of the inputs and the settings of PyTorch, all that decides which kernels ``compute``
                launches, but the values of packed weights.
            inputs: all tensors that it reads, but ``lasting`` and packed weights. Parameters are read where they are,
                others are copied.
            lasting: frozen tensors, which are read where they are.
        """
        device = inputs[0].device
        if _is_unusual(inputs):
            return compute(inputs)
        with self._lock:
            needs = tuple(torch.is_grad_enabled() and x.requires_grad for x in inputs)
            stream = torch_private.current_stream(device)
            self._drop_where_moved([x.data_ptr() for x in (*inputs, *lasting) if isinstance(x, nn.Parameter)])
            layouts = tuple((x.shape, x.stride(), x.dtype) for x in inputs)
            where = tuple(x.data_ptr() for x in lasting if not isinstance(x, nn.Parameter))
            key = key, needs, device, stream, cuda_graphs.settings(), layouts, where
            graph = self._graphs.pop(key, None)
            if graph is True:
                graph = self._capture(self._space(stream, device), inputs, needs, compute)
            self._keep(key, True if graph is None else graph)
            if not isinstance(graph, _Graph) or not graph.space.is_free():
                return compute(inputs)
            random = _random_state(device)
            # first launched and then checked, while the GPU computes
            arguments = self._lock, graph, lasting, *inputs
            results = _Replayed.apply(*arguments) if any(needs) else graph.forward(inputs)
            if graph.holds():
                return cast(Tensors, results)
            self._keep(key, True)
            _set_random_state(device, random)
        return compute(inputs)

    def _drop_where_moved(self, places: list[int]) -> None:
        """Drop all graphs if parameters are elsewhere: they read the old places, and hold memory on the old device."""
        if places != self._places:
            self._graphs.clear()
            self._places = places

    def _keep(self, key: Hashable, graph: _Graph | bool) -> None:
        self._graphs[key] = graph
        while len(self._graphs) > MOST:
            self._graphs.popitem(last=False)

    def _space(self, stream: int, device: torch.device) -> cuda_graphs.Space:
        space = self._spaces.get((device, stream))
        if space is None:
            space = self._spaces[device, stream] = cuda_graphs.Space(device)
        return space

    def _capture(
        self,
        space: cuda_graphs.Space,
        inputs: Tensors,
        needs: tuple[bool, ...],
        compute: Callable[[Tensors], Tensors],
    ) -> _Graph | bool:
        """A graph that computes the bits that ``compute`` does; True, as before, while its memory is not free."""
        if not space.is_free():
            return True
        device = inputs[0].device
        try:
            with _same_random_numbers(device):
                expected = _evaluate(compute, _own(inputs, needs), needs)
            if expected is None:
                return False
            with _same_random_numbers(device):
                graph = _Graph(space, inputs, needs, compute)
            with _same_random_numbers(device):
                found = graph.evaluate(inputs)
        except Exception as error:  # any, as too little memory for it: the step itself shall run
            reason = f"cannot be captured: {(str(error) or type(error).__name__).splitlines()[0]}"
        else:
            if len(found) == len(expected) and all(map(_same_bits, found, expected)):
                return graph
            reason = "gave other bits"
        warnings.warn(f"kernels are launched one by one, as a CUDA graph of them {reason}", stacklevel=4)
        return False


def _is_unusual(inputs: Tensors) -> bool:
    """Whether something else is going on than the computation, which a graph would not do."""
    if torch_private.dispatches(inputs) or recording.current() is not None or torch.is_anomaly_enabled():
        return True
    return cuda_graphs.is_capturing(inputs[0].device)


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(device: torch.device, state: Tensor) -> None:
    torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(state)


def _same_random_numbers(device: torch.device) -> AbstractContextManager[None]:
    """Afterwards random numbers go on where they were before."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _own(inputs: Tensors, needs: Sequence[bool]) -> list[Tensor]:
    """The inputs without what is in their graph, as hooks; other inputs than parameters in memory of their own."""
    with torch.inference_mode(False), torch.no_grad():
        aliases = [x.detach() if isinstance(x, nn.Parameter) else x.detach().clone() for x in inputs]
    return [x.requires_grad_(needed) for x, needed in zip(aliases, needs, strict=True)]


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


def _evaluate(
    compute: Callable[[Tensors], Tensors], own: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor] | None:
    """The outputs, and the gradients of inputs that need one and have one, for some gradients of the outputs.

    None if inputs need gradients, and an output has none.
    """
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


def _same_bits(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x.contiguous().view(-1).view(torch.uint8), y.contiguous().view(-1).view(torch.uint8))


class _Graph:
    """A captured function, and its gradients.

    Attributes:
        space: its memory. Of it are held what goes in and out, but nothing that is kept for backward.
    """

    def __init__(
        self,
        space: cuda_graphs.Space,
        inputs: Tensors,
        needs: Sequence[bool],
        compute: Callable[[Tensors], Tensors],
    ) -> None:
        self.space, self._needs, weights = space, needs, _Weights()
        self._found: list[Tensor | None] = []
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
        self._uses, self._held = prepack.Uses(weights.uses), weights.held
        self._made = self._uses.made()

    def evaluate(self, inputs: Tensors) -> list[Tensor]:
        """As the function ``_evaluate``; before, all is NaN, so that what is not computed again is seen."""
        with torch.no_grad():
            for x in (*self._outputs, *self._found):
                if x is not None:
                    x.fill_(torch.nan)
            outputs = self.forward(inputs)
            grads = self.backward([*map(_some_gradient, outputs)]) if self._grads else []
            return [x for x in (*outputs, *grads) if x is not None]

    def holds(self) -> bool:
        """Whether packed weights are where they were, with one look at them."""
        made = self._uses.made()
        if made is None or self._made is None:
            return False
        return all(x is y for new, old in zip(made, self._made, strict=True) for x, y in zip(new, old, strict=True))

    def forward(self, inputs: Tensors) -> list[Tensor]:
        """The outputs, in memory of their own."""
        with torch.no_grad():
            for own, x in zip(self._inputs, inputs, strict=True):
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


class _Weights:
    """Takes note of packed weights (``recording.Recording``)."""

    def __init__(self) -> None:
        self.uses, self.held = list[prepack.Use](), list[object]()

    def packed(self, made: Sequence[Tensor | None], use: prepack.Use) -> None:
        self.held.append(made)
        if use.look:  # those of backward are made of the same weights
            self.uses.append(use)

    def new(self, x: Tensor) -> None:
        pass

    def lasts(self, x: Tensor) -> None:
        pass

    def hold(self, x: Tensor) -> None:
        pass

    def run(self, call: Callable[[], None]) -> None:
        call()

    def interrupt(self) -> None:
        pass


@first_order("graphs", "PyTorch's own modules")
class _Replayed(torch.autograd.Function):
    """What a graph computes, and its gradients."""

    @staticmethod
    def forward(ctx: Any, lock: Any, graph: _Graph, lasting: Tensors, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.lock, ctx.graph = lock, graph
        # memory that backward reads, where the tensors have got another by then
        ctx.storages = [x.untyped_storage() for x in (*lasting, *inputs)]
        ctx.set_materialize_grads(False)
        # parameters, so that PyTorch sees whether they are written before backward reads them
        ctx.save_for_backward(graph.space.lend(), *(x for x in inputs if isinstance(x, nn.Parameter)))
        return tuple(graph.forward(inputs))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        assert ctx.saved_tensors  # raises if what was kept is gone
        with ctx.lock:
            return *(None,) * 3, *ctx.graph.backward(grads)
