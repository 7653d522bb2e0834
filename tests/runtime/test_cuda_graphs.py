"""What surrounds a capture, with stand-ins for PyTorch's calls on a GPU."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from insvp_fast.runtime.cuda_graphs import Space


def test_a_capture_that_cannot_be_ended_is_followed_by_one_that_can(monkeypatch):
    ended = []

    @contextmanager
    def capturing(graph, pool, stream, capture_error_mode):
        yield
        ended.append(pool)
        if len(ended) == 1:
            raise RuntimeError("operation failed due to a previous error during capture")

    for name in ("device", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda given: nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(device=device))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(reset=list))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    with pytest.raises(RuntimeError, match="previous error during capture"):
        Space(torch.device("cpu")).capture(list)
    assert ended == [(0, 1), None]
