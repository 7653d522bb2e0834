"""CUDA graphs: the kernels of a function, launched once and then again all at once, on the same memory.

Launching a kernel from Python takes longer than the GPU takes to run it, if the batch is small. A graph launches all
kernels of a step in one call: the same kernels with the same arguments, so it computes the same bits.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor

from insvp_fast.runtime import torch_private

__all__ = ["Space", "has_graphs", "is_capturing", "settings"]

T = TypeVar("T")

_one_at_a_time = threading.Lock()  # PyTorch captures one graph in a process
_failed: list[torch.cuda.CUDAGraph] = []  # of which PyTorch's allocator may keep the address


def has_graphs(device: torch.device) -> bool:
    """Whether there are CUDA graphs on this device; on one of ROCm they are HIP's."""
    return device.type == "cuda"


def is_capturing(device: torch.device) -> bool:
    """Whether the kernels of the current stream are part of a graph, which somebody captures."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Space:
    """Memory that graphs of one stream share, which are replayed one after the other: it is that of the largest.

    What a graph has kept for its backward pass is there until another graph is replayed.
    """

    def __init__(self, device: torch.device) -> None:
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)
        self._kept: weakref.ref[object] | None = None

    def capture(self, function: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """What ``function`` returns, which has no values yet, and what computes these, as often as it is called.

        The latter reads the memory that ``function`` read, which the caller keeps alive.

        Raises:
            RuntimeError: for a function that waits for the GPU, or if there is not enough memory.
        """
        graph = torch.cuda.CUDAGraph()
        with (
            _one_at_a_time,
            torch.cuda.device(self._stream.device),  # which may not be the current one
            torch.cuda.stream(torch.cuda.current_stream(self._stream.device)),  # again, also where capturing fails
        ):
            try:
                with self._capturing(graph, self._pool):
                    results = function()
            except BaseException:
                self._recover(graph)
                raise
        return results, graph.replay

    def _capturing(self, graph: torch.cuda.CUDAGraph, pool: Any = None) -> AbstractContextManager[None]:
        """Other threads, as those that load data, may go on."""
        return torch.cuda.graph(graph, pool, self._stream, capture_error_mode="thread_local")

    def _recover(self, failed: torch.cuda.CUDAGraph) -> None:
        """End what PyTorch leaves open where CUDA refuses to end a capture, as of a function that waits for the GPU."""
        _failed.append(failed)
        torch_private.end_allocating(self._stream.device, self._pool)
        with suppress(RuntimeError):  # the first error is the one to tell
            failed.reset()  # which gives back its memory, where the capture was ended
            # PyTorch 2.11 draws no random numbers before another capture has succeeded
            with self._capturing(torch.cuda.CUDAGraph()):
                torch.zeros(1, device=self._stream.device)

    def lend(self) -> Tensor:
        """A tensor that stands for what the graph has kept: until PyTorch frees it, no other may be replayed."""
        token = torch.empty(1, device="cpu")
        self._kept = weakref.ref(token.untyped_storage())
        return token

    def is_free(self) -> bool:
        """Whether no backward pass is going to read what a graph has kept."""
        return self._kept is None or self._kept() is None


def settings() -> Hashable:
    """What of PyTorch's settings decides which kernels are launched."""
    backends: Any = torch.backends
    cuda, cudnn = backends.cuda, backends.cudnn
    return (
        torch.are_deterministic_algorithms_enabled(),
        backends.fp32_precision,
        cuda.matmul.fp32_precision,
        cuda.matmul.allow_fp16_accumulation,
        cuda.matmul.allow_fp16_reduced_precision_reduction,
        cuda.matmul.allow_bf16_reduced_precision_reduction,
        getattr(cuda.matmul, "allow_fp16_reduced_precision_reduction_split_k", None),  # newer than the oldest torch
        getattr(cuda.matmul, "allow_bf16_reduced_precision_reduction_split_k", None),
        cuda.preferred_blas_library(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        cuda.fp16_bf16_reduction_math_sdp_allowed(),
        torch_private.sdpa_order(),
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
        cudnn.fp32_precision,
        cudnn.conv.fp32_precision,
    )
