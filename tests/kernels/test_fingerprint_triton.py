"""The fingerprints of GPU memory: the Triton kernel, and comparisons that do not wait for the GPU."""

import sys
import threading
import weakref

import pytest
import torch

pytest.importorskip("triton")
from insvp_fast.kernels.gpu import fingerprint as kernel

from insvp_fast.runtime import fingerprint
from insvp_fast.runtime.fingerprint import DeviceFingerprint, Region


def table_of(*tensors):
    rows = [(x.data_ptr(), x.nbytes) for x in tensors]
    return torch.tensor(rows, dtype=torch.int64, device=tensors[0].device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parity(device, dtype):
    tensors = [torch.randn(n + 1, device=device).to(dtype)[1:] for n in (1, 30, 4096, 5000, 70_001)]
    sums = kernel.fingerprint(table_of(*tensors), 0, 128)
    for x, own in zip(tensors, sums, strict=True):
        mixed = fingerprint._mixed(x.view(torch.int16), 0, 1)
        padded = torch.nn.functional.pad(mixed, (0, -len(mixed) % 4096))
        assert torch.equal(own, padded.view(-1, 128, 32).sum((0, 2)))
    assert torch.equal(kernel.fingerprint(table_of(*tensors), 77, 1), sums[:, 77:78])
    whole = [x.nbytes <= 16384 for x in tensors]
    assert sorted(set(whole)) == [False, True]
    for x, own, found in zip(whole, sums, kernel.fingerprint(table_of(*tensors), 77, 1, 16384), strict=True):
        assert found == (own.sum() if x else own[77])


def test_an_empty_table(device):
    assert kernel.fingerprint(torch.empty(0, 2, dtype=torch.int64, device=device), 0, 128).shape == (0, 128)


class Event:
    """Takes the place of a GPU event; the test decides whether it was reached."""

    reached = True

    def record(self, stream):
        pass

    def query(self):
        return Event.reached


@pytest.fixture
def held(device, monkeypatch):
    """Three weights with their fingerprints."""
    if device.type == "cpu":
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
        monkeypatch.setattr(Event, "reached", True)
    fingerprint._watch.cache_clear()
    weights = [torch.randn(rows, 512, device=device) for rows in (8, 40, 40)]
    return [(w, DeviceFingerprint([Region.of(w, weakref.ref(w.untyped_storage()))], device)) for w in weights]


def a_pass(held):
    found = [own.broken() for _, own in held]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return found


def test_passes_in_inference_mode_and_after_it(held):
    with torch.inference_mode():
        for _ in range(3):
            assert not any(a_pass(held))
    held[1][0].add_(1)
    assert [any(a_pass(held)) for _ in range(3)][-1]


def test_a_default_device_does_not_matter(held):
    with torch.device("meta"):
        assert not any(any(a_pass(held)) for _ in range(3))
        held[1][0].add_(1)
        assert [a_pass(held) for _ in range(3)][-1] == [False, True, False]


def test_a_gpu_that_the_kernels_are_not_made_for(monkeypatch):
    monkeypatch.setattr(fingerprint.triton_kernels, "missing", lambda device: "cannot run here: ...")
    w = torch.randn(9, 512)
    own = fingerprint.fingerprint([Region.of(w, weakref.ref(w.untyped_storage()))], torch.device("cuda"))
    assert not own.broken()
    w.add_(1)
    assert own.broken()


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


def test_any_write_to_a_small_weight_is_found_and_a_write_that_was_undone_forgotten(held):
    (weight, own), value = held[0], held[0][0][3, 5].item()
    for _ in range(3):
        a_pass(held)
    weight[3, 5] = value + 1
    assert any(a_pass(held)[0] for _ in range(3))
    weight[3, 5] = value
    for _ in range(2):
        a_pass(held)
    assert not own.broken_anywhere() and not any(a_pass(held)[0] for _ in range(3))


def test_threads_may_ask_at_once(held):
    """As they go on from one to the other in between."""
    before, errors = sys.getswitchinterval(), []

    def ask():
        try:
            for number in range(90):
                held[number % 3][1].broken()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not errors


def test_a_write_to_any_of_several_tensors_is_found(held):
    tensors = [torch.randn(8, 512, device=held[0][0].device) for _ in range(3)]
    regions = [Region.of(x, weakref.ref(x.untyped_storage())) for x in tensors]
    for x in tensors:
        asked = [*held, (x, DeviceFingerprint(regions, x.device))]
        assert not any(any(a_pass(asked)) for _ in range(3))
        x.add_(1)
        assert any(a_pass(asked)[-1] for _ in range(3))
