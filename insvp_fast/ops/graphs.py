"""Functions of tensors on a GPU that run as CUDA graphs once these are captured, with their gradients."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from insvp_fast.errors import warn
from insvp_fast.ops.captured_graph import (
    Graph,
    Launch,
    Tensors,
    evaluate,
    random_state,
    same_random_numbers,
    set_random_state,
)
from insvp_fast.runtime import cuda_graphs, recording, torch_private

__all__ = ["Ahead", "Graphs"]

MOST = 16  # graphs that are kept of a model: for each shape of batches one or two


class Graphs:
    """The graphs of a model, by what decides which kernels they launch.

    A function is captured when it is called for the second time, as the first one packs weights and compiles kernels.
    Then its graph is compared with the function, bit for bit, and not used if they differ.
    """

    def __init__(self) -> None:
        # False for what cannot be captured, True for what has been called once
        self._graphs: OrderedDict[Hashable, Graph | bool] = OrderedDict()
        self._spaces: weakref.WeakValueDictionary[Hashable, cuda_graphs.Space] = weakref.WeakValueDictionary()
        self._places: list[int] = []  # of parameters
        self._guesses: OrderedDict[Hashable, _Guess] = OrderedDict()  # by kind of call
        self._lock = threading.RLock()  # memory is written and read in turn

    def ahead(self, mode: Hashable, image: Tensor) -> Ahead | None:
        """Launch the graph that ``run`` is expected to take for this image, so that the GPU computes meanwhile.

        It is the one that ``run`` took in the last two calls like this one, as far as ``mode``, the image and PyTorch's
        state tell; none if memory that it reads may be gone. The caller drops what ``run`` does not get.
        """
        if _is_unusual([image]):
            return None
        with self._lock:
            call = _call(mode, image)
            guess = self._guesses.get(call)
            graph = self._graphs.get(guess.key) if guess is not None and guess.again else None
            if guess is None or not isinstance(graph, Graph) or not graph.space.is_free():
                return Ahead(call)
            if isinstance(image, nn.Parameter):  # which graphs read where it is
                return Ahead(call)
            del self._guesses[call]  # it is there again when it was right
            if guess.places != _places(guess.tensors):
                return Ahead(call)
            return Ahead(call, guess, Launch(graph, [image]))

    def run(
        self,
        key: Hashable,
        inputs: Tensors,
        lasting: Tensors,
        compute: Callable[[Tensors], Tensors],
        ahead: Ahead | None = None,
    ) -> Sequence[Tensor]:
        """``compute(inputs)``, by a graph as soon as it has been captured.

        Args:
            key: with the layouts of the inputs and the settings of PyTorch, all that decides which kernels ``compute``
                launches, but the values of packed weights.
            inputs: an image, and all else that it reads but ``lasting`` and packed weights. Parameters are read where
                they are, others are copied.
            lasting: frozen tensors, which are read where they are.
            ahead: what ``ahead`` gave for the first of the inputs, an image.
        """
        device = inputs[0].device
        if _is_unusual(inputs):
            return compute(inputs)
        with self._lock:
            needs = tuple(torch.is_grad_enabled() and x.requires_grad for x in inputs)
            stream = torch_private.current_stream(device)
            image, *parameters = inputs
            self._drop_where_moved([x.data_ptr() for x in (*parameters, *lasting) if isinstance(x, nn.Parameter)])
            layouts = tuple((x.shape, x.stride(), x.dtype) for x in inputs)
            where = tuple(x.data_ptr() for x in lasting if not isinstance(x, nn.Parameter))
            where += (image.data_ptr(),) if isinstance(image, nn.Parameter) else ()
            key = key, needs, device, stream, cuda_graphs.settings(), layouts, where
            graph = self._graphs.pop(key, None)
            launch = None if ahead is None else ahead.launch
            if launch is not None and launch.graph is not graph:
                launch.drop()
                launch = None
            if graph is True:
                graph = self._capture(self._space(stream, device), inputs, needs, compute)
            self._keep(key, True if graph is None else graph)
            if not isinstance(graph, Graph) or (launch is None and not graph.space.is_free()):
                return self._one_by_one(compute, inputs)
            if ahead is not None and graph.copies_only_image:
                self._remember(ahead, launch is not None, key, [*inputs[1:], *lasting])
            launch = launch or Launch(graph, inputs)
            # weights are looked at while the GPU computes
            if graph.holds():
                return launch.adopt(self._lock, lasting, inputs)
            launch.drop()
            self._keep(key, True)
        del graph, launch  # its memory is for the kernels
        return self._one_by_one(compute, inputs)

    def _one_by_one(self, compute: Callable[[Tensors], Tensors], inputs: Tensors) -> Tensors:
        """``compute(inputs)``; where there is too little memory, once more without the graphs and theirs."""
        before = random_state(inputs[0].device)
        try:
            return compute(inputs)
        except torch.OutOfMemoryError:
            with self._lock:
                if not any(isinstance(graph, Graph) for graph in self._graphs.values()):
                    raise
                self._drop_all()
        set_random_state(inputs[0].device, before)
        return compute(inputs)

    def _drop_all(self) -> None:
        self._graphs.clear()
        self._guesses.clear()

    def _remember(self, ahead: Ahead, right: bool, key: Hashable, tensors: list[Tensor]) -> None:
        """Which graph a call took, and whether the guess was right."""
        last, guess = self._guesses.pop(ahead.call, None), ahead.guess if right else None
        again = last is not None and last.key == key
        self._guesses[ahead.call] = guess or _Guess(key, tensors, _places(tensors), again)
        while len(self._guesses) > MOST:
            self._guesses.popitem(last=False)

    def _drop_where_moved(self, places: list[int]) -> None:
        """Drop all graphs if parameters are elsewhere: they read the old places, and hold memory on the old device."""
        if places != self._places:
            self._drop_all()
            self._places = places

    def _keep(self, key: Hashable, graph: Graph | bool) -> None:
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
    ) -> Graph | bool:
        """A graph that computes the bits that ``compute`` does; True, as before, while its memory is not free."""
        if any(0 in x.stride() for x in inputs if not isinstance(x, nn.Parameter)):
            return False  # prompters choose by how images are laid out, and a copy has no expanded dimensions
        if not space.is_free():
            return True
        device = inputs[0].device
        try:
            with same_random_numbers(device):
                expected = evaluate(compute, inputs, needs)
            if expected is None:
                return False
            with same_random_numbers(device):
                graph = Graph(space, inputs, needs, compute)
            with same_random_numbers(device):
                found = graph.evaluate(inputs)
        except Exception as error:  # any, as too little memory for it: the step itself shall run
            reason = f"cannot be captured: {(str(error) or type(error).__name__).splitlines()[0]}"
        else:
            if len(found) == len(expected) and all(map(_same_bits, found, expected)):
                return graph
            reason = "gave other bits"
        warn(f"kernels are launched one by one, as a CUDA graph of them {reason}")
        return False


class Ahead(NamedTuple):
    """What was done for a call before the graph that it takes is known."""

    call: Hashable
    guess: _Guess | None = None
    launch: Launch | None = None

    def drop(self) -> None:
        """Leave the graph's memory to others, if the launch was not adopted."""
        if self.launch is not None:
            self.launch.drop()


class _Guess(NamedTuple):
    """Which graph a call will take."""

    key: Hashable
    tensors: list[Tensor]  # that the graph reads where they are
    places: list[tuple[int, int]]  # of these
    again: bool  # whether the last two calls took it


def _places(tensors: Tensors) -> list[tuple[int, int]]:
    return [(x.data_ptr(), x.untyped_storage().nbytes()) for x in tensors]


def _call(mode: Hashable, image: Tensor) -> Hashable:
    """What tells calls apart before anything of the model is looked at."""
    device = image.device
    autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    layout = image.shape, image.stride(), image.dtype, device, image.requires_grad
    return mode, layout, torch.is_grad_enabled(), autocast, torch_private.current_stream(device)


def _is_unusual(inputs: Tensors) -> bool:
    """Whether something else is going on than the computation, which a graph would not do."""
    if torch_private.dispatches(inputs) or recording.current() is not None or torch.is_anomaly_enabled():
        return True
    return cuda_graphs.is_capturing(inputs[0].device)


def _same_bits(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x.contiguous().view(-1).view(torch.uint8), y.contiguous().view(-1).view(torch.uint8))
