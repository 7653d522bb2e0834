"""Memory that is used again must never be anybody's."""

import gc
import os
import subprocess
import sys
import threading

import pytest
import torch

from insvp_fast.runtime import buffers

SHAPE, F32 = (512, 1024), torch.float32  # 2 MB


@pytest.fixture(autouse=True)
def _no_free_blocks():
    buffers.release()


def free_blocks():
    return sum(map(len, buffers._free.values()))


def addresses(count=3):
    """Where fresh tensors lie; ``count`` at once, so that no block can come twice."""
    return [x.data_ptr() for x in [buffers.empty(SHAPE, F32) for _ in range(count)]]


def test_the_memory_of_a_dead_tensor_is_used_again():
    address = buffers.empty(SHAPE, F32).data_ptr()
    x = buffers.empty(SHAPE, F32)
    assert x.data_ptr() == address and x.shape == SHAPE and x.dtype == F32 and x.is_contiguous()
    del x
    assert buffers.empty((1024, 1024), torch.bfloat16).data_ptr() == address  # of the same size in bytes


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float16, torch.uint8, torch.int64, torch.bool])
def test_a_tensor_is_like_pytorchs(dtype):
    ours, theirs = buffers.empty((3, 0x8000, 2), dtype), torch.empty((3, 0x8000, 2), dtype=dtype)
    for x in (ours, theirs):
        assert x.dtype == dtype and x.stride() == (0x10000, 2, 1) and x.is_leaf and not x.requires_grad
        assert x.data_ptr() % 64 == 0  # a line of the cache, as wide loads like it
        assert x.untyped_storage().nbytes() == x.nbytes


def view(x):
    return x[3:5].T


def flat_view_of_other_dtype(x):
    return x.view(torch.int32).flatten()[:1]


def detached(x):
    return x.detach()


def saved(x):
    return (x.requires_grad_() * 2).square().sum()


def same_memory(x):
    return x.untyped_storage()


def set_on_another(x):
    return torch.empty(0).set_(x.untyped_storage(), 5, (2, 2))


def array(x):
    return x.numpy()


def part_of_an_array(x):
    return x.numpy()[7:9].T


def array_and_back(x):
    return torch.from_numpy(x.numpy())


def buffer(x):
    return memoryview(x.numpy())


def capsule(x):
    return torch.utils.dlpack.to_dlpack(x)


def capsule_and_back(x):
    return torch.from_dlpack(x)


def parameter(x):
    return torch.nn.Parameter(x)


def closure(x):
    return lambda: x


USERS = [
    view, flat_view_of_other_dtype, detached, saved, same_memory, set_on_another, array, part_of_an_array,
    array_and_back, buffer, capsule, capsule_and_back, parameter, closure,
]  # fmt: skip


@pytest.mark.parametrize("hold", USERS)
def test_memory_in_use_is_left_alone(hold):
    x = buffers.empty(SHAPE, F32)
    address, held = x.data_ptr(), hold(x)
    del x
    assert address not in addresses()
    del held
    assert address in addresses(4)


def test_a_cycle_gives_its_memory_back():
    x = buffers.empty(SHAPE, F32)
    address, x.itself = x.data_ptr(), x
    del x
    assert address not in addresses()
    gc.collect()
    assert address in addresses(4)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(buffers.empty_like(x).fill_(2))
        return torch.mul(x, 2, out=buffers.empty_like(x))

    @staticmethod
    def backward(ctx, grad):
        (two,) = ctx.saved_tensors
        return torch.mul(grad, two, out=buffers.empty_like(two))


def test_the_result_of_an_autograd_function_may_be_written_in_place():
    x = torch.ones(SHAPE, requires_grad=True)
    y = Double.apply(x).mul_(3)
    y.sum().backward()
    assert torch.equal(y, torch.full(SHAPE, 6.0)) and torch.equal(x.grad, torch.full(SHAPE, 6.0))


def test_inference_tensors():
    with torch.inference_mode():
        x = buffers.empty(SHAPE, F32)
        assert x.is_inference()
    address = x.data_ptr()
    del x
    assert buffers.empty(SHAPE, F32).data_ptr() == address


