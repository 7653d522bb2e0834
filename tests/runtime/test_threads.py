"""Threads: any number of them gives the same bits, models may run side by side, and a forked process does not hang."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from insvp_fast import InsVPConfig, InsVPViT
from insvp_fast.ops.attention import attention
from insvp_fast.runtime import native
from insvp_fast.testing import relative_error

pytestmark = pytest.mark.usefixtures("no_hang")


def make_model(seed=0):
    torch.manual_seed(seed)
    config = InsVPConfig(global_dropout=0.0)
    return InsVPViT("vit_tiny_patch16_224", 10, config, img_size=64, patch_size=8, depth=2)


def bits_of(model, image, autocast=None):
    """The logits and all gradients, without random numbers, which come from one generator for all threads."""
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        logits = model(image)
    trained = [p for p in model.parameters() if p.requires_grad]
    return [logits.detach(), *torch.autograd.grad(logits.float().square().mean(), trained)]


def same(first, second):
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_threads_may_change_between_calls(autocast, threads):
    """How many there were before never shows; some of PyTorch's own sums depend on how many there are."""
    model, image = make_model(), torch.randn(3, 3, 64, 64)
    results = {}
    for n in (1, 2, 3, 2, 1, 3):
        threads(n)
        bits = bits_of(model, image, autocast)
        assert same(results.setdefault(n, bits), bits)
    for n in (2, 3):
        for one, several in zip(results[1], results[n], strict=True):
            assert relative_error(several, one.double()) < 1e-6


@pytest.mark.skipif(not native.available(), reason="needs the native library")
@pytest.mark.parametrize("n", [7, 70])
@pytest.mark.usefixtures("poison")  # else memory of the call before may hold what a thread has left out
def test_any_number_of_threads_computes_every_head(n, threads):
    """Also more than processors, and than shares of the work (``for_each_job`` in kernels/cpu/common/threads.h)."""
    qkv = torch.randn(25, 7, 3 * 3 * 8)
    threads(1)
    expected = attention(qkv, 3, 5, 0.5, impl="native")
    assert relative_error(expected, attention(qkv.double(), 3, 5, 0.5, impl="reference")) < 1e-6
    threads(n)
    for _ in range(20):
        assert torch.equal(attention(qkv, 3, 5, 0.5, impl="native"), expected)


def test_models_in_two_python_threads(threads):
    """Each has two threads of its own."""
    image, expected, found = torch.randn(3, 3, 64, 64), {}, {}
    models = [make_model(seed) for seed in range(2)]
    threads(2)
    for model in models:
        expected[model] = bits_of(model, image)
    barrier = threading.Barrier(len(models))

    def train(model):
        barrier.wait()
        found[model] = [bits_of(model, image) for _ in range(5)]

    workers = [threading.Thread(target=train, args=(model,)) for model in models]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for model in models:
        assert all(same(bits, expected[model]) for bits in found[model])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.skipif(not native.available(), reason="needs the native library")
def test_a_forked_process_computes():
    """In a process of its own: a fake GPU in an earlier test makes PyTorch refuse gradients in forked processes."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(compute_in_forked_processes).result()


def compute_in_forked_processes():
    """In one thread: they have none of those that their parent has started, and GNU's OpenMP waits for them."""
    warnings.filterwarnings("ignore", ".*fork.*", DeprecationWarning)
    model, image = make_model(), torch.randn(3, 3, 64, 64)
    torch.set_num_threads(1)
    expected = bits_of(model, image)
    torch.set_num_threads(2)
    bits_of(model, image)
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)
        status = 1
        try:
            status = 0 if torch.get_num_threads() == 1 and same(bits_of(model, image), expected) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert torch.get_num_threads() == 2
    workers = {"num_workers": 1, "multiprocessing_context": "fork", "timeout": 30}
    (logits,) = torch.utils.data.DataLoader([image], batch_size=None, collate_fn=torch.no_grad()(model), **workers)
    assert torch.equal(logits, expected[0])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_an_import_starts_no_threads_that_a_forked_process_would_wait_for():
    program = """if True:
        import os, signal, torch
        import insvp_fast.training.run

        if (pid := os.fork()) == 0:
            signal.alarm(30)
            torch.set_num_threads(2)
            torch.rand(1000, 1000).exp()
            os._exit(0)
        raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0)
    """
    env = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_forked_after_pytorch_alone_has_computed_does_not_hang():
    program = """if True:
        import os, signal, torch
        from insvp_fast import ops

        torch.set_num_threads(2)
        torch.rand(1000, 1000).exp()
        if (pid := os.fork()) == 0:
            signal.alarm(30)
            ops.attention(torch.rand(4, 20, 48), 2, 20, 0.3)
            os._exit(0)
        raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0)
    """
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
