"""Native calls that run one after another in C++, against the same calls one by one."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from insvp_fast.runtime import native, recording
from insvp_fast.runtime.native import library
from insvp_fast.runtime.native.attention import _FWD
from insvp_fast.runtime.native.copy import _COPY
from insvp_fast.runtime.programs import Recorder
from tests.kernels.native_checks import needs_library

pytestmark = [needs_library, pytest.mark.usefixtures("no_hang")]


def some_calls(to, middle, x):
    """With numbers with a fraction, strides and offsets in bytes, and an absent tensor."""
    native.weighted_sum(middle, x, -0.3, None, 0.0)
    native.copy(to, middle.expand(2, *middle.shape))
    native.copy(middle[0], None)


def memory(seed):
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(seed))
    return torch.full((2, 3, 50), torch.nan), torch.full_like(x, torch.nan), x


def recorded(function, tensors):
    recorder = Recorder(tensors)
    recording.record(recorder, lambda: function(*tensors))
    return recorder.calls


def steps_of(function, tensors):
    return native.Steps(recorded(function, tensors))


def run(steps, tensors):
    steps.run([x.untyped_storage().data_ptr() for x in tensors])


def test_calls_run_again_on_other_memory():
    steps = steps_of(some_calls, memory(0))
    assert len(steps) == 3
    for seed in range(1, 4):
        found, expected = memory(seed), memory(seed)
        run(steps, found)
        some_calls(*expected)
        assert all(map(torch.equal, found, expected)) and not found[0].isnan().any()


def test_places_are_offsets_in_pieces_of_memory():
    def halves(x):
        native.copy(x[4:], x[:4])

    steps = steps_of(halves, [torch.zeros(8)])
    x = torch.arange(8.0)
    run(steps, [x])
    assert x.tolist() == [0, 1, 2, 3] * 2


def test_threads_may_run_the_same_calls():
    steps = steps_of(some_calls, memory(0))
    found = [memory(seed) for seed in range(8)]

    def repeat(tensors):
        for _ in range(200):
            run(steps, tensors)

    threads = [threading.Thread(target=repeat, args=(tensors,)) for tensors in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, tensors in enumerate(found):
        expected = memory(seed)
        some_calls(*expected)
        assert all(map(torch.equal, tensors, expected))


def shared_calls(to, middle, x):
    """Large enough for threads to share, in turn with some that are not."""
    native.weighted_sum(middle, x, 0.5, None, 0.0)
    native.copy(to[0], middle)
    native.copy(to[1, :, :1], x[:, :1])
    native.weighted_sum(to[1, :, 1:], middle[:, 1:], -0.3, x[:, 1:], 3.0)


@pytest.mark.parametrize("count", [1, 2, 3, 17])
def test_a_team_of_threads_does_all_the_work_of_each_call(count, threads):
    """Also of more threads than processors, of which some fall asleep while others work, or between two programs."""

    def operands(seed):
        x = torch.randn(3, 1 << 17, generator=torch.Generator().manual_seed(seed))
        return torch.full((2, *x.shape), torch.nan), torch.full_like(x, torch.nan), x

    threads(count)
    steps = steps_of(shared_calls, operands(0))
    for seed in range(1, 11):
        found = operands(seed)
        run(steps, found)
        _, _, x = found
        middle = 0.5 * x
        sums = torch.cat([x[:, :1], -0.3 * middle[:, 1:] + 3.0 * x[:, 1:]], 1)
        assert torch.equal(found[1], middle) and torch.equal(found[0], torch.stack([middle, sums]))
        time.sleep(0.002 * (seed % 2))


def test_the_first_failure_ends_the_run():
    x, to = torch.ones(4), torch.zeros(4)
    too_large = [None, 0, *[None] * 4, None, 1, 1, 1, 2**40, 1, 1, 1.0]  # attention to a million million prompts
    failing = library.Call("attention_fwd", None, _FWD, too_large)
    before, after = (recorded(lambda to, x, n=n: native.copy(to[n : n + 2], x[n : n + 2]), (to, x)) for n in (0, 2))
    to.zero_()
    with pytest.raises(MemoryError, match="program"):
        run(native.Steps([*before, (failing, []), *after]), (to, x))
    assert to.tolist() == [1, 1, 0, 0]


def test_numbers_may_be_negative():
    x, to = torch.arange(4.0), torch.empty(4)
    ones, bytes_to, bytes_from = (1, 1, 1, 1, 4), (0, 0, 0, 0, 4), (0, 0, 0, 0, -4)
    backward = [None, None, 4, *ones, *bytes_to, *bytes_from]  # runs of 4 bytes, read from the last one on
    places = [native.Place(0, 0, 0), native.Place(1, 1, 12)]
    run(native.Steps([(library.Call("copy", None, _COPY, backward), places)]), (to, x))
    assert to.tolist() == [3, 2, 1, 0]
