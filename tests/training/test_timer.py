"""How long a device waits for its data."""

import torch

from insvp_fast.training.timer import DataTimer


def test_waiting_is_what_the_loader_takes(monkeypatch):
    timer = DataTimer(torch.device("cpu"))
    clock = iter([1.0, 1.5, 4.0, 4.25])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    for _ in range(2):
        with timer:
            pass
    assert timer.seconds() == 0.75
