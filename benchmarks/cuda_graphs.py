"""Replaying a run as one CUDA graph."""

from __future__ import annotations

import torch
from torch import Tensor

from insvp_fast.bench.jobs import Run

__all__ = ["graphed"]


def graphed(run: Run) -> Run:
    """Capture a run in a CUDA graph: the same kernels on the same memory, launched all at once."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # nothing may be allocated, packed or tuned for the first time while capturing
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()

    def replay(keep: Run = run) -> dict[str, Tensor]:  # the graph reads what the run owns: model, images, optimizer
        graph.replay()
        return results

    return replay
