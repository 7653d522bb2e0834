"""Functions of tensors on a GPU that run as CUDA graphs once these are captured, with their gradients."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from insvp_fast.ops.autograd import first_order
from insvp_fast.runtime import cuda_graphs, prepack, recording, torch_private

__all__ = ["Graphs", "Launch"]

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
        # for each kind of call the last key, and the tensors that its graph reads where they are, with their places
        self._last: OrderedDict[Hashable, tuple[Hashable, list[Tensor], list[int]]] = OrderedDict()
        self._lock = threading.RLock()  # memory is written and read in turn

    def launch(self, kind: Hashable, image: Tensor) -> Launch | None:
        """Launch the graph that ``run`` used last for such images: the GPU computes while the right one is looked for.

        If that is another one, nothing has changed. None if there is no such graph, or its memory is not free.
        """
        if _is_unusual([image]):
            return None
        with self._lock:
            key, tensors, places = self._last.get(_kind(kind, image), (None, [], []))
            graph = self._graphs.get(key)
            # the memory that a graph reads has to be there, whether or not it is that of the model
            if not isinstance(graph, _Graph) or not graph.space.is_free() or [x.data_ptr() for x in tensors] != places:
                return None
            return Launch(graph, [image])

    def run(
        self,
        key: Hashable,
        inputs: Tensors,
        lasting: Tensors,
        compute: Callable[[Tensors], Tensors],
        kind: Hashable = None,
        ahead: Launch | None = None,
    ) -> Sequence[Tensor]:
        """``compute(inputs)``, by a graph as soon as it has been captured.

        Args:
            key: with the layouts of the inputs and the settings of PyTorch, all that decides which kernels ``compute``
                launches, but the values of packed weights.
            inputs: all tensors that it reads, but ``lasting`` and packed weights. Parameters are read where they are,
                others are copied.
            lasting: frozen tensors, which are read where they are.
            kind, ahead: what ``launch`` got and gave, for this image.
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
            if ahead is not None and ahead.graph is not graph:
                ahead.drop()
                ahead = None
            if graph is True:
                graph = self._capture(self._space(stream, device), inputs, needs, compute)
            self._keep(key, True if graph is None else graph)
            if not isinstance(graph, _Graph) or (ahead is None and not graph.space.is_free()):
                return compute(inputs)
            if ahead is None:
                self._note(_kind(kind, inputs[0]), key, graph, [*inputs[1:], *lasting])
                ahead = Launch(graph, inputs)
            # weights are looked at while the GPU computes
            if graph.holds():
                return ahead.adopt(self._lock, lasting, inputs)
            ahead.drop()
            self._keep(key, True)
        return compute(inputs)

    def _note(self, kind: Hashable, key: Hashable, graph: _Graph, tensors: list[Tensor]) -> None:
        if not graph.copies_image_alone:
            return
        self._last[kind] = key, tensors, [x.data_ptr() for x in tensors]
        while len(self._last) > MOST:
            self._last.popitem(last=False)

    def _drop_where_moved(self, places: list[int]) -> None:
        """Drop all graphs if parameters are elsewhere: they read the old places, and hold memory on the old device."""
        if places != self._places:
            self._graphs.clear()
            self._last.clear()
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


def _kind(kind: Hashable, image: Tensor) -> Hashable:
    """What tells calls apart before anything of the model is looked at."""
    device = image.device
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    layout = image.shape, image.stride(), image.dtype, device, image.requires_grad
    return kind, layout, torch.is_grad_enabled(), autocast, torch_private.current_stream(device)


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
        copies_image_alone: whether all inputs but the first are read where they are.
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
        self.copies_image_alone = not any(x is not None for x in self._inputs[1:])
        self._uses, self._held = prepack.Uses(weights.uses), weights.held
        self._made = self._uses.made()

    def evaluate(self, inputs: Tensors) -> list[Tensor]:
        """As the function ``_evaluate``; before, all is NaN, so that what is not computed again is seen."""
        with torch.no_grad():
            for x in (*self._outputs, *self._found):
                if x is not None:
                    x.fill_(torch.nan)
            outputs = self.forward(inputs)
            grads = self.backward([*map(_some_gradient, outputs)]) if self.has_gradients else []
            return [x for x in (*outputs, *grads) if x is not None]

    def holds(self) -> bool:
        """Whether packed weights are where they were, with one look at them."""
        made = self._uses.made()
        if made is None or self._made is None:
            return False
        return all(x is y for new, old in zip(made, self._made, strict=True) for x, y in zip(new, old, strict=True))

    def forward(self, inputs: Tensors) -> list[Tensor]:
        """The outputs, in memory of their own; of the inputs may be left out at the end what is read where it is."""
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
    """A graph that has been launched, but whose random numbers and memory count as not used until it is adopted."""

    def __init__(self, graph: _Graph, inputs: Tensors) -> None:
        device = inputs[0].device
        before = _random_state(device)
        self.graph, self._outputs = graph, graph.forward(inputs)
        self._device, self._random = device, _random_state(device)
        _set_random_state(device, before)
        self._kept = graph.space.lend() if graph.has_gradients else None

    def drop(self) -> None:
        """What it has kept for its backward pass is not needed."""
        self._kept = None

    def adopt(self, lock: threading.RLock, lasting: Tensors, inputs: Tensors) -> Tensors:
        """The outputs, with gradients where the graph has them."""
        _set_random_state(self._device, self._random)
        if self._kept is None:
            return self._outputs
        kept, self._kept = self._kept, None
        results: Tensors = _Replayed.apply(lock, self.graph, self._outputs, kept, lasting, *inputs)
        return results


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
    def forward(
        ctx: Any, lock: Any, graph: _Graph, outputs: Tensors, kept: Tensor, lasting: Tensors, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.lock, ctx.graph = lock, graph
        # memory that backward reads, where the tensors have got another by then
        ctx.storages = [x.untyped_storage() for x in (*lasting, *inputs)]
        ctx.set_materialize_grads(False)
        # parameters, so that PyTorch sees whether they are written before backward reads them
        ctx.save_for_backward(kept, *(x for x in inputs if isinstance(x, nn.Parameter)))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        assert ctx.saved_tensors  # raises if what was kept is gone
        with ctx.lock:
            return *(None,) * 5, *ctx.graph.backward(grads)