def test_threads_never_share_a_block():
    """Each fills its tensors with a number of its own; what backward frees on a thread comes back to all."""
    wrong = []

    def work(number):
        for step in range(50):
            x = torch.full(SHAPE, float(number), requires_grad=True)
            y = Double.apply(Double.apply(x))
            kept = buffers.empty(SHAPE, F32).fill_(number)
            y.sum().backward()
            if not (y == 4 * number).all() or not (kept == number).all() or not (x.grad == 4).all():
                wrong.append((number, step))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_block_comes_back_in_the_middle_of_a_request(monkeypatch):
    """As when the garbage collector runs there: nothing waits for anything, and the block is not lost."""
    other, shape = [buffers.empty(SHAPE, F32)], (256, 1024)
    lent = buffers._Lent

    def collect(*arguments):
        other.clear()
        return lent(*arguments)

    monkeypatch.setattr(buffers, "_Lent", collect)
    x = buffers.empty(shape, F32)
    assert free_blocks() == 1 and x.shape == shape


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_memory_of_its_own():
    free = buffers.empty(SHAPE, F32)
    kept = buffers.empty(SHAPE, F32).fill_(1)
    del free
    pid = os.fork()
    if pid == 0:  # writes single rows, since a forked process has no OpenMP threads
        kept[3].fill_(2)
        fresh = buffers.empty(SHAPE, F32)
        fresh[3].fill_(3)
        os._exit(0 if (kept[3] == 2).all() and (fresh[3] == 3).all() else 1)
    fresh = buffers.empty(SHAPE, F32).fill_(4)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert (kept == 1).all() and (fresh == 4).all()


def test_memory_that_another_process_may_see_is_given_up():
    x = buffers.empty(SHAPE, F32).fill_(1)
    shared = x[3:5]
    x.share_memory_()
    address = x.data_ptr()
    del x
    assert address not in addresses()
    assert shared.is_shared() and (shared == 1).all()


@pytest.mark.parametrize("grow", [lambda x: x.resize_(1024, 1024), lambda x: x.untyped_storage().resize_(16)])
def test_resizing_the_memory_is_refused(grow):
    """By PyTorch: the memory is not its own to make longer."""
    with pytest.raises(RuntimeError, match="not resizable"):
        grow(buffers.empty(SHAPE, F32))
    assert free_blocks() == 1


def test_a_tensor_may_shrink():
    x = buffers.empty(SHAPE, F32).resize_(2, 3)
    address = x.data_ptr()
    assert x.shape == (2, 3) and address not in addresses()
    del x
    assert address in addresses(4)


def test_no_memory_is_said():
    with pytest.raises(MemoryError, match="4611686018427387904 bytes"):
        buffers.empty((1 << 60,), F32)


def test_idle_blocks_are_given_back(monkeypatch):
    monkeypatch.setattr(buffers, "_IDLE", 5)
    buffers.empty((1 << 19,), F32)
    for n in range(20):
        buffers.empty((1 << 20, n + 1), F32)  # each is a new size
    assert not buffers._free[4 << 19] and free_blocks() <= 7


def test_idle_blocks_are_given_back_where_no_request_needs_a_new_one(monkeypatch):
    """As after one large batch of an evaluation, before a long training."""
    monkeypatch.setattr(buffers, "_IDLE", 50)
    buffers.empty((1 << 20,), F32)
    for _ in range(200):
        buffers.empty((1 << 18,), F32)
    assert not buffers._free[4 << 20] and buffers._free[4 << 18]


def test_small_tensors_and_other_devices_are_pytorchs():
    assert buffers.empty((3, 4), F32).shape == (3, 4)
    assert buffers.empty((0, 4), F32).shape == (0, 4)
    assert buffers.empty(SHAPE, F32, "meta").device.type == "meta"
    assert buffers.empty_like(torch.empty(SHAPE, device="meta")).device.type == "meta"
    assert not free_blocks()


def test_fake_tensors_and_default_devices():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert type(buffers.empty(SHAPE, F32)).__name__ == "FakeTensor"
    with torch.device("meta"):
        assert buffers.empty(SHAPE, F32).device.type == buffers.empty((3,), F32).device.type == "cpu"


SHUTDOWN = """
import threading, torch
from insvp_fast.runtime import buffers
kept = buffers.empty((512, 1024), torch.float32)
free = buffers.empty((512, 1024), torch.float32); del free
saved = (buffers.empty((512, 1024), torch.float32).fill_(1).requires_grad_() * 2).square().sum()
cycle = buffers.empty((512, 1024), torch.float32); cycle.itself = cycle; del cycle
array = buffers.empty((512, 1024), torch.float32).numpy()
def wait(x):
    threading.Event().wait()
threading.Thread(target=wait, args=(buffers.empty((512, 1024), torch.float32),), daemon=True).start()
torch.kept = buffers.empty((512, 1024), torch.float32)
"""


def test_tensors_may_outlive_the_interpreter():
    child = subprocess.run([sys.executable, "-c", SHUTDOWN], capture_output=True, text=True, timeout=120)
    assert (child.returncode, child.stderr) == (0, "")


def test_an_idle_block_beside_one_in_use_is_given_back(monkeypatch):
    monkeypatch.setattr(buffers, "_IDLE", 50)
    at_once = [buffers.empty(SHAPE, F32) for _ in range(3)]
    del at_once
    assert free_blocks() == 3
    for _ in range(200):
        buffers.empty(SHAPE, F32)  # the same block each time
    assert free_blocks() == 1
