"""The fingerprints of GPU memory: the Triton kernel, and comparisons that do not wait for the GPU."""

import weakref

import pytest
import torch

pytest.importorskip("triton")
from insvp_fast.kernels.gpu import fingerprint as kernel

from insvp_fast.runtime import fingerprint
from insvp_fast.runtime.fingerprint import DeviceFingerprint, Region


def table_of(*tensors):
    rows = [(x.data_ptr(), x.nbytes // 4) for x in tensors]
    return torch.tensor(rows, dtype=torch.int64, device=tensors[0].device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parity(device, dtype):
    tensors = [torch.randn(n, device=device).to(dtype) for n in (2, 30, 4096, 5000, 70_002)]
    sums = kernel.fingerprint(table_of(*tensors), 0, 128)
    for x, own in zip(tensors, sums, strict=True):
        mixed = fingerprint._mixed(x.view(torch.int32), 0, 1)
        padded = torch.nn.functional.pad(mixed, (0, -len(mixed) % 2048))
        assert torch.equal(own, padded.view(-1, 128, 16).sum((0, 2)))
    assert torch.equal(kernel.fingerprint(table_of(*tensors), 77, 1), sums[:, 77:78])


def test_an_empty_table(device):
    assert kernel.fingerprint(torch.empty(0, 2, dtype=torch.int64, device=device), 0, 128).shape == (0, 128)


class Event:
    """Takes the place of a GPU event; the test decides whether it was reached."""

    reached = True

    def record(self):
        pass

    def query(self):
        return Event.reached


@pytest.fixture
def held(device, monkeypatch):
    """Three weights with their fingerprints."""
    if device.type == "cpu":
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(Event, "reached", True)
    fingerprint._watch.cache_clear()
    weights = [torch.randn(40, 512, device=device) for _ in range(3)]
    return [(w, DeviceFingerprint([Region.of(w, weakref.ref(w.untyped_storage()))], device)) for w in weights]


def a_pass(held):
    found = [own.broken() for _, own in held]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return found


def test_a_change_is_found_two_passes_later(held):
    for _ in range(3):
        assert not any(a_pass(held))
    held[1][0].add_(1)
    passes = [a_pass(held) for _ in range(3)]
    assert not any(passes[0]) and passes[-1] == [False, True, False]
    assert held[1][1].broken_anywhere() and not held[0][1].broken_anywhere()


def test_a_busy_gpu_is_not_waited_for(held, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("the test decides how far the GPU is")
    for _ in range(2):
        a_pass(held)
    monkeypatch.setattr(Event, "reached", False)
    held[0][0].zero_()
    for _ in range(5):
        assert not any(a_pass(held))
    monkeypatch.setattr(Event, "reached", True)
    assert [a_pass(held)[0] for _ in range(4)][-1]


def test_freed_memory_is_not_read(held):
    for _ in range(2):
        a_pass(held)
    weight, _ = held[2]
    weight.untyped_storage().resize_(4)
    for _ in range(3):
        a_pass(held)
    assert held[2][1].broken_anywhere()
