"""dropout against PyTorch's own: the numbers, the gradient, and the random numbers that come after it, bit for bit."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from insvp_fast import ops
from insvp_fast.ops import registry
from insvp_fast.runtime import native
from tests.gradients import DTYPES, with_gradients

module = importlib.import_module("insvp_fast.ops.dropout")


def results_and_state(function, x):
    torch.manual_seed(3)
    torch.randint(9, (5,))  # from the middle of a state
    y = function(x)
    state = torch.get_rng_state()
    (grad,) = torch.autograd.grad(y, x, torch.full_like(y, 3.0))
    return y, grad, state


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("shape", [(), (1,), (2, 3, 7), (3, 40, 41)], ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_bits(dtype, shape, impl):
    x = torch.randn(shape).to(dtype).requires_grad_()
    for p in (0.1, 0.75):
        found = results_and_state(lambda x, p=p: ops.dropout(x, p, impl=impl), x)
        assert all(map(torch.equal, found, results_and_state(lambda x, p=p: F.dropout(x, p), x)))


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -0.0])
def test_a_dropped_value_is_multiplied_by_zero(value):
    x = torch.full((50,), value, requires_grad=True)
    (y, *_), (expected, *_) = (results_and_state(f, x) for f in (lambda x: ops.dropout(x, 0.5), F.dropout))
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(y.signbit(), expected.signbit()) or value != value


def test_memory_that_is_not_contiguous_is_drawn_by_pytorch():
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    assert all(map(torch.equal, results_and_state(lambda x: ops.dropout(x, 0.3), x), results_and_state(drop, x)))
    with pytest.raises(RuntimeError, match='impl="native" cannot (draw in the order of memory|run here)'):
        ops.dropout(x, 0.3, impl="native")


def drop(x):
    return F.dropout(x, 0.3)


@pytest.mark.skipif(not native.native_status(), reason=str(native.native_status()))
def test_another_version_of_pytorch_draws_itself(monkeypatch):
    """Where masks would be others, the native library is not asked."""
    x, right = torch.randn(2000).requires_grad_(), native.dropout_fwd
    assert registry.implementation("dropout_fwd", "auto", module._Fwd(x, 0.3)) == "native"

    def wrong(x, p, generator):
        return right(x, 1 - p, generator)

    monkeypatch.setattr(native, "dropout_fwd", wrong)
    module._draws_as_pytorch.cache_clear()
    try:
        assert all(map(torch.equal, results_and_state(lambda x: ops.dropout(x, 0.3), x), results_and_state(drop, x)))
        with pytest.raises(RuntimeError, match="cannot draw the random numbers of this version of PyTorch"):
            ops.dropout(x, 0.3, impl="native")
    finally:
        module._draws_as_pytorch.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_other_default_dtypes(dtype):
    module._draws_as_pytorch.cache_clear()
    torch.set_default_dtype(dtype)
    try:
        assert ops.dropout(torch.ones(5, dtype=torch.float32), 0.5).dtype == torch.float32
        assert not native.native_status() or module._draws_as_pytorch()
    finally:
        torch.set_default_dtype(torch.float32)


def test_gradients_are_written_out():
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(0)
    y, grad = with_gradients(lambda x: module.dropout_reference(x, 0.4)[0], (x,))
    torch.manual_seed(0)
    _, kept = module.dropout_reference(x, 0.4)
    torch.manual_seed(1)
    assert torch.equal(module.dropout_bwd_reference(torch.randn_like(y), kept, 0.4), grad)


def test_compiled_code_may_not_merge_its_calls():
    """Two calls with the same operands have two masks."""
    x = torch.ones(400)
    first, second = torch.compile(lambda x: (ops.dropout(x, 0.5), ops.dropout(x, 0.5)), backend="aot_eager")(x)
    assert not torch.equal(first, second)


def test_opcheck():
    x, kept = torch.randn(4, 5), torch.ones(4, 5, dtype=torch.bool)
    opcheck(torch.ops.insvp_fast.dropout_bwd.default, (x, kept, 0.3, "auto"))
    opcheck(torch.ops.insvp_fast.dropout_fwd.default, (x, 0.3, "auto"), test_utils=("test_schema", "test_faketensor"))
