"""Without a GPU the Triton kernels run in the interpreter, on CPU tensors; with one, the same tests run on it."""

import faulthandler
import gc
import os
import sys

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # a thread each, or the workers would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
from hypothesis import settings

gc.disable()  # until the tests are collected; what that makes is no garbage

if not torch.cuda.is_available():
    # Triton reads the variable while it is imported; set later, half of its functions would not be interpreted.
    assert "triton" not in sys.modules, "triton was imported before tests/conftest.py could choose the interpreter"
    os.environ.setdefault("TRITON_INTERPRET", "1")

for devices in (torch.cuda, torch.xpu, torch.mtia):
    if not devices.is_available():  # each seed would be kept, with a traceback, for the day that there is one
        devices.manual_seed_all = lambda seed: None

torch.backends.cudnn.allow_tf32 = False  # fp32 parity is meant to the last bits

# no deadline: an interpreted kernel's first call takes seconds
settings.register_profile("insvp_fast", deadline=None, derandomize=True)
settings.load_profile("insvp_fast")


# PyTorch's generator begins with another number in each process: what modules, fixtures and tests draw is seeded here.
def pytest_collectstart():
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where Triton kernels run in this session."""
    return torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")


@pytest.fixture
def poison(monkeypatch):
    """Fill fresh floating-point memory, and bytes, with NaN, so that an element that nobody writes shows."""
    from insvp_fast.runtime import buffers

    def poisoned(function):
        def call(*args, **kwargs):
            fresh = function(*args, **kwargs)
            if fresh.dtype == torch.uint8 or fresh.is_floating_point():
                # through .data, for which PyTorch counts no write and asks for no gradient
                fresh.data.fill_(255 if fresh.dtype == torch.uint8 else float("nan"))
            return fresh

        return call

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    monkeypatch.setattr(buffers, "empty", poisoned(buffers.empty))


@pytest.fixture(params=["generic", "avx2", "avx512", "avx512_bf16", "amx"])
def isa(request, monkeypatch):
    """The native library at one instruction set; skips those that the processor lacks."""
    from insvp_fast.runtime.native import library

    monkeypatch.setenv("INSVP_FAST_CPU_ISA", request.param)
    library.load.cache_clear()
    yield request.param if library.native_status().isa == request.param else pytest.skip("the processor lacks it")
    monkeypatch.undo()
    library.load.cache_clear()
    library.native_status()


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def no_hang(capfd):
    """Ends the tests with the stack of each thread where one waits in C code, which no exception can end."""
    with capfd.disabled():
        stderr = os.dup(2)
    faulthandler.dump_traceback_later(120, exit=True, file=stderr)
    yield
    faulthandler.cancel_dump_traceback_later()
    os.close(stderr)


def pytest_collection_finish():
    """What is imported by now stays: collections of garbage need not look at it again, and are wanted more seldom."""
    gc.collect()
    gc.freeze()
    gc.enable()
    gc.set_threshold(100_000, 20, 20)  # a sixteenth of the time of tests of whole models


def pytest_unconfigure():
    """Extensions report what is left of them at the end."""
    gc.unfreeze()
