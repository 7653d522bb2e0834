"""Memory that is used again must never be anybody's."""

import pytest
import torch

from insvp_fast import memory

SHAPE, F32 = (512, 1024), torch.float32  # 2 MB


@pytest.fixture(autouse=True)
def _no_free_blocks():
    memory.release()


def test_the_memory_of_a_dead_tensor_is_used_again():
    address = memory.empty(SHAPE, F32).data_ptr()
    x = memory.empty(SHAPE, F32)
    assert x.data_ptr() == address and x.shape == SHAPE and x.dtype == F32 and x.is_contiguous()
    del x
    assert memory.empty((1024, 1024), torch.bfloat16).data_ptr() == address  # of the same size in bytes


def view(x):
    return x[3:5].T


def saved(x):
    return (x.requires_grad_() * 2).square().sum()


def same_memory(x):
    return x.untyped_storage()


def array(x):
    return x.numpy()


def capsule(x):
    return torch.utils.dlpack.to_dlpack(x)


@pytest.mark.parametrize("hold", [view, saved, same_memory, array, capsule])
def test_memory_in_use_is_left_alone(hold):
    x = memory.empty(SHAPE, F32)
    address, held = x.data_ptr(), hold(x)
    del x
    assert address not in [memory.empty(SHAPE, F32).data_ptr() for _ in range(3)]
    del held
    kept = [memory.empty(SHAPE, F32) for _ in range(3)]
    assert address in [k.data_ptr() for k in kept]


def test_memory_that_another_process_may_see_is_given_up():
    x = memory.empty(SHAPE, F32).share_memory_()
    address = x.data_ptr()
    del x
    assert memory.empty(SHAPE, F32).data_ptr() != address


def test_a_resized_block_is_given_up():
    x = memory.empty(SHAPE, F32)
    x.untyped_storage().resize_(16)
    del x
    assert memory.empty(SHAPE, F32).untyped_storage().nbytes() == 2**21


def test_idle_blocks_are_given_back(monkeypatch):
    monkeypatch.setattr(memory, "_IDLE", 5)
    memory.empty((1 << 19,), F32)
    for n in range(20):
        memory.empty((1 << 20, n + 1), F32)  # each is a new size
    assert 4 << 19 not in memory._blocks and len(memory._blocks) <= 7


def test_small_tensors_and_other_devices_are_pytorchs():
    before = dict(memory._blocks)
    assert memory.empty((3, 4), F32).shape == (3, 4)
    assert memory.empty((0, 4), F32).shape == (0, 4)
    assert memory.empty(SHAPE, F32, "meta").device.type == "meta"
    assert memory.empty_like(torch.empty(SHAPE, device="meta")).device.type == "meta"
    assert dict(memory._blocks) == before


def test_fake_tensors_and_default_devices():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert type(memory.empty(SHAPE, F32)).__name__ == "FakeTensor"
    with torch.device("meta"):
        assert memory.empty(SHAPE, F32).device.type == memory.empty((3,), F32).device.type == "cpu"
