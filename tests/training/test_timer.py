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


def test_on_a_gpu_waiting_is_counted_by_the_device_once_it_is_that_far(monkeypatch):
    now, recorded = 0.0, iter([1000.0, 1500.0, 4000.0, 4250.0])

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.milliseconds = next(recorded)

        def query(self):
            return self.milliseconds <= now

        def elapsed_time(self, end):
            assert self.query() and end.query()
            return end.milliseconds - self.milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    timer = DataTimer(torch.device("cuda"))
    for _ in range(2):
        with timer:
            pass
    for now, seconds in ((1499.0, 0), (4249.0, 0.5), (4250.0, 0.75)):  # noqa: B007 (`query` reads it)
        assert timer.seconds() == seconds
